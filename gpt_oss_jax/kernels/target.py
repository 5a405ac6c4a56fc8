"""Which device a program is being compiled for: the one that is there, or one that is only named.

Ahead-of-time compilation names it through `jax.sharding.use_abstract_mesh`.
"""

from __future__ import annotations

import os
from importlib import metadata

import jax

JAX_FOR_HOPPER = (0, 11, 2)
# From the first on, JAX's own sums over GPUs call what NCCL has since the second.
_SUMS_OF_JAX, _NCCL_FOR_SUMS = (0, 12), (2, 29, 2)


def default_device() -> jax.Device:
    """Where JAX puts what is put nowhere else: the user's choice, or the first of this process."""
    named = jax.config.jax_default_device
    return jax.local_devices(backend=named)[0] if isinstance(named, str | None) else named


def device_kind() -> str:
    """As JAX spells it, such as "TPU v5 lite" or "NVIDIA H200"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (default_device() if device is None else device).device_kind


def platform() -> str:
    """One of "cpu", "gpu", "tpu"."""
    return "tpu" if device_kind().startswith("TPU") else default_device().platform


def knows_fp4(kind: str) -> bool:
    """Whether a TPU of this kind converts float4_e2m1fn."""
    return kind.startswith("TPU7")


def multiprocessors() -> int:
    """Of the GPU that is there; elsewhere as many as an H100 or H200 of the SXM kind has."""
    return getattr(default_device(), "core_count", None) or 132


def host_memory() -> int:
    """Bytes of this machine's memory, free or not."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def why_not_hopper() -> str:
    """Why kernels for Hopper cannot run here; "" if they can."""
    if jax.__version_info__ < JAX_FOR_HOPPER:
        wanted = ".".join(map(str, JAX_FOR_HOPPER))
        return f"needs JAX {wanted} or newer, this is {jax.__version__}"
    if platform() != "gpu" or default_device().compute_capability != "9.0":
        return f"needs a Hopper GPU, this is {device_kind()}"
    return ""


def why_not_several_gpus() -> str:
    """Why programs that sum over GPUs would fail, what to do included; "" if nothing is known.

    JAX 0.12 is content with an NCCL that lacks what its small sums call (`NcclSymmetricMemory` of
    XLA), and a decode step then ends with "ncclGetPeerDevicePointer failed".
    """
    if jax.__version_info__ < _SUMS_OF_JAX:
        return ""
    for cuda in ("cu13", "cu12"):
        name = f"nvidia-nccl-{cuda}"
        try:
            metadata.version(f"jax-{cuda.replace('cu', 'cuda')}-plugin")
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # NCCL may come from elsewhere.
        if tuple(int(x) for x in found.split(".")[:3]) < _NCCL_FOR_SUMS:
            wanted = ".".join(map(str, _NCCL_FOR_SUMS))
            return (
                f"JAX {jax.__version__} needs NCCL {wanted} or newer for several GPUs, this is "
                f"{found}: pip install --upgrade {name}"
            )
    return ""
