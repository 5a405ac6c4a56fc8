"""The expert layer on Hopper for many rows, when the time goes into matrix products.

Rows are sorted into tiles of one expert each. A thread block multiplies a tile with 192 outputs of
its expert, whose packed weights and whose rows one warpgroup copies to shared memory, some steps of
the input axis ahead; three others decode 64 outputs each in registers and multiply. Of a tile that
is not full the smallest part that has its pairs is copied and multiplied. Two launches, up
projection with bias and SwiGLU, and down projection with bias and routing weight. What a thread
does by itself is in `many_rows_ptx`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from gpt_oss_jax.kernels.expert_matmul.many_rows_ptx import (
    OUTPUTS,
    Projection,
    decode_half,
)
from gpt_oss_jax.kernels.expert_matmul.rows import add_up, can_sort, gather, sort
from gpt_oss_jax.kernels.expert_matmul.tiles import Tiles, sort_into_tiles
from gpt_oss_jax.kernels.expert_matmul.weights import ExpertWeights
from gpt_oss_jax.kernels.target import multiprocessors
from gpt_oss_jax.quant import MXArray

_WARPGROUPS = 3
_BLOCK_OUTPUTS = _WARPGROUPS * OUTPUTS
_SHARED_BYTES = 220 << 10
_MAX_STAGES = 6
# A warpgroup's scales are one piece, of which the copy engine takes 256 lines.
_MAX_WIDTH = 256 * _BLOCK_OUTPUTS * 32 // OUTPUTS


def many_rows(
    x_MD: jax.Array,
    experts_MX: jax.Array,
    weights_MX: jax.Array,
    w: ExpertWeights,
    *,
    limit: float,
    some_elsewhere: bool = False,
    residual_MD: jax.Array | None = None,
    tile: int,
) -> jax.Array:
    """See `mosaic_gpu.on_hopper`; for any number of rows, of bf16.

    Args:
      x_MD: Rows.
      experts_MX: int32 expert of each row.
      weights_MX: Routing weights.
      w: Weights of all experts.
      limit: Clamp of gate and linear part.
      some_elsewhere: Ids past the experts add nothing.
      residual_MD: bf16 rows that the result is added to.
      tile: Rows that are multiplied at a time, 8 to 128 in powers of two.

    Raises:
      NotImplementedError: For experts whose widths are not multiples of 192, up to 24,576.
    """
    M, X = experts_MX.shape
    E = w.up.shape[0]
    if reason := why_not_many(w):
        raise NotImplementedError(reason)
    up, down = projections(w, limit, tile)
    chosen = experts_MX.reshape(-1)
    if can_sort(E):
        # Products are dealt out beforehand: in this order blocks get as many of whole tiles.
        tiles = sort(chosen, E, tile, halves_last=len(multiplied_rows(tile)) > 1)
    else:
        tiles = sort_into_tiles(chosen, E, tile)
    x_RD, weights_R = gather(x_MD, weights_MX, tiles)
    h_RF = grouped(up, w.up, w.up_bias, tiles, x_RD)
    y_RD = grouped(down, w.down, w.down_bias, tiles, h_RF, weights_R)
    num_experts = E if some_elsewhere else None
    return add_up(y_RD, tiles.place_of_pair, experts_MX, num_experts, residual_MD)


def why_not_many(w: ExpertWeights) -> str:
    """Why experts of these sizes cannot run here; "" if they can."""
    _, F, _, D = w.up.shape
    if D % _BLOCK_OUTPUTS or F % _BLOCK_OUTPUTS or max(D, F) > _MAX_WIDTH:
        return f"takes widths of {_BLOCK_OUTPUTS} n up to {_MAX_WIDTH:,}, got experts {w.up.shape}"
    return ""


def projections(w: ExpertWeights, limit: float, tile: int) -> tuple[Projection, Projection]:
    """Both launches."""
    _, F, _, D = w.up.shape

    def projection(outputs: int, inputs: int, limit: float | None) -> Projection:
        # Small tiles have memory for wide steps, of which there are fewer.
        wide = tile <= 32 and inputs % 320 == 0
        step = 10 if wide else 6
        return Projection(outputs, inputs // 32, step, w.up_bias.dtype.itemsize, limit)

    return projection(2 * F, D, limit), projection(D, F, None)


def in_order(x_MD: jax.Array) -> jax.Array:
    """Rows in the order in which the matrix unit meets the weights of two MXFP4 blocks each.

    Value 16 q + 8 t + 4 e + v of 64 comes to place 32 t + 8 v + 2 q + e: a word of eight codes,
    decoded, is four pairs of values four apart, and a column quad holds two pairs of every 16
    columns.
    """
    M, D = x_MD.shape
    return x_MD.reshape(M, D // 64, 4, 2, 2, 4).transpose(0, 1, 3, 5, 2, 4).reshape(M, D)


def grouped(
    p: Projection,
    w: MXArray,
    bias: jax.Array,
    tiles: Tiles,
    x_RK: jax.Array,
    weights_R: jax.Array | None = None,
) -> jax.Array:
    """Each tile of rows times its expert: bf16 [R, p.width].

    Places of no pair hold anything, NaN too; none of them reaches another row.

    Args:
      p: Which projection, from K inputs to `p.outputs`.
      w: Weights of all experts, shuffled: [E, F, 2, D] up, [E, D, F] down.
      bias: Of all experts, bf16 or float32 as `p.bias_bytes` says: [E, F, 2] up, [E, D] down.
      tiles: What expert each of T tiles of P rows has.
      x_RK: bf16 rows, tile by tile, `in_order`, R = T P; those of no pair may be unwritten.
      weights_R: float32 routing weights for the down projection, None for the up projection.
    """
    # Here, because these change from one version of JAX to the next.
    from jax.experimental.pallas import mosaic_gpu as plgpu

    T, P = tiles.pairs.shape
    E = w.scales.shape[0]
    stripes, steps = p.outputs // _BLOCK_OUTPUTS, p.blocks // p.step
    # The scales of a warpgroup are one piece, cut so that the copy engine takes it.
    scale_rows = OUTPUTS * p.blocks // _BLOCK_OUTPUTS
    stages, scale_slots = slots(p, P)
    more = () if weights_R is None else (weights_R,)
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    parts = multiplied_rows(P)

    def block(experts, pairs, count, blocks, scales, x, bias, *rest):
        *weights, out, w_smem, x_smem, scales_smem, here, scales_here, read = rest
        first, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        products = (count[0] * stripes - first + num_blocks - 1) // num_blocks
        own_places = _places_of_thread(p)()

        def tile_and_stripe(n):
            """Tile of rows and stripe of outputs of the block's product n."""
            product = first + n * num_blocks
            return product // stripes, product % stripes

        def look_up(n):
            """Its expert, and which of `parts` has all its pairs."""
            # Of a product that is none, any that exists will do: it is looked up, and not used.
            t, _ = tile_and_stripe(lax.max(lax.min(n, products - 1), 0))
            too_few = ((pairs[t, rows] >= 0).astype(jnp.int32) for rows in parts[:-1])
            return experts[t], sum(too_few, jnp.int32(0))

        def sized(part, of_rows):
            """Does it for the rows of a part."""
            for i, rows in enumerate(parts):
                pl.when(part == i)(functools.partial(of_rows, rows))

        def wait_until_read(step):
            """Until all have read what was in its slot."""
            plgpu.barrier_wait(read.at[lax.rem(step, stages)])

        def copy(n):
            """Weights and rows of a product, each step once all have read what was there before."""
            (t, stripe), (expert, part) = tile_and_stripe(n), look_up(n)
            outputs = pl.ds((expert * stripes + stripe) * _BLOCK_OUTPUTS, _BLOCK_OUTPUTS)

            def of_rows(rows):
                @pl.loop(0, steps)
                def _(k):
                    step = n * steps + k
                    slot = lax.rem(step, stages)
                    pl.when(step >= stages)(lambda: wait_until_read(step))
                    w_piece = blocks.at[outputs, pl.ds(k * 16 * p.step, 16 * p.step)]
                    plgpu.copy_gmem_to_smem(w_piece, w_smem.at[slot], here.at[slot])
                    x_piece = x.at[pl.ds(t * P, rows), pl.ds(k * 32 * p.step, 32 * p.step)]
                    plgpu.copy_gmem_to_smem(x_piece, x_smem.at[slot, pl.ds(0, rows)], here.at[slot])

            sized(part, of_rows)

        def scales_of(n):
            """A warpgroup's, and the barrier that they arrive at."""
            slot = lax.rem(n, scale_slots)
            return scales_smem.at[slot, warpgroup], scales_here.at[slot * _WARPGROUPS + warpgroup]

        def fetch_scales(n, expert):
            @pl.when(n < products)
            def _():
                _, stripe = tile_and_stripe(n)
                at = ((expert * stripes + stripe) * _WARPGROUPS + warpgroup) * scale_rows
                plgpu.copy_gmem_to_smem(scales.at[pl.ds(at, scale_rows)], *scales_of(n))

        def multiply(n, ahead):
            """A product, and what follows it; its scales make way for another one's.

            Nothing else has anything to do while a warpgroup waits for memory. So experts are
            looked up a product or two before, biases and routing weights before the steps.
            """
            ahead = (*ahead, look_up(n + scale_slots))
            (t, stripe), (expert, part) = tile_and_stripe(n), ahead[0]
            own = stripe * _WARPGROUPS + warpgroup
            own_scales, arrived = scales_of(n)
            plgpu.barrier_wait(arrived)

            def of_rows(rows):
                extras = _read_extras(p, rows)(
                    bias.at[expert, pl.ds(own * OUTPUTS, OUTPUTS)],
                    *(a.at[pl.ds(t * P, rows)] for a in weights),
                )

                def all_steps(sums):
                    @pl.loop(0, steps)
                    def _(k):
                        slot = lax.rem(n * steps + k, stages)
                        plgpu.barrier_wait(here.at[slot])
                        own_w = w_smem.at[slot, pl.ds(warpgroup * OUTPUTS, OUTPUTS)]
                        loaded = _load(p)(own_w, own_scales, k, *own_places)
                        for i in range(p.step // 2):
                            # The matrix unit has one pair of blocks while the next is decoded.
                            x_pair = x_smem.at[slot, pl.ds(0, rows), pl.ds(64 * i, 64)]
                            plgpu.wgmma(sums, _decode(p, i)(loaded), x_pair.transpose((1, 0)))
                            plgpu.wgmma_wait(int(i < p.step // 2 - 1))
                        # What was loaded is decoded and multiplied: no read can be under way.
                        plgpu.barrier_arrive(read.at[slot])

                    return sums[...]

                sums = pl.run_scoped(all_steps, plgpu.ACC((OUTPUTS, rows), jnp.float32))
                # Scales were read, and the copy engine, which writes there next, is to know.
                plgpu.commit_smem()
                fetch_scales(n + scale_slots, ahead[-1][0])
                # Of 64 hidden values two warpgroups have every other four.
                sharing = p.outputs // p.width
                to = out.at[pl.ds(t * P, rows), pl.ds(own // sharing * OUTPUTS, OUTPUTS)]
                _finish(p, rows)(sums, own % sharing, extras, to)

            sized(part, of_rows)
            return ahead[1:]

        @pl.when(warpgroup == _WARPGROUPS)
        def _():
            pl.loop(0, products)(copy)
            # JAX 0.11's interpreter wants every phase of a barrier to be waited for.
            pl.loop(lax.max(products * steps - stages, 0), products * steps)(wait_until_read)

        @pl.when(warpgroup < _WARPGROUPS)
        def _():
            ahead = tuple(look_up(n) for n in range(scale_slots))
            for n, (expert, _) in enumerate(ahead):
                fetch_scales(n, expert)
            lax.fori_loop(0, products, multiply, ahead)

    num_blocks = min(multiprocessors(), T * stripes)
    return plgpu.kernel(
        block,
        out_type=jax.ShapeDtypeStruct((T * P, p.width), jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM((stages, _BLOCK_OUTPUTS, 16 * p.step), jnp.uint8),
            plgpu.SMEM((stages, P, 32 * p.step), jnp.bfloat16, transforms=tiled),
            plgpu.SMEM((scale_slots, _WARPGROUPS, scale_rows, _BLOCK_OUTPUTS), jnp.uint8),
            # Both pieces of a step are here; a warpgroup's scales are; all three have read a step.
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_barriers=scale_slots * _WARPGROUPS),
            plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=stages),
        ],
        grid=(num_blocks,),
        grid_names=("block",),
        # Each has 128 registers of a multiprocessor's, of which tiles of 128 rows take 125.
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="mxfp4_many_rows_" + ("down" if p.limit is None else "up"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(
        tiles.expert_of_tile.astype(jnp.int32),
        tiles.pairs.astype(jnp.int32),
        tiles.count.astype(jnp.int32).reshape(1),
        w.blocks.reshape(E * p.outputs, 16 * p.blocks),
        w.scales.reshape(-1, _BLOCK_OUTPUTS),
        x_RK,
        bias.reshape(E, p.outputs),
        *more,
    )


def multiplied_rows(tile: int) -> list[int]:
    """A tile's rows, and parts of them: the smallest that has all its pairs is multiplied.

    An expert's last tile has few as often as many. The matrix unit takes no fewer than eight rows,
    and quarters of fewer than 32 take as long as halves.
    """
    halves = [tile // 2] if tile >= 2 * 8 else []
    quarters = [tile // 4] if tile >= 4 * 32 else []
    return [*quarters, *halves, tile]


def slots(p: Projection, tile: int) -> tuple[int, int]:
    """Steps, and scales of products, that are in shared memory or on their way."""
    step = (_BLOCK_OUTPUTS * 16 + tile * 64) * p.step
    beside = lambda scales: (_SHARED_BYTES - scales * _BLOCK_OUTPUTS * p.blocks) // step
    # Scales of the next product come while this one's are read, if three steps fit beside them.
    scales = 2 if beside(2) >= 3 else 1
    return min(_MAX_STAGES, beside(scales)), scales


def _places_of_thread(p: Projection):
    """What a thread needs to know of itself for `_load`, found once."""
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir

    threads = plgpu.Layout.WG_STRIDED((128,), vec_size=1)
    one = plgpu.ShapeDtypeStruct((128,), jnp.int32, threads)

    @plgpu.inline_mgpu(return_type=(one, one))
    def places(ctx):
        del ctx
        word = ir.IntegerType.get_signless(32)
        found = mgpu.utils.inline_ptx(p.places(), result_types=[word] * 2)
        return tuple(_of_threads([x]) for x in found)

    return places


def _load(p: Projection):
    """A step's weights and all scales, in shared memory -> what a thread has of them."""
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir

    of_thread = plgpu.Layout.WG_STRIDED((128,), vec_size=1)
    shape = (128 * p.loaded,)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT(()), *(of_thread,) * 2),
        return_type=plgpu.ShapeDtypeStruct(
            shape, jnp.int32, plgpu.Layout.WG_STRIDED(shape, vec_size=1)
        ),
    )
    def load(ctx, w, scales, step, *places):
        del ctx
        word = ir.IntegerType.get_signless(32)
        loaded = mgpu.utils.inline_ptx(
            p.load(),
            *(mgpu.utils.memref_ptr(ref) for ref in (w, scales)),
            step.registers.item(),
            *(mgpu.utils.bitcast(x.registers.item(), word) for x in places),
            result_types=[word] * p.loaded,
            has_side_effects=True,
        )
        return _of_threads(loaded)

    return load


def _of_threads(words):
    """So many words of each thread, as an array."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir

    alone = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    return mgpu.FragmentedArray(
        _registers=np.asarray([mgpu.utils.bitcast(x, alone) for x in words], dtype=object),
        _layout=mgpu.WGStridedFragLayout((128 * len(words),), 1),
        _is_signed=True,
    )


def _decode(p: Projection, i: int):
    """What `_load` gives -> left operand of the pair of blocks i of a step."""
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir

    shape = (OUTPUTS, 64)
    of_threads = plgpu.Layout.WG_STRIDED((128 * p.loaded,), vec_size=1)

    @plgpu.inline_mgpu(
        arg_types=(of_threads,),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, plgpu.Layout.WGMMA),
    )
    def decode(ctx, loaded):
        del ctx
        word = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        loaded = [mgpu.utils.bitcast(x, word) for x in loaded.registers]
        registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape(shape), dtype=object)
        index = _index_of(registers.shape)
        for h in range(2):
            own = (loaded[n] for n in p.of_pair(h, i))
            values = mgpu.utils.inline_ptx(decode_half(), *own, result_types=[word] * 8)
            for v, value in enumerate(values):
                registers[index(v, h)] = mgpu.utils.bitcast(value, pair)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None
        )

    return decode


def _read_extras(p: Projection, rows: int):
    """Biases and routing weights in global memory, to what `_finish` takes of them."""
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir

    words, weights = p.extra_words(rows), int(p.limit is None)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),) * (1 + weights),
        return_type=plgpu.ShapeDtypeStruct(
            (128 * words,), jnp.int32, plgpu.Layout.WG_STRIDED((128 * words,), vec_size=1)
        ),
    )
    def read_extras(ctx, *refs):
        del ctx
        word = ir.IntegerType.get_signless(32)
        refs = [mgpu.utils.memref_ptr(ref) for ref in refs]
        # With an effect, as nothing else keeps it before the steps.
        return _of_threads(
            mgpu.utils.inline_ptx(
                p.read_extras(rows), *refs, result_types=[word] * words, has_side_effects=True
            )
        )

    return read_extras


def _finish(p: Projection, rows: int):
    """Sums of a warpgroup to the result in global memory."""
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.Layout.WGMMA,
            plgpu.Layout.WG_SPLAT(()),
            plgpu.Layout.WG_STRIDED((128 * p.extra_words(rows),), vec_size=1),
            plgpu.RefType(),
        ),
    )
    def finish(ctx, sums, half, extras, out):
        del ctx
        i64, word = (ir.IntegerType.get_signless(bits) for bits in (64, 32))
        operands = mgpu.utils.memref_ptr(out), half.registers.item()
        (at,) = mgpu.utils.inline_ptx(p.start(), *operands, result_types=[i64])
        extras = [mgpu.utils.bitcast(x, word) for x in extras.registers]
        index = _index_of(sums.registers.shape)
        for group in range(rows // 8):
            own = [
                vector.extract(sums.registers[index(group, h)], [], ir.DenseI64ArrayAttr.get([i]))
                for h in range(2)
                for i in range(2)
            ]
            mgpu.utils.inline_ptx(p.finish(group), *own, at, *extras, convergent=True)

    return finish


def _index_of(shape):
    """Where the registers of a `WGMMA_LAYOUT` have group i of eight columns, and row h of two."""
    (half,) = (axis for axis, size in enumerate(shape) if size == 2 and axis > 1)
    return lambda i, h: tuple(i if a == 1 else h if a == half else 0 for a in range(len(shape)))
