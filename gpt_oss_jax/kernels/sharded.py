"""Operations on the parts that a device has of their arguments: no compiler can split a kernel."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from gpt_oss_jax.kernels.expert_matmul.weights import ExpertWeights
from gpt_oss_jax.quant import MXArray
from gpt_oss_jax.sharding import named_sharding

_UP = ("experts", "expert_width", None, "embed", None)
_DOWN = ("experts", "embed", "expert_width_blocks", None)
_DENSE_DOWN = ("experts", "embed", "expert_width")
_WORDS = ("experts", None, None, None)


def attention(mesh: Mesh, kernel: Callable[..., jax.Array], q, k, v, sinks, q_pos, k_pos):
    """Attention with rows and heads split; every device has all keys of its own."""
    spec = lambda x, *axes: named_sharding(mesh, axes[: x.ndim], x.shape, in_use=True).spec
    of_keys = spec(k, "batch", None, "kv_heads", "head_dim")
    of_queries = spec(q, "batch", None, "kv_heads", "heads", "head_dim")
    specs = (
        of_queries,
        of_keys,
        of_keys,
        spec(sinks, "kv_heads", "heads"),
        spec(q_pos, "batch", None),
        spec(k_pos, "batch", None),
    )
    run = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=of_queries, check_vma=False)
    return run(q, k, v, sinks, q_pos, k_pos)


def expert_mlp(mesh: Mesh, kernel: Callable[..., jax.Array], x_MD, experts_MX, weights_MX, w):
    """The expert layer with experts split: each device adds what its own give, then all are summed.

    Rows go nowhere. A device has all of those that its part of the batch has, and a sum over the
    devices moves fewer bytes than sending rows to their experts and back while a row is sent to
    about as many devices as there are.
    """
    specs = _specs(mesh, w)
    of_rows = named_sharding(mesh, ("batch", None), x_MD.shape).spec
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
        return MXArray(spec(m.blocks, axes), spec(m.scales, axes), m.words_of)

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
