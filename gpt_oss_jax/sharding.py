"""Where arrays live on a mesh: one table from logical axes to mesh axes.

Weights carry logical axis names (`axes` in their metadata); nothing outside this file names a mesh
axis. Over `fsdp` weights are split where they rest and whole where they are used, as rows differ
from device to device there. Knows nothing of the model.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "context", "expert", "tensor")

# What is no expert is split over the devices that share them, too. `fsdp` takes whole experts, so
# that no block of MXFP4 is cut, and no byte moves within an expert when they are gathered.
LOGICAL_TO_MESH = {
    "batch": ("data", "fsdp"),
    "tokens": ("context",),
    "slots": ("context",),
    "vocab": ("expert", "tensor"),
    "embed": ("fsdp",),
    "kv_heads": ("expert", "tensor"),
    "heads": (),
    "head_dim": (),
    "experts": ("expert", "fsdp"),
    "expert_width": ("tensor",),
    "expert_width_blocks": ("tensor",),
}
# Rows of the up projection are split where whole MXFP4 blocks of the down projection are. A ring of
# 128 slots, which all queries see, is not worth to be split.
_UNITS = {"expert_width": 32, "slots": 128}
_AT_REST = "fsdp"  # What splits weights only until they are used.


class Weight(Protocol):
    """An array, there or not, whose dimensions have logical names."""

    axes: tuple[str | None, ...]
    shape: tuple[int, ...]
    dtype: np.dtype


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    context: int = 1,
    expert: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Makes a mesh over the axes that `LOGICAL_TO_MESH` speaks of.

    Args:
      data: Devices that split the batch.
      fsdp: Devices that split the batch and, until they are used, all weights: to train, or where
        memory is short.
      context: Devices that split the tokens of a prompt and the slots of the cache: for contexts
        that are too long for one.
      expert: Devices that split the experts; with `tensor`, heads and vocabulary as well.
      tensor: Devices that split the width of each expert.
      devices: Their product in devices; the first of `jax.devices()` if None.

    Raises:
      ValueError: If a size is no whole number of at least 1, or there are fewer devices than asked
        for.
    """
    sizes = dict(zip(MESH_AXES, (data, fsdp, context, expert, tensor), strict=True))
    shape = tuple(sizes.values())
    if not all(isinstance(x, int | np.integer) and x >= 1 for x in shape):
        raise ValueError(
            f"the sizes of a mesh must be whole numbers of at least 1, got {spelled(sizes)}."
        )
    wanted = math.prod(shape)
    devices = jax.devices() if devices is None else list(devices)
    if len(devices) < wanted:
        raise ValueError(
            f"the mesh {spelled(sizes)} needs {wanted} devices, got {len(devices)}: make its sizes "
            "smaller."
        )
    # Explicit axes are JAX's default, under which a plain gather from a sharded table raises.
    auto = (AxisType.Auto,) * len(shape)
    return Mesh(np.asarray(devices[:wanted]).reshape(shape), MESH_AXES, axis_types=auto)


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of no devices, to ask how it would split; an axis that is not named has size 1."""
    shape = tuple(sizes.get(name, 1) for name in MESH_AXES)
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def preset(weights: Iterable[Weight], devices: int) -> dict[str, int]:
    """The mesh to spread one model over so many devices with, if nobody asks for another.

    Experts are split over as many as divide heads, vocabulary and experts alike, and stay whole,
    which kernels want. Where there are more devices, they have copies and split the rows.

    Args:
      weights: Of the model; their `axes` and `shape` are looked at.
      devices: How many there are, of any kind.

    Returns:
      Sizes for `make_mesh`.
    """

    def split(x: Weight) -> int:
        sizes = zip(x.axes, x.shape, strict=True)
        return next((n for axis, n in sizes if "expert" in LOGICAL_TO_MESH.get(axis, ())), 0)

    common = math.gcd(*map(split, weights))
    expert = max(n for n in range(1, min(devices, common) + 1) if common % n == 0)
    return {"data": devices // expert, "expert": expert}


def preset_of_all(weights: Iterable[Weight], devices: int) -> dict[str, int]:
    """The mesh that splits a model over all of a number of which `preset` leaves some, as of three.

    Heads, experts and rows, whose number is rounded up, come in powers of two. What else divides
    the number of devices has to split the width of experts, which the fastest kernels do not take;
    if it does not divide that, there is no such mesh, and the result is empty.
    """
    weights, tensor = list(weights), devices // (devices & -devices)
    sizes = preset(weights, devices // tensor) | {"tensor": tensor}
    units = [
        size / _UNITS.get(axis, 1)
        for x in weights
        for axis, size in zip(x.axes, x.shape, strict=True)
        if LOGICAL_TO_MESH.get(axis) == ("tensor",)
    ]
    divides = all(n % tensor == 0 for n in units)
    return sizes if divides and math.prod(sizes.values()) == devices else {}


def spelled(sizes: Mapping[str, int]) -> str:
    """The sizes of a mesh as `--mesh` takes them, without those of one: "data=2,expert=4"."""
    return ",".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "none"


def named_sharding(
    mesh: Mesh | AbstractMesh,
    axes: Sequence[str | None],
    shape: Sequence[int] | None = None,
    *,
    in_use: bool = False,
) -> NamedSharding:
    """The sharding of an array with these logical axes.

    Args:
      mesh: Of `make_mesh`, or any with some of its axis names.
      axes: A key of `LOGICAL_TO_MESH` or None for each dimension.
      shape: If given, a dimension that its mesh axes do not divide evenly is split over those of
        them that do, the most devices possible; over none, it is replicated.
      in_use: Whether a weight is gathered for a layer that is about to use it.

    A mesh axis splits one dimension, the first that names it and that it divides.

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
    spec, taken = [], set()
    for i, axis in enumerate(axes):
        if axis is not None and axis not in LOGICAL_TO_MESH:
            raise ValueError(f"axis must be one of {', '.join(LOGICAL_TO_MESH)}, got {axis!r}.")
        units = None if shape is None else shape[i] / _UNITS.get(axis, 1)
        names = [x for x in LOGICAL_TO_MESH.get(axis, ()) if x not in taken]
        if in_use and axis != "batch":
            names = [x for x in names if x != _AT_REST]
        names = _most(mesh, names, units)
        taken |= set(names)
        spec.append(names[0] if len(names) == 1 else names or None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def _most(mesh: Mesh | AbstractMesh, names: Sequence[str], units: float | None) -> tuple[str, ...]:
    """Those axes of the mesh that divide so many units between the most devices."""
    names = [name for name in names if mesh.shape.get(name, 1) > 1]
    count = lambda some: math.prod(mesh.shape[name] for name in some)
    subsets = itertools.chain.from_iterable(
        itertools.combinations(names, size) for size in range(len(names), -1, -1)
    )
    return max((x for x in subsets if not x or units is None or units % count(x) == 0), key=count)


def not_split(variables: Mapping[str, Any], mesh: Mesh | AbstractMesh) -> str:
    """Which weights are split over fewer axes of a mesh than the table has for them; "" if none.

    Args:
      variables: By path, with `axes`, `shape` and `dtype`.
      mesh: Of devices.
    """
    found: dict[str, int] = {}
    for path, x in variables.items():
        where = named_sharding(mesh, x.axes, x.shape)
        if where != named_sharding(mesh, x.axes):
            name = f"{re.sub('[0-9]+', '*', path)} {list(x.shape)}"
            size = math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize
            found[name] = found.get(name, 0) + size
    if not found:
        return ""
    held = sum(found.values())
    size = f"{held / 1e9:.2f} GB" if held >= 1e7 else f"{held / 1e6:.2f} MB"
    return (
        f"the mesh {spelled(mesh.shape)} does not divide {'; '.join(sorted(found))}: each device "
        f"holds {size} of them"
    )
