"""Which device a program is being compiled for: the one that is there, or one that is only named.

Ahead-of-time compilation names it through `jax.sharding.use_abstract_mesh`.
"""

from __future__ import annotations

import jax


def device_kind() -> str:
    """As JAX spells it, such as "TPU v5 lite" or "NVIDIA H200"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def platform() -> str:
    """One of "cpu", "gpu", "tpu"."""
    return "tpu" if device_kind().startswith("TPU") else jax.default_backend()
