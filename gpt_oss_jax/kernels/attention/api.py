"""Attention with a learned sink per head: the signature and the choice of implementation."""

from __future__ import annotations

import contextlib
import functools

import jax
from jax.sharding import Mesh

from gpt_oss_jax.kernels import sharded
from gpt_oss_jax.kernels.attention import mosaic_gpu, mosaic_tpu, xla
from gpt_oss_jax.kernels.attention.few_queries import room_of
from gpt_oss_jax.kernels.dispatch import dispatch, say_once
from gpt_oss_jax.kernels.launch import check_room
from gpt_oss_jax.kernels.target import platform

IMPLEMENTATIONS = {
    "mosaic_gpu": mosaic_gpu.attention,
    "mosaic_tpu": mosaic_tpu.attention,
    "xla": xla.attention,
}


def store_and_attend(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    k_BSL: jax.Array,
    v_BSL: jax.Array,
    sinks_KG: jax.Array,
    *,
    slots_BT: jax.Array,
    q_pos_BT: jax.Array,
    k_pos_BS: jax.Array,
    window: int | None,
    implementation: str | None = None,
    mesh: Mesh | None = None,
    room: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes keys and values into the cache, and attends to all of it: `attention` with a cache.

    On Hopper one launch for one position a row; elsewhere one after the other.

    Args:
      q_BTKGH: Queries, G to each key head.
      k_BTKH: Their keys, rotated.
      v_BTKH: Their values.
      k_BSL: Keys of the cache, heads side by side; written in place where it is donated.
      v_BSL: Values, likewise.
      sinks_KG: Sink logits.
      slots_BT: int32 slots of the new keys and values; S or more: nowhere.
      q_pos_BT: int32 positions of the queries, negative for padding.
      k_pos_BS: int32 positions of the cache, the new ones among them, negative for empty slots.
      window: Keys visible to a query, itself included; None for all.
      implementation: As for `attention`.
      mesh: Devices to split rows and heads over; None: one device.
      room: int32 [`few_queries.room_of`], all -1, where the sums of "mosaic_gpu" meet; None: made
        here. Not for a mesh.

    Returns:
      [B, T, K, G, H], and keys and values of the cache.

    Raises:
      ValueError: If the room is of another size or type.
    """
    if room is not None:
        check_room(room, room_of(q_BTKGH.shape, k_BSL.shape[1], window), mesh)
    args = q_BTKGH, k_BTKH, v_BTKH, k_BSL, v_BSL, sinks_KG
    where = {"q_pos_BT": q_pos_BT, "k_pos_BS": k_pos_BS, "slots_BT": slots_BT, "window": window}
    if mesh is None and implementation in (None, "mosaic_gpu"):
        # What this refuses of one position a row, `attention` refuses too, and says why; of more,
        # only this does.
        with contextlib.suppress(NotImplementedError):
            return mosaic_gpu.store_and_attend(*args, **where, room=room)
    how = {"attend": functools.partial(attention, implementation=implementation, mesh=mesh)}
    if mesh is not None:
        how["write"] = functools.partial(sharded.write, mesh, k_BTKH.shape[2])
    return xla.store_and_attend(*args, **where, **how)


def attention(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_KG: jax.Array,
    *,
    q_pos_BT: jax.Array,
    k_pos_BS: jax.Array,
    window: int | None,
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Grouped-query attention whose softmax has one extra logit per head, the sink.

    A key is visible iff `0 <= k_pos <= q_pos` and, with a window, `q_pos - k_pos < window`. The
    sink is neither scaled nor masked and carries no value, so weights sum to less than one
    (gpt-oss model card, arXiv:2508.10925, section 2). A query that sees nothing gives zeros.

    Args:
      q_BTKGH: Queries, G to each key head.
      k_BSKH: Keys, rotated, in any order.
      v_BSKH: Values.
      sinks_KG: Sink logits.
      q_pos_BT: int32 positions of the queries, negative for padding.
      k_pos_BS: int32 positions of the keys, negative for empty slots.
      window: Keys visible to a query, itself included; None for all.
      implementation: "mosaic_gpu", "mosaic_tpu", "xla", or None for the fastest that can.
      mesh: Devices to split rows, queries and heads over; None: one device.

    Returns:
      [B, T, K, G, H] in the dtype of the queries.

    Raises:
      ValueError: If shapes disagree, or `implementation` is unknown.
    """
    B, T, K, G, H = q_BTKGH.shape
    S = k_BSKH.shape[1]
    wanted = ((B, S, K, H), (B, S, K, H), (K, G), (B, T), (B, S))
    came = tuple(a.shape for a in (k_BSKH, v_BSKH, sinks_KG, q_pos_BT, k_pos_BS))
    if wanted != came:
        raise ValueError(
            f"with queries {q_BTKGH.shape}, keys, values, sinks and positions must be {wanted}, "
            f"got {came}."
        )

    def kernel(q, k, v, sinks, q_pos, k_pos):
        where = {"q_pos_BT": q_pos, "k_pos_BS": k_pos, "window": window}
        return dispatch("attention", IMPLEMENTATIONS, implementation, q, k, v, sinks, **where)

    args = (q_BTKGH, k_BSKH, v_BSKH, sinks_KG, q_pos_BT, k_pos_BS)
    if mesh is None:
        return kernel(*args)
    # Other kernels divide by a sum that the parts of a softmax, to be added, are needed without.
    if implementation in (None, "xla") and sharded.moves_queries(mesh, q_BTKGH, k_BSKH):
        if platform() != "cpu":
            say_once("attention to a cache that is split over devices runs on xla")
        to_some = functools.partial(xla.attention_to_some, window=window)
        return sharded.attention_to_parts(mesh, to_some, *args)
    return sharded.attention(mesh, kernel, *args)
