"""Which device a program is being compiled for: the one that is there, or one that is only named.

Ahead-of-time compilation names it through `jax.sharding.use_abstract_mesh`.
"""

from __future__ import annotations

import jax

JAX_FOR_HOPPER = (0, 11, 2)


def device_kind() -> str:
    """As JAX spells it, such as "TPU v5 lite" or "NVIDIA H200"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def platform() -> str:
    """One of "cpu", "gpu", "tpu"."""
    return "tpu" if device_kind().startswith("TPU") else jax.default_backend()


def multiprocessors() -> int:
    """Of the GPU that is there; elsewhere as many as an H100 or H200 of the SXM kind has."""
    return getattr(jax.devices()[0], "core_count", None) or 132


def why_not_hopper() -> str:
    """Why kernels for Hopper cannot run here; "" if they can."""
    if jax.__version_info__ < JAX_FOR_HOPPER:
        wanted = ".".join(map(str, JAX_FOR_HOPPER))
        return f"needs JAX {wanted}, this is {jax.__version__}"
    if platform() != "gpu" or jax.devices()[0].compute_capability != "9.0":
        return f"needs a Hopper GPU, this is {device_kind()}"
    return ""
