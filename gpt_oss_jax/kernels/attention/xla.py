"""Attention with sinks in plain XLA: works everywhere, differentiable, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gpt_oss_jax.kernels.blocks import map_blocks
from gpt_oss_jax.kernels.contract import einsum

_SCORE_BYTES = 1 << 27  # Most that one block of scores may take.


def write(stored: jax.Array, slots_BT: jax.Array, new: jax.Array) -> jax.Array:
    """Writes [B, T, ...] into [B, S, ...] at the slots; slots out of range write nothing."""
    rows_B1 = jnp.arange(stored.shape[0])[:, None]
    return stored.at[rows_B1, slots_BT].set(new.astype(stored.dtype), mode="drop")


def write_some(stored: jax.Array, slots_BT: jax.Array, new: jax.Array) -> jax.Array:
    """`write` of [B, T, L], into fewer slots than there are tokens: each slot looks for its own.

    Of a scatter, a GPU takes as long for what is written nowhere as for the rest.
    """
    (B, T), S = slots_BT.shape, stored.shape[1]
    tokens_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    own_BS = write(jnp.full((B, S), -1, jnp.int32), slots_BT, tokens_BT)[..., None]
    found = jnp.take_along_axis(new, jnp.maximum(own_BS, 0), axis=1)
    return jnp.where(own_BS < 0, stored, found.astype(stored.dtype))


def scores(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    *,
    q_pos_BT: jax.Array,
    k_pos_BS: jax.Array,
    window: int | None,
) -> jax.Array:
    """Scaled scores, float32 [B, K, G, T, S], -inf where a key is not visible."""
    scores_BKGTS = einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH) * q_BTKGH.shape[-1] ** -0.5
    distance_BTS = q_pos_BT[:, :, None] - k_pos_BS[:, None, :]
    visible_BTS = (k_pos_BS[:, None, :] >= 0) & (distance_BTS >= 0)
    if window is not None:
        visible_BTS &= distance_BTS < window
    return jnp.where(visible_BTS[:, None, None], scores_BKGTS, -jnp.inf)


def _attend(q_BTKGH, k_BSKH, v_BSKH, sinks_KG, q_pos_BT, k_pos_BS, window):
    scores_BKGTS = scores(q_BTKGH, k_BSKH, q_pos_BT=q_pos_BT, k_pos_BS=k_pos_BS, window=window)
    sinks_KG11 = sinks_KG.astype(jnp.float32)[:, :, None, None]
    largest = jnp.maximum(jnp.max(scores_BKGTS, axis=-1, keepdims=True), sinks_KG11)
    largest = jax.lax.stop_gradient(largest)
    weights_BKGTS = jnp.exp(scores_BKGTS - largest)
    total_BKGT1 = weights_BKGTS.sum(axis=-1, keepdims=True) + jnp.exp(sinks_KG11 - largest)
    weights_BKGTS = (weights_BKGTS / total_BKGT1).astype(v_BSKH.dtype)
    return einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH).astype(q_BTKGH.dtype)


def _attend_partly(q_BTKGH, k_BSKH, v_BSKH, q_pos_BT, k_pos_BS, window):
    scores_BKGTS = scores(q_BTKGH, k_BSKH, q_pos_BT=q_pos_BT, k_pos_BS=k_pos_BS, window=window)
    # Finite where nothing is visible, so that no difference of infinities arises.
    lowest = jnp.finfo(jnp.float32).min
    largest = jnp.max(scores_BKGTS, axis=-1, keepdims=True, initial=lowest)
    largest = jax.lax.stop_gradient(largest)
    weights_BKGTS = jnp.exp(scores_BKGTS - largest)
    total_BKGT1 = weights_BKGTS.sum(axis=-1, keepdims=True)
    out_BTKGH = einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    of_queries = (jnp.moveaxis(x, 3, 1) for x in (largest, total_BKGT1))
    return jnp.concatenate([out_BTKGH, *of_queries], axis=-1)


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
    """See `api.attention`. Goes over blocks of queries, whose scores take 128 MiB.

    More only where those of a single query of every row do.
    """

    def one(q, q_pos):
        return _attend(q, k_BSKH, v_BSKH, sinks_KG, q_pos, k_pos_BS, window)

    return _over_queries(one, q_BTKGH, q_pos_BT, k_BSKH.shape[1])


def attention_to_some(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_pos_BT: jax.Array,
    k_pos_BS: jax.Array,
    window: int | None,
) -> jax.Array:
    """What some of the keys give to attention, the sink not among them, before the division.

    Returns:
      float32 [B, T, K, G, H + 2]: values weighted by exponentials of scores under the largest, then
      the largest score, the lowest float32 if no key is visible, then the sum of the exponentials.
    """

    def one(q, q_pos):
        return _attend_partly(q, k_BSKH, v_BSKH, q_pos, k_pos_BS, window)

    return _over_queries(one, q_BTKGH, q_pos_BT, k_BSKH.shape[1])


def _over_queries(function, q_BTKGH, q_pos_BT, slots: int) -> jax.Array:
    """Calls the function of queries and their positions for blocks of them."""
    B, T, K, G, _ = q_BTKGH.shape
    row_bytes = B * K * G * slots * 4
    block = max(1, _SCORE_BYTES // row_bytes)
    if block >= T:
        return function(q_BTKGH, q_pos_BT)
    block = 1 << (block.bit_length() - 1)

    def blocks(x, fill):
        padding = [(0, 0)] * x.ndim
        padding[1] = (0, -T % block)
        x = jnp.pad(x, padding, constant_values=fill)
        return jnp.moveaxis(x.reshape(B, -1, block, *x.shape[2:]), 1, 0)

    # Recomputed in the backward pass: kept, the weights of all blocks would be the whole matrix.
    one = jax.checkpoint(lambda args: function(*args))
    out = map_blocks(one, (blocks(q_BTKGH, 0), blocks(q_pos_BT, -1)), after=q_BTKGH)
    return jnp.moveaxis(out, 0, 1).reshape(B, -1, *out.shape[3:])[:, :T]


def store_and_attend(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    k_BSL: jax.Array,
    v_BSL: jax.Array,
    sinks_KG: jax.Array,
    *,
    slots_BT: jax.Array,
    write: Callable[..., jax.Array] = write,
    attend: Callable[..., jax.Array] = attention,
    **where,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.store_and_attend`; `write` is what writes, `attend` what attends, with `where`."""
    B, T, K, H = k_BTKH.shape
    k_BSL = write(k_BSL, slots_BT, k_BTKH.reshape(B, T, K * H))
    v_BSL = write(v_BSL, slots_BT, v_BTKH.reshape(B, T, K * H))
    k_BSKH, v_BSKH = (x.reshape(B, -1, K, H) for x in (k_BSL, v_BSL))
    return attend(q_BTKGH, k_BSKH, v_BSKH, sinks_KG, **where), k_BSL, v_BSL
