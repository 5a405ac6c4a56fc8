"""TPUs that are not there, for programs to be compiled for, with the compiler in `libtpu`.

Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

# Chips of a slice by how many devices there are; the smallest that has enough is taken.
_SHAPES = {
    "v5e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4"},
    "v6e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4"},
    "v5p": {4: "2x2x1", 8: "2x2x2", 16: "2x2x4"},
    "tpu7x": {2: "1x1x1", 8: "2x2x1", 16: "2x2x2"},
}
# Of one host where the compiler would take another number of hosts than the clouds have.
_ONE_HOST = {"1x1": (1, 1, 1), "1x1x1": (1, 1, 1), "2x4": (2, 4, 1)}
# JAX gives it to the runtime where there is a TPU, and it is part of the names of programs.
_RUNTIME_FLAG = "--xla_tpu_use_enhanced_launch_barrier"


def devices(kind: str, count: int) -> list:
    """Devices of a slice, of which nothing can be asked but to be compiled for.

    Args:
      kind: "v5e", "v5p", "v6e" or "tpu7x".
      count: How many; a tpu7x chip has two.

    Raises:
      ValueError: If libtpu is not installed, or knows no such slice.
    """
    fitting = [n for n in _SHAPES.get(kind, ()) if n >= count]
    if not fitting:
        raise ValueError(f"the compiler is asked for up to 16 devices of {', '.join(_SHAPES)}.")
    shape = _SHAPES[kind][min(fitting)]
    # Without these libtpu asks the cloud where it runs.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    # Several may compile at once: no chip is taken.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    if _RUNTIME_FLAG not in flags:
        os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {_RUNTIME_FLAG}=true".strip()
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError('the TPU compiler is needed: pip install "gpt-oss-jax[tpu]".')
    hosts = {"chips_per_host_bounds": _ONE_HOST[shape]} if shape in _ONE_HOST else {}
    try:
        found = topologies.get_topology_desc(f"{kind}:{shape}", platform="tpu", **hosts)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"the TPU compiler cannot be asked about {kind}:{shape}: {error}"
        ) from error
    return list(found.devices)[:count]


@contextlib.contextmanager
def in_place_of_ours(device) -> Iterator[None]:
    """What is lowered meanwhile is for this device, as if JAX had found it on this machine."""
    kind = AbstractDevice(device.device_kind, device.num_cores, device.platform)
    # Without axes: a mesh that has some would be part of what is lowered.
    mesh = AbstractMesh((), (), abstract_device=kind)
    with jax.default_device(device), jax.sharding.use_abstract_mesh(mesh):
        yield
