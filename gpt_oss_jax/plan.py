"""Whether a model fits a device, and how fast it can be there at best: from shapes alone.

Nothing is loaded and no device is touched. Run it as `gpt-oss-jax plan MODEL --device v5e`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh

from gpt_oss_jax import cost
from gpt_oss_jax.config import Config
from gpt_oss_jax.generate.loop import prompt_calls
from gpt_oss_jax.kernels.expert_matmul.mosaic_tpu import FEW_ROWS
from gpt_oss_jax.model import Transformer, init_cache
from gpt_oss_jax.model.cache import MIN_SLOTS, bucket, cache_sharding
from gpt_oss_jax.model.moe import EXPERT_FORMS, can_use_words
from gpt_oss_jax.quant import MXArray
from gpt_oss_jax.sharding import abstract_mesh, named_sharding, preset, preset_of_all, spelled

GIB = 2**30
_CHUNK = 1024  # Tokens, as long prompts go in.


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of device, as its vendor describes it.

    Attributes:
      name: As people write it.
      platform: "tpu" or "gpu".
      memory_gib: What a program can have of it; 0: not known.
      bandwidth_gb: Of its memory, 1e9 bytes a second; 0: not known.
      tflops: bfloat16, dense; 0: not known.
      devices_per_chip: What JAX counts as a device.
      packed_rows: On TPU, up to how many rows at once are faster with packed experts than with
        folded ones, by the compiler's schedule (benchmarks/results).
      jax_name: What JAX calls a TPU.
    """

    name: str
    platform: str
    memory_gib: float
    bandwidth_gb: float
    tflops: float
    devices_per_chip: int = 1
    packed_rows: int = FEW_ROWS
    jax_name: str = ""


POOL = 0.95  # Of a GPU's memory, what the command line lets JAX take.
# Memory of TPUs as their compiler has it; of GPUs that share of what CUDA says they have.
KINDS = {
    kind.name: kind
    for kind in (
        Kind("v5e", "tpu", 15.75, 819, 197, jax_name="TPU v5 lite"),
        Kind("v5p", "tpu", 95.73, 2765, 459, jax_name="TPU v5"),
        Kind("v6e", "tpu", 31.24, 1640, 918, jax_name="TPU v6 lite"),
        Kind("tpu7x", "tpu", 94.74, 3690, 1153.5, 2, packed_rows=2, jax_name="TPU7x"),
        Kind("a100", "gpu", POOL * 79.2, 2039, 312),
        Kind("h100", "gpu", POOL * 79.2, 3350, 989),
        Kind("h200", "gpu", POOL * 139.8, 4800, 989),
        Kind("b200", "gpu", POOL * 178.4, 8000, 2250),
        Kind("rtx4090", "gpu", POOL * 23.5, 1008, 165),
        Kind("rtx5090", "gpu", POOL * 31.3, 1792, 210),
    )
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v5-lite": "v5e", "trillium": "v6e"}
_ALIASES |= {"v7x": "tpu7x", "ironwood": "tpu7x"}
_ALIASES |= {k.jax_name.lower().replace(" ", "-"): k.name for k in KINDS.values() if k.jax_name}
_MOST = 65_536  # Devices.
MOST_ROWS = 65_536  # More are not looked for.
# Whose slices are named by their cores, two to a chip.
_NAMED_BY_CORES = ("v5p", "tpu7x")
# Chips of the slices that Google Cloud has. Those with links in three dimensions come in cubes of
# 64 beyond that, up to so many.
_FLAT, _CUBE = (1, 4, 8, 16, 32, 64, 128, 256), 64
_SLICES = {"v5e": _FLAT, "v6e": _FLAT, "v5p": (4, 8, 16, 32), "tpu7x": (1, 4, 8, 16, 32)}
_CUBES = {"v5p": 96, "tpu7x": 144}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one device of several needs, in bytes; speeds are limits that no program can pass.

    Attributes:
      kind: Of the devices.
      mesh: Sizes of its axes.
      spread: That over all devices, where one GPU of several is enough; None elsewhere.
      on_all: That with no device idle, where the default leaves some, {} if there is none; None
        elsewhere.
      context: Positions in the cache of each row.
      batch: Rows.
      expert_form: "packed" or "folded", as `load` takes it; None where it takes neither.
      weights: Bytes of weights on each device.
      cache: Of keys and values.
      workspace: Of what a step makes on the way: the larger of prefill's and decode's.
      decode_bytes: That one decode step reads on each device at a full context.
      prefill_flops: That a token of a prompt which fills the context costs on each device.
      least: Counts them for other sizes, in the form that takes the least memory unless one was
        named.
    """

    kind: Kind
    mesh: dict[str, int]
    spread: dict[str, int] | None
    on_all: dict[str, int] | None
    context: int
    batch: int
    expert_form: str | None
    weights: int
    cache: int
    workspace: int
    decode_bytes: float
    prefill_flops: float
    least: _Count

    @functools.cached_property
    def largest_context(self) -> int:
        """At this batch; 0: none fits."""
        most = self.least.config.max_context
        return _largest(MIN_SLOTS, most, lambda n: self.least.fits(n, self.batch))

    @functools.cached_property
    def largest_batch(self) -> int:
        """At this context; 0: none fits."""
        return _largest(1, MOST_ROWS, lambda n: self.least.fits(self.context, n))

    @property
    def margin(self) -> float:
        """What is left of the memory, negative where it does not fit."""
        return self.kind.memory_gib * GIB - self.weights - self.cache - self.workspace

    @property
    def fits(self) -> bool:
        """Whether it all fits."""
        return self.margin >= 0

    @property
    def decode_tokens_per_second(self) -> float:
        """Of all rows, if memory were read at its full bandwidth and nothing else took time."""
        return self.batch * self.kind.bandwidth_gb * 1e9 / self.decode_bytes

    @property
    def prefill_tokens_per_second(self) -> float:
        """If the matrix units were never idle."""
        return self.kind.tflops * 1e12 / self.prefill_flops


def parse_device(text: str) -> tuple[Kind, int]:
    """A kind of device and how many JAX devices there are, of a name such as "v5p-8" or "2xh100".

    Args:
      text: A key of `KINDS` or what the clouds call a slice (the number of v5p's and tpu7x's
        counts cores; `v5e-2x4` is its shape in chips), `2xh100` or `h100-2` for several, or the
        memory of a GPU: "16GB", "a100-40GB".

    Raises:
      ValueError: If it is none of these, or no slice of TPUs has that size.
    """
    name = re.sub("[_ ]", "-", text.strip().lower())
    # As nvidia-smi has it: "NVIDIA H100 80GB HBM3".
    name = re.sub(r"^nvidia-|-hbm\w*$", "", name)
    times, count, dims, in_cores, plain = 1, 1, (), False, False
    if several := re.fullmatch(r"(\d{1,6})x(.+)", name):
        times, name = int(several[1]), several[2]
    if sized := re.fullmatch(r"(?:(.+)-)?(\d{1,5}(?:\.\d+)?)-?g(?:i?b)?(?:-(\d{1,6}))?", name):
        count = int(sized[3] or 1)
        kind = _of_memory(text, sized[1], float(sized[2]))
    else:
        joined = name.replace("-", "")
        name = joined if joined in KINDS else name
        if plain := name in KINDS or name in _ALIASES:
            pass
        elif shape := re.fullmatch(r"(.+)-(\d{1,6}(?:x\d{1,6})+)", name):
            name, dims = shape[1], tuple(map(int, shape[2].split("x")))
            count = math.prod(dims)
        elif several := re.fullmatch(r"([a-z]+\d+[a-z]*?)x(\d{1,6})", name):
            name, count = several[1], int(several[2])
        elif several := re.fullmatch(r"(.+)-(\d{1,6})", name):
            name, count = several[1], int(several[2])
            in_cores = _ALIASES.get(name, name) in _NAMED_BY_CORES
        kind = KINDS.get(_ALIASES.get(name, name))
    if kind is None or not 0 < times * count <= _MOST:
        raise ValueError(
            f"the device must be one of {', '.join(KINDS)}, with a count up to {_MOST:,} such as "
            f"v6e-4 or 2xh100, or the memory of a GPU such as 16GB or a100-40GB; got {text!r}."
        )
    if kind.platform != "tpu":
        return kind, times * count
    chips = times * count / (2 if in_cores else 1)
    # By its plain name one chip is asked about, also of a kind that is only lent in fours.
    is_slice = _is_slice(kind, chips, dims) or (plain and times == 1)
    if not is_slice or min(times, count) > 1:
        raise ValueError(f"the device must be one {_slices(kind)}; got {text!r}.")
    return kind, int(chips) * kind.devices_per_chip


def _is_slice(kind: Kind, chips: float, dims: tuple[int, ...]) -> bool:
    """Of so many chips, in a shape if that is given: flat ones are squares or two of them."""
    most = _CUBES.get(kind.name, 0)
    flat = len(dims) == 2 and dims[0] <= dims[1] <= 2 * dims[0]
    if dims and not (len(dims) == 3 if most else flat):
        return False
    return chips in _SLICES[kind.name] or chips / _CUBE in range(1, most + 1)


def _slices(kind: Kind) -> str:
    """Those that exist of a kind, in what their names count."""
    in_cores = kind.name in _NAMED_BY_CORES
    times = 2 if in_cores else 1
    *sizes, last = (str(times * n) for n in _SLICES[kind.name])
    if most := times * _CUBE * _CUBES.get(kind.name, 0):
        sizes, last = [*sizes, last], f"a multiple of {times * _CUBE} up to {most:,}"
    unit = "cores, two to a chip" if in_cores else "chips"
    return f"{kind.name} slice of {', '.join(sizes)} or {last} {unit}"


def _of_memory(text: str, name: str | None, gib: float) -> Kind | None:
    """A GPU with so much memory, of a kind or of none; None if there is no such kind."""
    known = KINDS.get(_ALIASES.get(name, name).replace("-", "")) if name else None
    if not gib:
        raise ValueError(f"a GPU must have memory, got {text!r}.")
    if name and not known:
        return None
    if known and known.platform != "gpu":
        raise ValueError(
            f"a {known.name} has {known.memory_gib} GiB for each device; name it without memory, "
            f"got {text!r}."
        )
    size = f"{gib:g}GB"  # Cards are sold by the GiB.
    kind = Kind(f"{known.name}-{size}" if known else size, "gpu", POOL * gib, 0, 0)
    # One of another size has another bandwidth, too.
    close = known and abs(known.memory_gib / kind.memory_gib - 1) < 0.05
    return known if close else kind


def kind_of(device: jax.Device) -> Kind:
    """The kind of a device that is there; its memory is what JAX says that it can have of it."""
    known = (kind for kind in KINDS.values() if kind.jax_name == device.device_kind)
    if kind := next(known, None):
        return kind
    if jax.process_count() > 1:
        # One of another process tells nothing, and is like those of this one.
        device = jax.local_devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    return Kind(device.device_kind, device.platform, memory / GIB, 0, 0)


def plan(
    config: Config,
    kind: Kind,
    devices: int = 1,
    *,
    context: int = 8192,
    batch: int = 1,
    dtype=jnp.bfloat16,
    experts: str = "mxfp4",
    mesh: dict[str, int] | None = None,
    expert_form: str | None = None,
) -> Plan:
    """Counts what a model needs on each device.

    Folded experts take about twice the bytes of packed ones, and no decoding.

    Args:
      config: Sizes.
      kind: Of the devices.
      devices: How many there are.
      context: Positions in the cache of each row.
      batch: Rows.
      dtype: Of what is not MXFP4.
      experts: "mxfp4", or "dense" for those of a checkpoint that has them in bfloat16.
      mesh: Sizes of axes of `make_mesh`; None: those of `preset`, or one GPU if all of it fits.
      expert_form: On TPU, "packed" or "folded"; None: folded where a device has more rows than
        `Kind.packed_rows` and all of it fits so, else packed.

    Raises:
      ValueError: If a number is too small, or the mesh needs more devices than there are, or the
        experts cannot be in that form.
    """
    if min(context, batch, devices) < 1:
        raise ValueError(f"wanted at least 1 of each, got {context=}, {batch=}, {devices=}.")
    if context > config.max_context:
        raise ValueError(f"the model's context is {config.max_context:,} tokens, got {context:,}.")
    dtype = jnp.dtype(dtype)
    parts, spread, on_all = variables(config, dtype, experts), None, None
    count = _Count(config, kind, dtype, parts, abstract_mesh({}), expert_form or "packed")
    if mesh is None:
        mesh = preset(parts.values(), devices)
        if math.prod(mesh.values()) < devices:
            on_all = preset_of_all(parts.values(), devices)
        # One row is faster without sums over GPUs.
        if kind.platform == "gpu" and spelled(mesh) != "none" and count.fits(context, batch):
            mesh, spread = {}, mesh
    if math.prod(mesh.values()) > devices:
        raise ValueError(
            f"the mesh {spelled(mesh)} needs {math.prod(mesh.values())} devices, not {devices}."
        )
    on = abstract_mesh(mesh)
    in_words = experts == "mxfp4" and kind.platform == "tpu" and can_use_words(config, on)
    if expert_form is not None and not (in_words and expert_form in EXPERT_FORMS):
        raise ValueError(
            f"expert_form is {' or '.join(EXPERT_FORMS)}, of MXFP4 experts on TPU that are whole "
            f"on their device; got {expert_form!r} for {kind.name} and the mesh {spelled(mesh)}."
        )
    count = least = dataclasses.replace(count, mesh=on)
    if in_words and expert_form is None and count.rows(batch) > kind.packed_rows:
        folded = dataclasses.replace(count, expert_form="folded")
        count = folded if folded.fits(context, batch) else count
    return Plan(
        kind=kind,
        mesh=dict(on.shape),
        spread=spread,
        on_all=on_all,
        context=context,
        batch=batch,
        expert_form=count.expert_form if in_words else None,
        weights=count.weights,
        cache=count.cache(context, batch),
        workspace=count.workspace(context, batch),
        decode_bytes=count.decode_bytes(context, batch),
        prefill_flops=count.prefill_flops(context),
        least=least,
    )


@functools.cache
def variables(config: Config, dtype, experts: str) -> dict[tuple, nnx.Variable]:
    """Shapes and axes of a model's variables, by their paths, as checkpoints have them."""
    model = nnx.eval_shape(
        lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=dtype, experts=experts)
    )
    return dict(nnx.to_flat_state(nnx.state(model)))


@functools.cache
def _in_form(expert_form: str, shape: tuple[int, ...]) -> MXArray:
    """Shapes of what becomes of blocks of this shape."""
    blocks, scales = (jax.ShapeDtypeStruct(x, jnp.uint8) for x in (shape, shape[:-1]))
    return jax.eval_shape(EXPERT_FORMS[expert_form], MXArray(blocks, scales))


@functools.cache
def _cache(config: Config, rows: int, slots: int, dtype) -> list[jax.ShapeDtypeStruct]:
    """Shapes of what a cache consists of."""
    return jax.tree.leaves(jax.eval_shape(lambda: init_cache(config, rows, slots, dtype)))


def _largest(least: int, most: int, fits: Callable[[int], bool]) -> int:
    """The largest size that fits, of those that `generate` rounds to; 0 if none does."""
    sizes = itertools.takewhile(lambda n: n < 2 * most, (least << i for i in itertools.count()))
    fitting = [min(n, most) for n in sizes if fits(min(n, most))]
    return max(fitting, default=0)


@dataclasses.dataclass(frozen=True)
class _Count:
    """Bytes of each part of a model on one device of a mesh."""

    config: Config
    kind: Kind
    dtype: jnp.dtype
    variables: dict
    mesh: AbstractMesh
    expert_form: str

    def fits(self, context: int, batch: int) -> bool:
        needed = self.weights + self.cache(context, batch) + self.workspace(context, batch)
        return needed <= self.kind.memory_gib * GIB

    def rows(self, batch: int) -> int:
        return math.ceil(batch * self._part("batch", bucket(batch)) / bucket(batch))

    @functools.cached_property
    def weights(self) -> int:
        return sum(self._at_rest.values())

    @functools.cached_property
    def _at_rest(self) -> dict[tuple, int]:
        return self._weights(in_use=False)

    @functools.cached_property
    def _in_use(self) -> dict[tuple, int]:
        return self._weights(in_use=True)

    def _shard(self, axes: tuple[str | None, ...], shape: tuple[int, ...], *, in_use: bool):
        return named_sharding(self.mesh, axes, shape, in_use=in_use).shard_shape(shape)

    def _part(self, axis: str, size: int) -> int:
        """How many of the `size` along a logical axis are on one device."""
        return self._shard((axis,), (size,), in_use=False)[0]

    def _weights(self, *, in_use: bool) -> dict[tuple, int]:
        found = {}
        for path, x in self.variables.items():
            found[path] = math.prod(self._shard(x.axes, x.shape, in_use=in_use)) * x.dtype.itemsize
        if self.kind.platform != "tpu":
            return found
        for path, blocks in self.variables.items():
            # Kernels for TPU have words, a little larger, or folded ones.
            if path[-1] == "blocks" and can_use_words(self.config, self.mesh):
                words = _in_form(self.expert_form, blocks.shape)
                for name in ("blocks", "scales", "factors"):
                    if (x := getattr(words, name)) is not None:
                        axes = ("experts", None, None, None)[: x.ndim]
                        shape = self._shard(axes, x.shape, in_use=in_use)
                        found[*path[:-1], name] = math.prod(shape) * x.dtype.itemsize
        return found

    def cache(self, context: int, batch: int) -> int:
        """Of the rows and slots that `generate` makes of them."""
        rows, slots = bucket(batch), bucket(context - 1, MIN_SLOTS)
        total = 0
        for x in _cache(self.config, rows, slots, self.dtype):
            where = cache_sharding(self.mesh, x, self.config.num_key_value_heads)
            total += math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize
        return total

    def workspace(self, context: int, batch: int) -> int:
        """Of prefill, whose rows go through the experts sorted, or of a cache that grows.

        While it does, the smaller one is still there; beside either, the layer that is gathered.
        """
        c, b = self.config, self.dtype.itemsize
        rows = self._part("batch", bucket(batch))
        memory = self.kind.memory_gib * GIB
        chunk = max(prompt_calls(context, bucket(batch), self.kind.platform, memory))
        tokens = rows * self._part("tokens", chunk)
        D, F, X = c.hidden_size, c.intermediate_size, c.experts_per_token
        experts = math.ceil(c.num_experts / self.mesh.shape["expert"])
        tile = min(256, max(16, 1 << (max(1, -(-tokens * X // c.num_experts)) - 1).bit_length()))
        sorted_rows = tokens * X + experts * tile
        mlp = sorted_rows * (2 * D + F) * b + tokens * X * D * 4
        step = max(mlp + rows * c.vocab_size * 4 * 2, self.cache(context // 2, batch))
        return step + self._gathered

    @functools.cached_property
    def _gathered(self) -> int:
        """What the largest layer takes more where it is used than where it rests."""
        found = collections.Counter()
        for of, sign in ((self._in_use, 1), (self._at_rest, -1)):
            for path, size in of.items():
                found[path[:2]] += sign * size
        return max(found.values())

    def decode_bytes(self, context: int, batch: int) -> float:
        """Weights once, chosen experts only, and every row's cache."""
        experts = cost.expected_experts(self.config, self.rows(batch))
        weights = cost.weight_bytes(self.config, self._in_use, experts)
        return weights + self.cache(context, batch)

    def prefill_flops(self, context: int) -> float:
        """Of the mean token of a prompt that fills the context; only its last one has logits."""
        shapes = {
            path: self._shard(x.axes, x.shape, in_use=True) for path, x in self.variables.items()
        }
        heads = self.config.num_key_value_heads
        here = self._part("kv_heads", heads) / heads
        pairs = cost.visible_pairs(self.config, 0, context) / context * here
        weights = cost.weight_flops(self.config, shapes, logits=1 / context)
        tokens = self._part("tokens", _CHUNK) / _CHUNK
        return (weights + cost.attention_flops(self.config, pairs)) * tokens
