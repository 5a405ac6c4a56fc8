"""Attention with sinks on TPU, through Pallas' Mosaic: prefill and decode, any kind of cache.

Key heads go together until they fill the 128 lanes of a register; a query has zeros where the other
heads of its group are, so that one product gives the scores of all of them, and its values lie in
lanes of their own. Softmax runs along the keys; it starts from the sink, whose weight is one and
whose value is zero. What it keeps of a query, the largest score and the sum of weights, fills whole
registers: nothing has to be spread over lanes, and only the end adds them up. Which blocks of keys
a block of queries has to see at all follows from the positions alone: the others are neither copied
nor computed.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gpt_oss_jax.kernels.attention import xla
from gpt_oss_jax.kernels.attention.tpu_tiles import LANES, of_step
from gpt_oss_jax.kernels.target import device_kind

_VMEM = 48 << 20
_HIDDEN = -1e30  # A score so low that its weight is zero beside any sink.


def attention(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_KG: jax.Array,
    *,
    q_pos_BT: jax.Array,
    k_pos_BS: jax.Array,
    window: int | None,
) -> jax.Array:
    """See `api.attention`.

    Raises:
      NotImplementedError: On other devices.
    """
    if not device_kind().startswith("TPU"):
        raise NotImplementedError(f"needs a TPU, this is {device_kind()}")
    return _differentiable(q_BTKGH, k_BSKH, v_BSKH, sinks_KG, q_pos_BT, k_pos_BS, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _differentiable(q_BTKGH, k_BSKH, v_BSKH, sinks_KG, q_pos_BT, k_pos_BS, window):
    return _attend(q_BTKGH, k_BSKH, v_BSKH, sinks_KG, q_pos_BT, k_pos_BS, window)


def _forward(q, k, v, sinks, q_pos, k_pos, window):
    kept = (q, k, v, sinks, q_pos, k_pos)
    return _differentiable(*kept, window), kept


def _backward(window, kept, dout):
    *floats, q_pos, k_pos = kept
    where = {"q_pos_BT": q_pos, "k_pos_BS": k_pos, "window": window}
    _, pull = jax.vjp(lambda *floats: xla.attention(*floats, **where), *floats)
    return *pull(dout), *(np.zeros(pos.shape, jax.dtypes.float0) for pos in (q_pos, k_pos))


_differentiable.defvjp(_forward, _backward)


def _attend(q_BTKGH, k_BSKH, v_BSKH, sinks_KG, q_pos_BT, k_pos_BS, window):
    B, T, K, G, H = q_BTKGH.shape
    S = k_BSKH.shape[1]
    heads = LANES // H if LANES % H == 0 and K % (LANES // H) == 0 else K  # Of a group.
    groups, lanes, rows = K // heads, heads * H, heads * G
    block, together = of_step(device_kind(), T, S, groups, window)
    queries, keys = block.queries, block.keys
    at_a_time = max(n for n in range(1, rows + 1) if rows % n == 0 and n * queries <= block.rows)
    q_BTKGH = _padded(q_BTKGH, queries, 0)
    q_pos_BT = _padded(q_pos_BT, queries, -1)
    k_BSL, v_BSL = (_padded(x.reshape(B, S, K * H), keys, 0) for x in (k_BSKH, v_BSKH))
    k_pos_BS = _padded(k_pos_BS, keys, -1)

    # [B, group, block of queries, (head, G, query), (head, H)], zero but where both heads agree.
    blocks = q_BTKGH.shape[1] // queries
    q = q_BTKGH.reshape(B, blocks, queries, groups, heads, G, H).transpose(0, 3, 1, 4, 5, 2, 6)
    own = jnp.eye(heads, dtype=q.dtype)[:, None, None, :, None]
    q = (q[..., None, :] * own).reshape(B, groups, blocks, rows * queries, lanes)
    sinks = sinks_KG.astype(jnp.float32).reshape(groups, rows, 1)

    steps_BQs, count_BQ = _steps(q_pos_BT, k_pos_BS, queries, keys, window)
    num_steps = k_pos_BS.shape[1] // keys
    flat = steps_BQs.reshape(-1)

    def key_block(b, g, i, j, steps, count):
        del count
        return steps[(b * blocks + i) * num_steps + j]

    of_queries = pl.BlockSpec(
        (1, together, 1, *q.shape[3:]), lambda b, g, i, j, *s: (b, g, i, 0, 0)
    )
    of_keys = pl.BlockSpec(
        (1, keys, together * lanes), lambda b, g, i, j, *s: (b, key_block(b, g, i, j, *s), g)
    )
    kept = pltpu.VMEM((together, rows * queries, LANES), jnp.float32)
    out = pl.pallas_call(
        functools.partial(
            _body, blocks=blocks, at_a_time=at_a_time * queries, window=window, scale=H**-0.5
        ),
        name=f"attention_{'full' if window is None else 'window'}",
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            # No more steps than somebody needs: one that finds nothing to do takes time, too.
            grid=(B, groups // together, blocks, jnp.maximum(count_BQ.max(), 1)),
            in_specs=[
                of_queries,
                of_keys,
                of_keys,
                pl.BlockSpec((together, rows, 1), lambda b, g, i, j, *s: (g, 0, 0)),
                pl.BlockSpec((1, queries, 1), lambda b, g, i, j, *s: (b, i, 0)),
                pl.BlockSpec(
                    (1, 1, keys), lambda b, g, i, j, *s: (b, 0, key_block(b, g, i, j, *s))
                ),
            ],
            out_specs=of_queries,
            scratch_shapes=[
                kept,
                kept,
                pltpu.VMEM((together, rows * queries, lanes), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=_VMEM,
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        ),
    )(flat, count_BQ.reshape(-1), q, k_BSL, v_BSL, sinks, q_pos_BT[..., None], k_pos_BS[:, None])

    out = out.reshape(B, groups, blocks, heads, G, queries, heads, H)
    # A query's own head, of those whose values it was multiplied with.
    out = jnp.stack([out[:, :, :, p, :, :, p] for p in range(heads)], axis=3)
    out = out.transpose(0, 2, 5, 1, 3, 4, 6).reshape(B, blocks * queries, K, G, H)
    return out[:, :T]


def _body(
    steps,
    counts,
    q,
    k,
    v,
    sinks,
    q_pos,
    k_pos,
    out,
    largest,
    total,
    values,
    *,
    blocks,
    at_a_time,
    window,
    scale,
):
    del steps
    step = pl.program_id(3)
    (together, rows, _), queries, keys = sinks.shape, q_pos.shape[1], k_pos.shape[2]
    lanes = values.shape[2]
    # Scores are powers of two: so exponents need one product less.
    base_2 = math.log2(math.e)

    @pl.when(step == 0)
    def _():
        for g in range(together):
            sink = jnp.broadcast_to(base_2 * sinks[g], (rows, LANES))
            if queries > 1:
                sink = jnp.broadcast_to(sink[:, None], (rows, queries, LANES))
            largest[g] = sink.reshape(largest.shape[1:])
        # A weight of one, in the first lane: those of a query are not yet added up.
        first = jax.lax.broadcasted_iota(jnp.int32, total.shape, 2) == 0
        total[...] = first.astype(jnp.float32)
        values[...] = jnp.zeros_like(values)

    @pl.when(step < counts[pl.program_id(0) * blocks + pl.program_id(2)])
    def _():
        distance = q_pos[0] - k_pos[0]
        visible = (k_pos[0] >= 0) & (distance >= 0)
        if window is not None:
            visible &= distance < window
        if queries > 1:
            heads = at_a_time // queries
            visible = jnp.broadcast_to(visible[None], (heads, queries, keys))
            visible = visible.reshape(at_a_time, keys)
        for g, start in itertools.product(range(together), range(0, rows * queries, at_a_time)):
            own, of_group = pl.ds(start, at_a_time), pl.ds(g * lanes, lanes)
            scores = base_2 * scale * _dot(q[0, g, 0, own], k[0, :, of_group], ((1,), (1,)))
            scores = jnp.where(visible, scores, _HIDDEN)
            before = largest[g, own]
            now = jnp.maximum(before, scores.max(axis=1, keepdims=True))
            weights = jnp.exp2(scores - _columns(now, keys))
            kept = jnp.exp2(before - now)
            largest[g, own] = now
            total[g, own] = kept * total[g, own] + sum(
                weights[:, i : i + LANES] for i in range(0, keys, LANES)
            )
            values[g, own] = _columns(kept, lanes) * values[g, own] + _dot(
                weights.astype(v.dtype), v[0, :, of_group], ((1,), (0,))
            )

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        out[0, :, 0] = (values[...] / total[...].sum(axis=2, keepdims=True)).astype(out.dtype)


def _steps(q_pos_BT, k_pos_BS, queries, keys, window):
    """Which blocks of keys a block of queries sees, those first, and how many they are.

    Past the last of them it is repeated: a block that is already there is not copied again.
    """
    B = q_pos_BT.shape[0]
    nothing = np.iinfo(np.int32).max
    q_BQt, k_BJs = q_pos_BT.reshape(B, -1, queries), k_pos_BS.reshape(B, -1, keys)
    last_q = q_BQt.max(axis=2)[:, :, None]
    first_q = jnp.where(q_BQt < 0, nothing, q_BQt).min(axis=2)[:, :, None]
    first_k = jnp.where(k_BJs < 0, nothing, k_BJs).min(axis=2)[:, None]
    seen_BQJ = first_k <= last_q
    if window is not None:
        seen_BQJ &= first_q - k_BJs.max(axis=2)[:, None] < window
    count_BQ = seen_BQJ.sum(axis=2, dtype=jnp.int32)
    order = jnp.argsort(~seen_BQJ, axis=2, stable=True).astype(jnp.int32)
    step = jnp.minimum(jnp.arange(order.shape[2]), jnp.maximum(count_BQ - 1, 0)[..., None])
    return jnp.take_along_axis(order, step, axis=2), count_BQ


def _dot(a, b, contracted):
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (contracted, ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def _columns(alike, number):
    """As many of 128 columns that are all alike."""
    return jnp.tile(alike, (1, math.ceil(number / LANES)))[:, :number]


def _padded(x, multiple, value):
    """Fills axis 1 up to a multiple."""
    padding = [(0, -x.shape[1] % multiple) if i == 1 else (0, 0) for i in range(x.ndim)]
    return jnp.pad(x, padding, constant_values=value) if padding[1][1] else x
