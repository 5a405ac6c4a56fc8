"""Kernels are chosen for the device that JAX computes on, which a user may have named."""

import jax

from gpt_oss_jax.kernels import target


class Other:
    """A device that is not there."""

    platform, device_kind, compute_capability, core_count = "gpu", "NVIDIA H200", "9.0", 114


def test_the_default_device_is_what_the_user_named():
    first, *_, last = jax.local_devices()
    assert target.default_device() == first != last
    with jax.default_device(last):
        assert target.default_device() == last
    with jax.default_device("cpu"):
        assert target.default_device() == first


def test_all_is_asked_of_that_device(monkeypatch):
    monkeypatch.setattr(target, "default_device", Other)
    assert (target.platform(), target.device_kind(), target.multiprocessors()) == (
        "gpu",
        "NVIDIA H200",
        114,
    )
    monkeypatch.setattr(target, "JAX_FOR_HOPPER", (0, 0, 0))
    assert target.why_not_hopper() == ""
    monkeypatch.setattr(Other, "compute_capability", "8.0")
    assert target.why_not_hopper() == "needs a Hopper GPU, this is NVIDIA H200"
