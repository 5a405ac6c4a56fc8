"""Kernels are chosen for the device that JAX computes on, which a user may have named."""

from importlib import metadata

import jax
import pytest

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


@pytest.mark.parametrize(
    ("jax_is", "installed", "is_fine"),
    [
        ((0, 12, 0), {"jax-cuda13-plugin": "0.12.0", "nvidia-nccl-cu13": "2.28.9"}, False),
        ((0, 12, 0), {"jax-cuda13-plugin": "0.12.0", "nvidia-nccl-cu13": "2.30.1"}, True),
        ((0, 11, 2), {"jax-cuda13-plugin": "0.11.2", "nvidia-nccl-cu13": "2.28.9"}, True),
        # PyTorch's, beside a JAX for another CUDA.
        ((0, 12, 0), {"jax-cuda13-plugin": "0.12.0", "nvidia-nccl-cu12": "2.27.3"}, True),
    ],
)
def test_an_old_nccl_is_named(monkeypatch, jax_is, installed, is_fine):
    def version(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(jax, "__version_info__", jax_is)
    reason = target.why_not_several_gpus()
    assert (reason == "") == is_fine
    assert is_fine or "2.28.9: pip install --upgrade nvidia-nccl-cu13" in reason
