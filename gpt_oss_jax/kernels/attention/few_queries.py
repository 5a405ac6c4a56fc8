"""Attention on Hopper for few queries, when the time goes into reading keys and values.

One launch, whatever the cache. What a thread does is in `few_queries_ptx`; this says how the work
is spread, prepares operands and launches it, on any machine for Hopper.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gpt_oss_jax.kernels import launch as kernel_launch
from gpt_oss_jax.kernels.attention.few_queries_ptx import HEAD, MAX_QUERIES, TILE, Program
from gpt_oss_jax.kernels.ptx import EMPTY
from gpt_oss_jax.kernels.target import multiprocessors

_MAX_CLUSTER = 8
_WARPS = 8
# A head's keys are spread over single blocks where all rows have so few key heads,
_MAX_SPLIT_HEADS = 16
# and the cache so many tiles, of which half or more are full;
_MIN_SPLIT_TILES = 2048
# over so many, whose sums fit the registers of the one that adds them up.
_MAX_SPLITS = 16


def few_queries(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_KG: jax.Array,
    *,
    q_pos_BT: jax.Array,
    k_pos_BS: jax.Array,
    window: int | None,
) -> jax.Array:
    """See `api.attention`; for up to `MAX_QUERIES` queries to a key head.

    Raises:
      NotImplementedError: For other sizes and types.
    """
    S = k_BSKH.shape[1]
    sinks_KG = _checked(q_BTKGH, S, sinks_KG)
    run = program(q_BTKGH.shape, S, window, sinks_KG.dtype.itemsize)
    k_pos = whole_tiles(k_pos_BS.astype(jnp.int32))
    inputs = k_BSKH, v_BSKH, sinks_KG, q_pos_BT.astype(jnp.int32), k_pos
    return launch(run, q_BTKGH, *inputs, *room_for(run))


def few_queries_stored(
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
    room: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes one key and value a row into the cache, and attends to it, in the same launch.

    Args:
      q_BTKGH: Rotated queries; T is one.
      k_BTKH: Their keys, rotated.
      v_BTKH: Their values.
      k_BSL: Keys of the cache, heads side by side. Written in place where it is donated.
      v_BSL: Values, likewise.
      sinks_KG: Sink logits.
      slots_BT: int32, where they go; S or more: nowhere.
      q_pos_BT: int32 positions of the queries.
      k_pos_BS: int32 positions of the cache, with these.
      window: Keys visible to a query, None for all.
      room: int32 [`room_of`], all -1; made here if it is None.

    Returns:
      Heads [B, 1, K, G, H], and keys and values of the cache.

    Raises:
      NotImplementedError: For other sizes and types.
    """
    T, S = q_BTKGH.shape[1], k_BSL.shape[1]
    if T != 1:
        raise NotImplementedError(f"takes one position a row, got {T}")
    sinks_KG = _checked(q_BTKGH, S, sinks_KG)
    run = program(q_BTKGH.shape, S, window, sinks_KG.dtype.itemsize)
    run = dataclasses.replace(run, stores=True)
    pos = q_pos_BT.astype(jnp.int32), whole_tiles(k_pos_BS.astype(jnp.int32))
    inputs = q_BTKGH, k_BSL, v_BSL, sinks_KG, *pos, k_BTKH, v_BTKH, slots_BT.astype(jnp.int32)
    return launch_storing(run, *inputs, *room_for(run, room))


def room_of(shape: tuple[int, ...], slots: int, window: int | None) -> int:
    """Words of `room` that `few_queries_stored` takes for queries of a shape [B, T, K, G, H].

    0 where it takes none, and where it does not cover the sizes.
    """
    return 0 if shape[1] != 1 or _why_not(shape, slots) else program(shape, slots, window).room


def room_for(run: Program, room: jax.Array | None = None) -> tuple[jax.Array, ...]:
    """The last input, made where it did not come; () where a launch takes none."""
    if not run.room:
        return ()
    return (jnp.full(run.room, EMPTY, jnp.int32) if room is None else room,)


def _checked(q_BTKGH: jax.Array, S: int, sinks_KG: jax.Array) -> jax.Array:
    """The sinks, in a type that is covered, if all sizes are."""
    if reason := _why_not(q_BTKGH.shape, S):
        raise NotImplementedError(reason)
    return sinks_KG if sinks_KG.dtype == jnp.bfloat16 else sinks_KG.astype(jnp.float32)


def _why_not(shape: tuple[int, ...], slots: int) -> str:
    """What of the sizes is not covered; "" if they are."""
    _, T, _, G, H = shape
    if T * G > MAX_QUERIES:
        return f"takes {MAX_QUERIES} queries to a key head, got {T} x {G}"
    if slots < TILE:
        return f"takes {TILE} slots or more, got {slots}"
    if H != HEAD:
        return f"takes heads of {HEAD}, got {H}"
    return ""


def program(shape: tuple[int, ...], slots: int, window: int | None, sink_bytes: int = 2) -> Program:
    """How queries of a shape [B, T, K, G, H] attend to a cache.

    Clusters take up to three quarters of the device, two blocks to a multiprocessor, if there are
    tiles for all warps. Each has to be inside one of the device's parts (GPCs), which differ in
    size: an H200 takes 66 of two blocks at once, 30 of four, 15 of eight and 7 of 16, and the next
    one waits until another has ended. Few heads so leave half of it idle. With many keys single
    blocks read them with all of it: their sums meet 2.5 us later, which reading gains back from
    20,000 keys on.
    """
    B, T, K, G, _ = shape
    heads, tiles, there = B * K, -(-slots // TILE), multiprocessors()
    splits = min(_MAX_SPLITS, there // heads)
    many = tiles >= _MIN_SPLIT_TILES and window is None
    if many and heads <= _MAX_SPLIT_HEADS and splits > 1:
        return Program(B, T, K, G, slots, window, 1, 2 * _WARPS, sink_bytes, splits=splits)
    blocks = max(1, min(_MAX_CLUSTER, tiles // _WARPS, 3 * there // 2 // heads))
    # A block that is alone on its multiprocessor has as many loads on their way as two would.
    fit = there if blocks == 1 else 3 * there // 4
    alone = heads * blocks <= fit and 2 * blocks * _WARPS <= tiles
    return Program(B, T, K, G, slots, window, blocks, (1 + alone) * _WARPS, sink_bytes)


def whole_tiles(k_pos_BS: jax.Array) -> jax.Array:
    """Positions as the kernel reads them, tile by tile.

    Where slots do not fill the last tile it begins earlier, and what it repeats is empty.
    """
    S = k_pos_BS.shape[1]
    rest = S % TILE
    if not rest:
        return k_pos_BS
    empty = jnp.full((k_pos_BS.shape[0], TILE - rest), -1, k_pos_BS.dtype)
    return jnp.concatenate([k_pos_BS[:, : S - rest], empty, k_pos_BS[:, S - rest :]], axis=1)


# Compiled once: the kernels of several layers, each traced for itself, would not be the same text.
@functools.partial(jax.jit, static_argnums=0)
def launch(run: Program, q_BTKGH: jax.Array, *inputs: jax.Array) -> jax.Array:
    """Keys, values, sinks, positions of queries and of keys follow the queries, then any room."""
    if not run.room:
        return _launched(run, q_BTKGH, *inputs)

    # JAX 0.11 has no batching rule for what is written in place.
    @jax.custom_batching.sequential_vmap
    def launched(*inputs):
        *inputs, room = inputs
        return _launched(run, *inputs, jax.new_ref(room))

    return launched(q_BTKGH, *inputs)


@functools.partial(jax.jit, static_argnums=0)
def launch_storing(run: Program, q_BTKGH: jax.Array, k_BSL, v_BSL, *inputs: jax.Array):
    """`launch`, with new keys, new values and slots before any room."""
    k, v = jax.new_ref(k_BSL), jax.new_ref(v_BSL)
    if run.room:
        inputs = (*inputs[:-1], jax.new_ref(inputs[-1]))
    heads_BTKGH = _launched(run, q_BTKGH, k, v, *inputs)
    return heads_BTKGH, jax.freeze(k), jax.freeze(v)


def _launched(run: Program, q_BTKGH: jax.Array, *inputs):
    return kernel_launch.launch(
        f"attention_{run.queries}_{'full' if run.window is None else 'window'}",
        run.ptx(),
        jax.ShapeDtypeStruct(q_BTKGH.shape, q_BTKGH.dtype),
        (q_BTKGH, *inputs),
        grid=run.grid,
        cluster=run.blocks,
        warpgroups=run.warps // 4,
        shared_bytes=run.shared_bytes,
    )
