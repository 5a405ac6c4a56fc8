"""Where arrays live on a mesh: one table from logical axes to mesh axes.

Weights carry logical axis names (`axes` in their metadata); nothing outside this file names a mesh
axis. Knows nothing of the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "expert", "tensor")

LOGICAL_TO_MESH = {
    "batch": "data",
    "vocab": "tensor",
    "embed": None,
    "kv_heads": "tensor",
    "heads": None,
    "head_dim": None,
    "experts": "expert",
    "expert_width": "tensor",
    "expert_width_blocks": "tensor",
}


def make_mesh(
    *,
    data: int = 1,
    expert: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Makes a mesh over the axes that `LOGICAL_TO_MESH` speaks of.

    Args:
      data: Devices that split the batch.
      expert: Devices that split the experts.
      tensor: Devices that split heads, expert width and vocabulary.
      devices: Their product in devices; the first of `jax.devices()` if None.

    Raises:
      ValueError: If there are fewer devices than asked for.
    """
    shape = (data, expert, tensor)
    wanted = int(np.prod(shape))
    if min(shape) < 1:
        raise ValueError(f"data, expert and tensor must be at least 1, got {shape}.")
    devices = jax.devices() if devices is None else list(devices)
    if len(devices) < wanted:
        raise ValueError(
            f"{data=} x {expert=} x {tensor=} needs {wanted} devices, got {len(devices)}."
        )
    # Explicit axes are JAX's default, under which a plain gather from a sharded table raises.
    return Mesh(
        np.asarray(devices[:wanted]).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3
    )


def named_sharding(
    mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int] | None = None
) -> NamedSharding:
    """The sharding of an array with these logical axes.

    Args:
      mesh: Of `make_mesh`, or any with some of its axis names.
      axes: A key of `LOGICAL_TO_MESH` or None for each dimension.
      shape: If given, a dimension that the mesh does not divide evenly is replicated.

    Raises:
      ValueError: If an axis is unknown, the mesh has Explicit axes or none that the table names, or
        `shape` has another rank.
    """
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            "the mesh must have Auto axes, got Explicit ones; build it with "
            "gpt_oss_jax.sharding.make_mesh or pass axis_types=(AxisType.Auto,) * n."
        )
    if not set(mesh.shape) & set(MESH_AXES):
        raise ValueError(
            f"the mesh must have some of the axes {', '.join(MESH_AXES)}, got "
            f"{', '.join(map(str, mesh.shape))}."
        )
    if shape is not None and len(shape) != len(axes):
        raise ValueError(f"axes {tuple(axes)} must name every dimension of shape {tuple(shape)}.")
    spec = []
    for i, axis in enumerate(axes):
        if axis is not None and axis not in LOGICAL_TO_MESH:
            raise ValueError(f"axis must be one of {', '.join(LOGICAL_TO_MESH)}, got {axis!r}.")
        name = LOGICAL_TO_MESH.get(axis)
        if name not in mesh.shape or (shape is not None and shape[i] % mesh.shape[name]):
            name = None
        spec.append(name)
    return NamedSharding(mesh, PartitionSpec(*spec))
