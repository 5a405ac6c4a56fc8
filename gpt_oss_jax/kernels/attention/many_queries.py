"""Attention with sinks on Hopper for many queries: prefill, whole or in chunks, any kind of cache.

A thread block has three warpgroups that multiply, each 64 rows: some tokens with all queries of one
key head. A fourth copies keys, values and positions, tile after tile, some ahead. A window has few
tiles, and a block mostly waits: there it has two warpgroups, the first of which copies too, and a
multiprocessor two blocks. Scores, softmax and values of a warpgroup stay in registers; softmax runs
along the keys and starts from the sink, whose weight is one and whose value is zero. Which tiles of
keys a block has to see at all, and which of them without a mask, follows from the positions alone:
the others are neither copied nor computed. Knows no device; `mosaic_gpu` chooses.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

_HEAD = 64  # The rows of shared memory that the matrix unit reads are this wide.
_ROWS = 64  # Of a warpgroup.
_EIGHT = 8  # Tokens of a piece of shared memory.
_COPY_REGISTERS = 24
_REGISTERS = 1 << 16  # Of a multiprocessor.
_SHARED_BYTES = 200 << 10
_MAX_STAGES = 4
_HIDDEN = -1e30  # A score so low that its weight is zero beside any sink.
_NEVER = np.iinfo(np.int32).max


# One program for all layers of a kind, else each is lowered and compiled anew.
@functools.partial(jax.jit, static_argnames=("window", "warpgroups", "keys"))
def many_queries(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_KG: jax.Array,
    *,
    q_pos_BT: jax.Array,
    k_pos_BS: jax.Array,
    window: int | None,
    warpgroups: int | None = None,
    keys: int | None = None,
) -> jax.Array:
    """See `api.attention`; compiles for Hopper on any machine.

    Args:
      q_BTKGH: bf16 queries. Copied where T is not a multiple of 8.
      k_BSKH: bf16 keys. Copied where S is not a multiple of 8.
      v_BSKH: bf16 values. Likewise.
      sinks_KG: Sink logits.
      q_pos_BT: int32 positions of the queries.
      k_pos_BS: int32 positions of the keys.
      window: Keys visible to a query, itself included; None for all.
      warpgroups: That multiply, of a thread block, 1 to 3; None for what suits the window.
      keys: Of a tile, a multiple of 64; None likewise.

    Raises:
      NotImplementedError: For sizes and types that it does not cover.
    """
    B, T, K, G, H = q_BTKGH.shape
    types = {str(x.dtype) for x in (q_BTKGH, k_BSKH, v_BSKH)}
    if types != {"bfloat16"}:
        raise NotImplementedError(f"takes bfloat16, got {', '.join(sorted(types))}")
    if H != _HEAD or _ROWS % (_EIGHT * G):
        raise NotImplementedError(
            f"takes heads of {_HEAD} and 1, 2, 4 or 8 queries of a key head, got {H} and {G}"
        )
    tokens = _ROWS // G
    warpgroups = warpgroups or (3 if window is None else 2)
    keys = keys or (128 if window is None else 64)

    q_BTNH = _padded(q_BTKGH.reshape(B, T, K * G, H), _EIGHT)
    k_BSKH, v_BSKH = _padded(k_BSKH, _EIGHT), _padded(v_BSKH, _EIGHT)
    # What a row past the last query sees is nobody's business: nothing is stored there.
    q_pos_BT = _padded(q_pos_BT, warpgroups * tokens, mode="edge")
    k_pos_BS = _padded(jnp.where(k_pos_BS < 0, _NEVER, k_pos_BS), keys, constant_values=_NEVER)
    tiles_BQs, counts_BQ2 = _tiles(q_pos_BT, k_pos_BS, warpgroups * tokens, keys, window)
    # A warpgroup's rows, as the softmax has them: tokens of the first head, then of the next.
    shape = (B, q_pos_BT.shape[1] // tokens, G, tokens)
    rows_BRr = jnp.broadcast_to(q_pos_BT.reshape(B, -1, 1, tokens), shape).reshape(B, -1, _ROWS)
    sinks_Kr = jnp.repeat(sinks_KG.astype(jnp.float32) * math.log2(math.e), tokens, axis=1)

    out_BTNH = _kernel(q_BTNH.shape, K, warpgroups, keys, window)(
        counts_BQ2, tiles_BQs, q_BTNH, k_BSKH, v_BSKH, k_pos_BS, rows_BRr, sinks_Kr
    )
    return out_BTNH[:, :T].reshape(B, T, K, G, H)


def _kernel(shape, K: int, warpgroups: int, keys: int, window: int | None):
    """A function of the arrays in `many_queries` to the values [B, T, N, H]."""
    # Here, because these change from one version of JAX to the next.
    from jax.experimental.pallas import mosaic_gpu as plgpu

    B, T, N, H = shape
    G = N // K
    tokens = _ROWS // G
    blocks = -(-T // (warpgroups * tokens))
    stages = min(_MAX_STAGES, _SHARED_BYTES // (4 * keys * H + 4 * keys))
    # A warpgroup that does nothing else. Without it threads have the registers that the assembler
    # gives them, 128: with more, two blocks would no longer be on a multiprocessor.
    copies = window is None
    free = _REGISTERS // 128 - _COPY_REGISTERS
    # JAX 0.12's assembler gives all 128: with three warpgroups some are spilled, at no loss.
    registers = min(240, free // warpgroups // 8 * 8)
    scale = H**-0.5 * math.log2(math.e)
    per_row, per_key = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    def block(counts, tiles, q, k, v, k_pos, rows, sinks, out, *shared):
        q_smem, k_smem, v_smem, pos_smem, q_here, k_here, v_here, done = shared
        b, head, warpgroup = (lax.axis_index(name) for name in ("b", "head", "warpgroup"))
        # The last see most, so they come first.
        i = blocks - 1 - lax.axis_index("block")
        whole, count = counts[b, i, 0], counts[b, i, 1]

        def slot_of(step):
            return lax.rem(step, jnp.int32(stages))

        def copy(step):
            """A tile of keys and values, if there is one, once all have read what its slot had."""
            slot = slot_of(step)

            @pl.when(step < count)
            def _():
                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(done.at[slot])

                own = pl.ds(tiles[b, i, step] * keys, keys)
                for source, target, here in (
                    (k.at[b, own, head], k_smem, k_here),
                    (k_pos.at[b, own], pos_smem, k_here),
                    (v.at[b, own, head], v_smem, v_here),
                ):
                    plgpu.copy_gmem_to_smem(source, target.at[slot], here.at[slot])

        if copies:

            @pl.when(warpgroup == warpgroups)
            def _copy():
                plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
                pl.loop(0, count)(copy)

        @pl.when(warpgroup < warpgroups)
        def _compute():
            if copies:
                plgpu.set_max_registers(registers, action="increase")
            else:

                @pl.when(warpgroup == 0)
                def _():
                    pl.loop(0, stages)(copy)

            tile = i * warpgroups + warpgroup
            own, here = q_smem.at[warpgroup], q_here.at[warpgroup]

            def of_head(g):
                return (
                    (b, pl.ds(tile * tokens, tokens), head * G + g),
                    own.at[pl.ds(g * tokens, tokens)],
                )

            for g in range(G):
                place, piece = of_head(g)
                plgpu.copy_gmem_to_smem(q.at[place], piece, here)
            pos = plgpu.load(rows.at[b, tile], layout=per_row, optimized=False)
            largest = plgpu.load(sinks.at[head], layout=per_row, optimized=False)
            total = plgpu.layout_cast(jnp.full((_ROWS,), 1, jnp.float32), per_row)
            values = plgpu.layout_cast(jnp.zeros((_ROWS, H), jnp.float32), plgpu.Layout.WGMMA)
            plgpu.barrier_wait(here)

            def over(x, shape):
                return lax.broadcast_in_dim(x, shape, [0])

            def product(a, b):
                def multiply(sums):
                    plgpu.wgmma(sums, a, b)
                    return sums[...]

                return pl.run_scoped(multiply, plgpu.ACC((_ROWS, b.shape[1]), jnp.float32))

            def attend(step, state, masked):
                largest, total, values = state
                slot = slot_of(step)
                plgpu.barrier_wait(k_here.at[slot])
                scores = product(own, k_smem.at[slot].transpose((1, 0)))
                if masked:
                    key = plgpu.load(pos_smem.at[slot], layout=per_key)
                    key = lax.broadcast_in_dim(key, scores.shape, [1])
                    visible = key <= over(pos, scores.shape)
                    if window is not None:
                        visible &= key > over(pos - window, scores.shape)
                    scores = jnp.where(visible, scores, _HIDDEN)

                now = jnp.maximum(largest, scores.max(axis=1) * scale)
                weights = jnp.exp2(scores * scale - over(now, scores.shape))
                kept = jnp.exp2(largest - now)
                total = total * kept + weights.sum(axis=1)
                weights = weights.astype(jnp.bfloat16)

                plgpu.barrier_wait(v_here.at[slot])
                more = product(weights, v_smem.at[slot])
                values = values * over(kept, values.shape) + more
                plgpu.barrier_arrive(done.at[slot])
                if not copies:

                    @pl.when(warpgroup == 0)
                    def _():
                        copy(step + stages)

                return now, total, values

            state = largest, total, values
            state = lax.fori_loop(0, whole, lambda *a: attend(*a, masked=False), state)
            _, total, values = lax.fori_loop(
                whole, count, lambda *a: attend(*a, masked=True), state
            )
            own[...] = (values * over(1 / total, values.shape)).astype(jnp.bfloat16)
            plgpu.commit_smem()
            for g in range(G):
                place, piece = of_head(g)
                plgpu.copy_smem_to_gmem(piece, out.at[place])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    tiled = (plgpu.TilingTransform((_EIGHT, H)), plgpu.SwizzleTransform(2 * H))

    def smem(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=tiled)

    return plgpu.kernel(
        block,
        out_type=jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        scratch_types=[
            smem(warpgroups, _ROWS, H),
            smem(stages, keys, H),
            smem(stages, keys, H),
            plgpu.SMEM((stages, keys), jnp.int32),
            plgpu.Barrier(num_arrivals=G, num_barriers=warpgroups),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        ],
        grid=(B, K, blocks),
        grid_names=("b", "head", "block"),
        num_threads=warpgroups + copies,
        thread_name="warpgroup",
        kernel_name=f"attention_many_{'full' if window is None else 'window'}",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )


def _tiles(q_pos_BT, k_pos_BS, tokens: int, keys: int, window: int | None):
    """Which tiles of keys a block of tokens has to see: those that need no mask first.

    Args:
      q_pos_BT: Whole blocks of positions.
      k_pos_BS: Whole tiles of positions, empty slots far in the future.
      tokens: Of a block.
      keys: Of a tile.
      window: As in `many_queries`.

    Returns:
      int32 [B, blocks, tiles], and how many need no mask and how many are seen [B, blocks, 2].
    """
    B = q_pos_BT.shape[0]
    q_BQ1t, k_B1Js = q_pos_BT.reshape(B, -1, 1, tokens), k_pos_BS.reshape(B, 1, -1, keys)
    first_q = jnp.where(q_BQ1t < 0, _NEVER, q_BQ1t).min(axis=3)
    last_q = q_BQ1t.max(axis=3)
    first_k = k_B1Js.min(axis=3)
    last_k = jnp.where(k_B1Js == _NEVER, -1, k_B1Js).max(axis=3)
    seen_BQJ = first_k <= last_q
    whole_BQJ = k_B1Js.max(axis=3) <= q_BQ1t.min(axis=3)
    if window is not None:
        seen_BQJ &= last_k > first_q - window
        whole_BQJ &= first_k > last_q - window
    whole_BQJ &= seen_BQJ
    order = jnp.argsort(jnp.where(whole_BQJ, 0, jnp.where(seen_BQJ, 1, 2)), axis=2, stable=True)
    counts = [seen.sum(axis=2, dtype=jnp.int32) for seen in (whole_BQJ, seen_BQJ)]
    return order.astype(jnp.int32), jnp.stack(counts, axis=2)


def _padded(x, multiple: int, **how):
    """Fills axis 1 up to a multiple."""
    padding = [(0, -x.shape[1] % multiple if i == 1 else 0) for i in range(x.ndim)]
    return jnp.pad(x, padding, **how) if padding[1][1] else x
