"""Operations on the parts that a device has of their arguments: no compiler can split a kernel."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from gpt_oss_jax.kernels.attention import xla
from gpt_oss_jax.kernels.expert_matmul.weights import ExpertWeights
from gpt_oss_jax.quant import MXArray
from gpt_oss_jax.sharding import named_sharding

_UP = ("experts", "expert_width", None, "embed", None)
_DOWN = ("experts", "embed", "expert_width_blocks", None)
_DENSE_DOWN = ("experts", "embed", "expert_width")
_WORDS = ("experts", None, None, None)
_ROWS = ("batch", "tokens")


def attention(mesh: Mesh, kernel: Callable[..., jax.Array], q, k, v, sinks, q_pos, k_pos):
    """Attention with rows, queries and heads split; every device has all keys of its own.

    Where queries are split and keys are, too, these are gathered: 4 K H bytes a key in bfloat16.
    """
    specs = _attention_specs(mesh, q, k, sinks, q_pos, k_pos, queries="tokens", keys=None)
    run = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return run(q, k, v, sinks, q_pos, k_pos)


def on_all(mesh: Mesh, kernel: Callable) -> Callable:
    """A kernel that every device runs, on whole arguments."""
    whole = PartitionSpec()
    return jax.shard_map(kernel, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)


def by_rows(mesh: Mesh, kernel: Callable, x: jax.Array):
    """A kernel that every device runs on its own rows; whatever it returns has rows as well."""
    of_rows = named_sharding(mesh, (*_ROWS[: x.ndim - 1], None), x.shape).spec
    return jax.shard_map(kernel, mesh=mesh, in_specs=of_rows, out_specs=of_rows, check_vma=False)(x)


def rows_are_whole(mesh: Mesh) -> bool:
    """Whether all devices have all rows, tokens and slots, and weights where they are used."""
    return not any(named_sharding(mesh, ("batch", "tokens", "slots", "embed")).spec)


def by_heads(mesh: Mesh, attend: Callable, weights, kept, x_BTD: jax.Array, shared):
    """A layer's attention in which every device has its own heads, where `rows_are_whole`.

    Args:
      mesh: Devices.
      attend: Of weights, keys and values, rows and `shared`, and the names of the mesh axes to sum
        over what heads give; returns rows, which are whole, and new keys and values.
      weights: Of the layer, with names of their axes.
      kept: Keys and values [B, S, L] of the cache, heads side by side.
      x_BTD: Rows.
      shared: What else it needs, whole.

    Returns:
      What `attend` does.
    """
    is_weight = lambda x: hasattr(x, "axes")
    spec = lambda x: named_sharding(mesh, x.axes, x.shape, in_use=True).spec
    of_weights = jax.tree.map(spec, weights, is_leaf=is_weight)
    heads = next(
        axis
        for x in jax.tree.leaves(weights, is_leaf=is_weight)
        for name, axis in zip(x.axes, spec(x), strict=True)
        if name == "kv_heads"
    )
    whole, of_kept = PartitionSpec(), PartitionSpec(None, None, heads)
    attend = functools.partial(attend, over=_names(heads))
    run = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(of_weights, of_kept, whole, whole),
        out_specs=(whole, of_kept, of_kept),
        check_vma=False,
    )
    return run(weights, kept, x_BTD, shared)


def own_heads(mesh: Mesh | None, kv_heads: int) -> int:
    """How many of so many key heads a device has."""
    if mesh is None:
        return kv_heads
    return named_sharding(mesh, ("kv_heads",), (kv_heads,)).shard_shape((kv_heads,))[0]


def write(mesh: Mesh, heads: int, stored_BSL, slots_BT, new_BTL) -> jax.Array:
    """`xla.write`, with so many heads side by side; where slots are split, each device its own.

    XLA writes a single slot as a slice, for which it would gather all of them.
    """
    # Where heads do not fill the lanes of a TPU, XLA turns a cache around to write and to read it:
    # those of all layers at the start, where it may, and keeps them.
    stored_BSL, new_BTL = lax.optimization_barrier((stored_BSL, new_BTL))
    spec = lambda x, keys: (
        named_sharding(mesh, ("batch", keys, "kv_heads"), (*x.shape[:2], heads)).spec
    )
    of_stored, of_new = spec(stored_BSL, "slots"), spec(new_BTL, None)
    split = _names(of_stored[1])
    if not split:
        return xla.write(stored_BSL, slots_BT, new_BTL)

    def local(stored, slots, new):
        own = stored.shape[1]
        slots -= lax.axis_index(split) * own
        return xla.write(stored, jnp.where(slots < 0, own, slots), new)

    of_slots = named_sharding(mesh, ("batch", None), slots_BT.shape).spec
    specs = of_stored, of_slots, of_new
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=of_stored, check_vma=False)
    return run(stored_BSL, slots_BT, new_BTL)


def moves_queries(mesh: Mesh, q: jax.Array, k: jax.Array) -> bool:
    """Whether keys are split, and queries and what comes of them are fewer bytes to be moved.

    In bfloat16 that is 10 G K H bytes a query: it is gathered, and its float32 result summed, which
    moves it twice. It holds for a decode step, and for part of a prompt after a long one.
    """
    slots = named_sharding(mesh, ("slots",), k.shape[1:2]).spec[0]
    return slots is not None and 2 * k.nbytes > q.nbytes + 8 * q.size


def attention_to_parts(
    mesh: Mesh, to_some: Callable[..., jax.Array], q, k, v, sinks, q_pos, k_pos
) -> jax.Array:
    """Attention with rows, keys and heads split: every query goes to all keys, which stay.

    Devices agree on the largest score, the sink included, and sum what is relative to it; the sink
    is counted once, after that.
    """
    specs = _attention_specs(mesh, q, k, sinks, q_pos, k_pos, queries=None, keys="slots")
    slots = _names(specs[1][1])

    def local(q, k, v, sinks, q_pos, k_pos):
        out, own, total = jnp.split(
            to_some(q, k, v, q_pos_BT=q_pos, k_pos_BS=k_pos), (q.shape[-1], q.shape[-1] + 1), -1
        )
        sinks = sinks.astype(jnp.float32)[..., None]
        largest = lax.stop_gradient(jnp.maximum(lax.pmax(own, slots), sinks))
        share = jnp.exp(own - largest)
        out, total = lax.psum((out * share, total * share), slots)
        return (out / (total + jnp.exp(sinks - largest))).astype(q.dtype)

    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    axes = ("batch", "tokens", "kv_heads", "heads", "head_dim")
    where = named_sharding(mesh, axes, q.shape, in_use=True)
    return lax.with_sharding_constraint(run(q, k, v, sinks, q_pos, k_pos), where)


def _attention_specs(mesh: Mesh, q, k, sinks, q_pos, k_pos, *, queries, keys):
    spec = lambda x, *axes: named_sharding(mesh, axes, x.shape, in_use=True).spec
    of_keys = spec(k, "batch", keys, "kv_heads", "head_dim")
    return (
        spec(q, "batch", queries, "kv_heads", "heads", "head_dim"),
        of_keys,
        of_keys,
        spec(sinks, "kv_heads", "heads"),
        spec(q_pos, "batch", queries),
        spec(k_pos, "batch", keys),
    )


def expert_mlp(mesh: Mesh, kernel: Callable[..., jax.Array], x_MD, experts_MX, weights_MX, w):
    """The expert layer with experts split: each device adds what its own give, then all are summed.

    Rows go nowhere: a device has all of those that its part of the batch has. docs/meshes.md counts
    what that moves, and what sending them to their experts would.
    """
    specs = _specs(mesh, w)
    of_rows = named_sharding(mesh, (*_ROWS[: x_MD.ndim - 1], None), x_MD.shape).spec
    experts, width = (_names(specs.up_bias[i]) for i in (0, 1))
    own = w.up.shape[0] // math.prod(mesh.shape[name] for name in experts)

    def local(x_MD, experts_MX, weights_MX, w):
        first = lax.axis_index(experts) * own if experts else 0
        is_own = (experts_MX >= first) & (experts_MX < first + own)
        experts_MX = jnp.where(is_own, experts_MX - first, own)
        if width:
            # Each part of the width would add it.
            is_first = lax.axis_index(width) == 0
            w = dataclasses.replace(w, down_bias=jnp.where(is_first, w.down_bias, 0))
        w = dataclasses.replace(w, up=_of_fewer(w.up, own), down=_of_fewer(w.down, own))
        y_MD = kernel(x_MD, experts_MX, weights_MX, w)
        return lax.psum(y_MD, (*experts, *width)) if experts or width else y_MD

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(of_rows, of_rows, of_rows, specs),
        out_specs=of_rows,
        check_vma=False,
    )
    return run(x_MD, experts_MX, weights_MX, w)


def _specs(mesh: Mesh, w: ExpertWeights) -> ExpertWeights:
    def spec(x, axes):
        return named_sharding(mesh, axes[: x.ndim], x.shape, in_use=True).spec

    def matrix(m, axes):
        if not isinstance(m, MXArray):
            return spec(m, axes)
        axes = axes if m.words_of is None else _WORDS
        factors = None if m.factors is None else spec(m.factors, axes)
        return dataclasses.replace(
            m, blocks=spec(m.blocks, axes), scales=spec(m.scales, axes), factors=factors
        )

    up_bias = spec(w.up_bias, _UP)
    if isinstance(w.up, MXArray) and w.up.words_of is not None:
        up_bias = PartitionSpec(up_bias[0], None, None)
    down = _DOWN if isinstance(w.down, MXArray) else _DENSE_DOWN
    return ExpertWeights(matrix(w.up, _UP), up_bias, matrix(w.down, down), spec(w.down_bias, down))


def _of_fewer(m: MXArray | jax.Array, experts: int) -> MXArray | jax.Array:
    """Words that know of how many experts they are."""
    if not isinstance(m, MXArray) or m.words_of is None:
        return m
    return dataclasses.replace(m, words_of=(experts, *m.words_of[1:]))


def _names(entry) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)
