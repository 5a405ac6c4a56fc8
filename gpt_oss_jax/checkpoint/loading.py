"""Loads a model: from a folder, an Orbax checkpoint, the hub, a bucket, the package, or thin air.

Tensors go one at a time from the file into their shards; the model is made around them. Of several
processes each reads what its own devices hold.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from gpt_oss_jax.checkpoint import synthetic
from gpt_oss_jax.checkpoint.experts import Source, model_kind, with_experts
from gpt_oss_jax.checkpoint.files import Folder, LocalFolder, open_folder
from gpt_oss_jax.checkpoint.hub import resolve
from gpt_oss_jax.checkpoint.orbax import is_orbax, open_orbax
from gpt_oss_jax.checkpoint.progress import progress
from gpt_oss_jax.checkpoint.source import open_safetensors
from gpt_oss_jax.checkpoint.stream import Request
from gpt_oss_jax.config import Config
from gpt_oss_jax.kernels.target import (
    default_device,
    device_kind,
    host_memory,
    knows_fp4,
    platform,
    why_not_hopper,
    why_not_several_gpus,
)
from gpt_oss_jax.model import Transformer
from gpt_oss_jax.model.layers import in_rows, rows_whole
from gpt_oss_jax.model.moe import EXPERT_FORMS, MoE, can_use_words, folds, in_words
from gpt_oss_jax.quant import MXArray, hopper_words
from gpt_oss_jax.quant.tpu_folded import SPAN
from gpt_oss_jax.sharding import named_sharding, not_split

_LOGGER = logging.getLogger(__name__)
# Not an attribute of the model: what is compiled for one would not serve another.
_ORIGINS: weakref.WeakKeyDictionary[Transformer, Folder] = weakref.WeakKeyDictionary()


def load(
    path_or_id: str | os.PathLike,
    *,
    mesh: Mesh | None = None,
    dtype=None,
    implementation: str | None = None,
    expert_form: str | None = None,
) -> Transformer:
    """Loads a model.

    Example:
      ```python
      model = load("openai/gpt-oss-20b")
      model = load("gpt-oss-20b/original", mesh=make_mesh(expert=8))
      ```

    Args:
      path_or_id: A folder with safetensors in Hugging Face's layout (of the release, or re-saved
        in bfloat16) or in that of `original/`, or with an Orbax checkpoint of ours; such a folder's
        URL ("gs://bucket/folder"); a repository of the Hugging Face hub, or its folder in the
        cache; "20b" and "120b" (also "gpt-oss:20b", "gpt-oss:120b") for the released ones; "tiny",
        the small model in the package; "synthetic:20b", random weights made on the device. What
        `convert` wrote is held against its checksums where this process reads a variable whole.
      mesh: Devices to spread the model over, from `make_mesh`. None: the default device.
      dtype: Of parameters, activations and cache. None: bfloat16 on accelerators, float32 on CPU.
        Experts stay in the 4.25 bits they come in.
      implementation: Name of the kernels to use. None: the fastest that can.
      expert_form: Of the experts on TPU: "packed", in 4.25 bits; or "folded", in 8.25 bits that are
        multiplied as they are, which pays where more than eight rows are generated at once, by what
        `plan` finds. Both are exact, and what would not be stays packed, which is logged. None:
        packed.

    Returns:
      The model.

    Raises:
      ValueError: If there is no such checkpoint, or anything about it is not as it should be: then
        everything that is wrong is named. If the weights do not fit the device. If `expert_form` is
        named where no kernels for TPU take the experts. If NCCL is too old for several GPUs.
    """
    if not isinstance(mesh, Mesh | None):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, such as of make_mesh, got {mesh!r}.")
    several_gpus = mesh is not None and mesh.size > 1 and _platform(mesh) == "gpu"
    if several_gpus and (reason := why_not_several_gpus()):
        raise ValueError(f"{reason}.")
    dtype = _dtype(dtype, mesh)
    name = str(path_or_id)
    if name.startswith(synthetic.PREFIX):
        config, kind, folder = synthetic.config_of(name), "mxfp4", None
        arrays = lambda targets: synthetic.arrays(config, targets)
    else:
        source = open_source(path_or_id)
        folder = source.folder
        # One dense matrix makes all of them dense: a model holds its experts in one way.
        config, kind = source.config, model_kind(source)
        arrays = lambda targets: _arrays(with_experts(source, kind), targets)
    use_words = _uses_words(config, kind, mesh, implementation)
    _check_form(expert_form, use_words)
    options = {"dtype": dtype, "experts": kind, "implementation": implementation, "mesh": mesh}
    shuffled = shuffles(kind, mesh, dtype, implementation)
    abstract = nnx.eval_shape(lambda: _made(config, shuffled, **options))
    graphdef, state = nnx.split(abstract)
    variables = {"/".join(map(str, path)): x for path, x in nnx.to_flat_state(state)}
    targets = {path: _target(variable, mesh) for path, variable in variables.items()}
    _check_room(targets, mesh, expert_form == "folded")
    if mesh is not None:
        if remark := not_split(variables, mesh):
            _LOGGER.warning(remark)
    total = sum(x.size * x.dtype.itemsize for x in targets.values())
    with progress("loading", total) as step:
        for path, array in arrays(targets):
            if shuffled and path.endswith("/blocks"):
                array = shuffle(targets[path].sharding)(array)
            variables[path] = variables[path].replace(array)
            step(array.nbytes)
    flat = [(path, variables["/".join(map(str, path))]) for path, _ in nnx.to_flat_state(state)]
    model = nnx.merge(graphdef, nnx.from_flat_state(flat))
    if _platform(mesh) == "tpu":
        model.embedding.use_rows()
    if use_words:
        form = mesh, expert_form or "packed", knows_fp4(_device_kind(mesh))
        names = [layer.mlp.use_words(*form) for layer in model.layers]
        _tell_what_is_not_folded(list(itertools.chain(*names)))
    if folder is not None:
        _ORIGINS[model] = folder
    return model


def outline(
    config: Config,
    *,
    experts: str = "mxfp4",
    mesh: Mesh | None = None,
    dtype=None,
    expert_form: str | None = None,
) -> Transformer:
    """The model that `load` returns, with `jax.ShapeDtypeStruct`s for arrays.

    Programs lowered from it are those that run on the loaded one, if all of its experts fold where
    they are to be folded.

    Args:
      config: Sizes.
      experts: "mxfp4" or "dense".
      mesh: See `load`.
      dtype: See `load`.
      expert_form: See `load`.
    """
    dtype, use_words = _dtype(dtype, mesh), _uses_words(config, experts, mesh)
    _check_form(expert_form, use_words)

    def make():
        shuffled = shuffles(experts, mesh, dtype)
        model = _made(config, shuffled, dtype=dtype, experts=experts, mesh=mesh)
        for layer in model.layers if use_words else ():
            for projection in (layer.mlp.up, layer.mlp.down):
                native = knows_fp4(_device_kind(mesh))
                projection.use_words(form=expert_form or "packed", native=native)
        return model

    graphdef, state = nnx.split(nnx.eval_shape(make))
    flat = {path: x.replace(_target(x, mesh)) for path, x in nnx.to_flat_state(state)}
    if _platform(mesh) == "tpu":
        ours = SingleDeviceSharding(default_device())
        table = flat["embedding", "weight"]
        where = rows_whole(table.sharding or ours)
        flat["embedding", "weight"] = table.replace(
            jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=where)
        )
    return nnx.merge(graphdef, nnx.from_flat_state(flat.items()))


def preparations(model: Transformer) -> Iterator[tuple[str, jax.stages.Lowered]]:
    """What `load` itself runs on a TPU to make the model of this `outline`; named, and lowered."""
    if _platform(model.mesh) != "tpu":
        return
    table = model.embedding.weight.get_value()
    plain = jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=model.mesh and table.sharding)
    yield "rows of the embedding", in_rows(table.sharding).lower(plain)
    if model.layers[0].mlp.up.words_of is None:
        return
    form = "folded" if hasattr(model.layers[0].mlp.up, "factors") else "packed"
    options = {"dtype": model.dtype, "experts": "mxfp4"}
    mlp = nnx.eval_shape(lambda: MoE(model.config, 0, rngs=nnx.Rngs(0), **options))
    for name, projection in (("up", mlp.up), ("down", mlp.down)):
        blocks, scales = (_target(x, model.mesh) for x in (projection.blocks, projection.scales))
        matrix = MXArray(blocks, scales)
        if form == "folded":
            yield f"whether experts fold, {name}", folds.lower(matrix)
        native = model.layers[0].mlp.up.native
        run = in_words(model.mesh, model.config.num_experts, form, native)
        yield f"experts {form}, {name}", run.lower(matrix)


def _made(config: Config, shuffled: bool, **options) -> Transformer:
    """A model of random weights; `shuffled` are what its experts will be."""
    model = Transformer(config, rngs=nnx.Rngs(0), **options)
    for layer in model.layers if shuffled else ():
        layer.mlp.up.shuffled = layer.mlp.down.shuffled = True
    return model


def shuffles(experts: str, mesh: Mesh | None, dtype, implementation: str | None = None) -> bool:
    """Whether kernels for Hopper will run, whose order experts are put into."""
    named = implementation in (None, "mosaic_gpu")
    can = named and _platform(mesh) == "gpu" and not why_not_hopper()
    return can and experts == "mxfp4" and dtype == jnp.bfloat16


@functools.cache
def shuffle(sharding: Sharding | None):
    """Of packed blocks with this sharding, jitted once; an array is changed where it lies."""
    return jax.jit(hopper_words.shuffle, donate_argnums=0, out_shardings=sharding)


def _uses_words(
    config: Config, experts: str, mesh: Mesh | None, implementation: str | None = None
) -> bool:
    """Whether kernels for TPU will run, whose order experts are put into."""
    named = implementation in (None, "mosaic_tpu")
    on_tpu = named and _platform(mesh) == "tpu"
    return on_tpu and experts == "mxfp4" and can_use_words(config, mesh)


def origin(model: Transformer) -> Folder | None:
    """The folder that `load` made this very object from; None if it is gone or never was."""
    folder = _ORIGINS.get(model)
    gone = isinstance(folder, LocalFolder) and not folder.path.is_dir()
    return None if gone else folder


def open_source(path_or_id: str | os.PathLike, *, download: bool = True) -> Source:
    """Opens a checkpoint and checks what is there against its config, without reading tensors.

    Args:
      path_or_id: What `load` takes, if it has files.
      download: Whether a repository of the hub may be fetched.

    Raises:
      ValueError: If there is none, or naming everything that is wrong with it.
    """
    folder = open_folder(resolve(path_or_id, download=download))
    return open_orbax(folder) if is_orbax(folder) else open_safetensors(folder)


def _dtype(dtype, mesh: Mesh | None):
    if dtype is None:
        return jnp.float32 if _platform(mesh) == "cpu" else jnp.bfloat16
    for known in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        # What is no dtype at all compares unequal, where making one of it would raise TypeError.
        if known == dtype:
            return known
    raise ValueError(f"dtype must be float32 or bfloat16, got {dtype!r}.")


def _device_kind(mesh: Mesh | None) -> str:
    return device_kind() if mesh is None else mesh.devices.flat[0].device_kind


def _platform(mesh: Mesh | None) -> str:
    return platform() if mesh is None else mesh.devices.flat[0].platform


def _target(variable: nnx.Variable, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    sharding = None if mesh is None else named_sharding(mesh, variable.axes, variable.shape)
    return jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding)


def _check_room(
    targets: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh | None, folded: bool
) -> None:
    """Refuses what cannot fit before anything of it is read.

    Raises:
      ValueError: If a device has less memory free than its part of the weights needs, or this
        process has no device of the mesh.
    """
    if mesh is not None and not mesh.local_devices:
        raise ValueError(
            f"the mesh must have devices of every process, got {mesh.size} of the "
            f"{jax.device_count()} there are, and none of process {jax.process_index()}."
        )
    needed = 0
    for path, x in targets.items():
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        bytes_ = math.prod(shape) * x.dtype.itemsize
        needed += 2 * bytes_ if folded and path.endswith("/blocks") else bytes_
    ours = jax.device_put(np.zeros(())).devices()  # Which compiles nothing.
    for device in ours if mesh is None else mesh.local_devices:
        stats = _memory(device)
        limit = stats.get("bytes_limit") or math.inf  # Allocators without a pool say 0.
        free = limit - stats.get("bytes_in_use", 0)
        if needed > free:
            pool = (
                "XLA_CLIENT_MEM_FRACTION, set before JAX starts, is the share of a GPU's memory "
                "that it may take. "
            )
            there = f"{free / 1e9:.2f} GB of JAX's {limit / 1e9:.2f} GB are free"
            if device.platform == "cpu":
                there = f"the machine has {limit / 1e9:.2f} GB for it"
            raise ValueError(
                f"the weights need {needed / 1e9:.2f} GB on {device}, where {there}. "
                f"{pool if device.platform == 'gpu' else ''}"
                "A mesh spreads a model over several devices; gpt-oss-jax plan says what fits."
            )


def _memory(device: jax.Device) -> dict[str, int]:
    """What the device tells of its memory; a CPU tells nothing, and has its share of all."""
    if device.platform == "cpu":
        return {"bytes_limit": host_memory() // jax.local_device_count("cpu")}
    return device.memory_stats() or {}


def _check_form(form: str | None, use_words: bool) -> None:
    if form not in (None, *EXPERT_FORMS):
        known = " or ".join(map(repr, EXPERT_FORMS))
        raise ValueError(f"expert_form must be None, {known}, got {form!r}.")
    if form is not None and not use_words:
        raise ValueError(
            f"expert_form={form!r} is for the kernels for TPU, which take MXFP4 experts that are "
            "whole on their device; leave it out here."
        )


def _tell_what_is_not_folded(names: Sequence[str]) -> None:
    if names:
        _LOGGER.warning(
            "%s: scales span more than 2^%d in an expert, so that folding would round; packed in "
            "4.25 bits instead", ", ".join(names), SPAN,
        )  # fmt: skip


def _arrays(
    source: Source, targets: Mapping[str, jax.ShapeDtypeStruct]
) -> Iterator[tuple[str, jax.Array]]:
    shards = {path: _distinct_shards(target) for path, target in targets.items()}
    requests = [
        Request(path, np.dtype(targets[path].dtype), index)
        for path, found in shards.items()
        for index, _ in found
    ]
    arrays = source.stream(requests)
    for path, found in shards.items():
        target, buffers = targets[path], []
        for _, devices in found:
            read = next(arrays)
            # Waited for: until then the memory it was read into is in use.
            buffers += jax.block_until_ready([jax.device_put(read, x) for x in devices])
            del read
        if target.sharding is None:
            yield path, buffers[0]
        else:
            yield (
                path,
                jax.make_array_from_single_device_arrays(target.shape, target.sharding, buffers),
            )


def _distinct_shards(target: jax.ShapeDtypeStruct) -> list[tuple[tuple[slice, ...] | None, list]]:
    """Slices, and the devices of this process that hold each: it is read once for all of them."""
    if target.sharding is None:
        return [(None, [None])]
    shards: dict[tuple[tuple[int, int], ...], list] = {}
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        bounds = tuple(
            (x.start or 0, size if x.stop is None else x.stop)
            for x, size in zip(index, target.shape, strict=True)
        )
        shards.setdefault(bounds, []).append(device)
    return [(tuple(slice(*x) for x in bounds), devices) for bounds, devices in shards.items()]
