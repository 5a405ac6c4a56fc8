"""An experiment: experts without a warpgroup that copies, one or two teams to a multiprocessor.

On a Hopper, from the root: python benchmarks/teams.py --rows 64 128 1024 8192
Why, and what is expected: results/2026-11-29-h200-shares.md. A team is three warpgroups with
products of its own; its first one starts the copies of a step once all three have read what was
there before. Lines are those of `experts.py`, the kernels by turns.
"""

import argparse
import dataclasses
import functools
import sys
from unittest import mock

import experts
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from gpt_oss_jax.kernels.expert_matmul import many_rows
from gpt_oss_jax.kernels.expert_matmul.many_rows_ptx import OUTPUTS
from gpt_oss_jax.kernels.target import why_not_hopper

WARPGROUPS = 3
SHARED_BYTES = 224 << 10
_BLOCK_OUTPUTS = WARPGROUPS * OUTPUTS


def grouped(p, w, bias, tiles, x_RK, weights_R=None, *, teams=1, together=1, step=None):
    """`many_rows.grouped`; the matrix unit is waited for after every `together` steps."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    p = dataclasses.replace(p, step=step or p.step)
    (T, P), E = tiles.pairs.shape, w.scales.shape[0]
    stripes, steps = p.outputs // _BLOCK_OUTPUTS, p.blocks // p.step
    together = together if steps % together == 0 else 1
    scale_rows = OUTPUTS * p.blocks // _BLOCK_OUTPUTS
    step_bytes = (_BLOCK_OUTPUTS * 16 + P * 64) * p.step
    beside = lambda n: (SHARED_BYTES // teams - n * _BLOCK_OUTPUTS * p.blocks - 512) // step_bytes
    scale_slots = 2 if beside(2) >= 3 else 1
    stages = min(6, beside(scale_slots), steps)
    if stages < 2:
        raise ValueError(f"a step is copied while another is multiplied, {stages} fits.")
    sizes = many_rows.multiplied_rows(P)
    more = () if weights_R is None else (weights_R,)
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def block(experts, pairs, count, blocks, scales, x, bias, *rest):
        *weights, out, w_smem, x_smem, scales_smem, here, scales_here, read = rest
        thread = lax.axis_index("warpgroup")
        team, warpgroup = thread // WARPGROUPS, lax.rem(thread, jnp.int32(WARPGROUPS))
        first = lax.axis_index("block") + team * num_blocks
        products = (count[0] * stripes - first + all_teams - 1) // all_teams
        places = many_rows._places_of_thread(p)()
        slot_of = lambda step: team * stages + lax.rem(step, jnp.int32(stages))

        def place(n):
            product = first + n * all_teams
            return product // stripes, product % stripes

        def look_up(n):
            t, _ = place(lax.max(lax.min(n, products - 1), 0))
            more = ((pairs[t, rows] >= 0).astype(jnp.int32) for rows in sizes[:-1])
            return experts[t], sum(more, jnp.int32(0))

        def sized(number, of_rows):
            for i, rows in enumerate(sizes):
                pl.when(number == i)(functools.partial(of_rows, rows))

        def copy(n, k, expert, size):
            """Weights and rows of step k of product n."""
            t, stripe = place(n)
            slot = slot_of(n * steps + k)
            outputs = pl.ds((expert * stripes + stripe) * _BLOCK_OUTPUTS, _BLOCK_OUTPUTS)
            w_piece = blocks.at[outputs, pl.ds(k * 16 * p.step, 16 * p.step)]
            plgpu.copy_gmem_to_smem(w_piece, w_smem.at[slot], here.at[slot])

            def of_rows(rows):
                x_piece = x.at[pl.ds(t * P, rows), pl.ds(k * 32 * p.step, 32 * p.step)]
                plgpu.copy_gmem_to_smem(x_piece, x_smem.at[slot, pl.ds(0, rows)], here.at[slot])

            sized(size, of_rows)

        def refill(n, k, ahead):
            """Once all have read the step before k of product n, what comes there next."""

            @pl.when((warpgroup == 0) & (n * steps + k > 0))
            def _():
                plgpu.barrier_wait(read.at[slot_of(n * steps + k - 1)])
                ahead_k = k - 1 + stages
                later = ahead_k >= steps
                n_next = n + later.astype(jnp.int32)
                k_next = ahead_k - jnp.where(later, steps, 0)
                expert, size = (jnp.where(later, b, a) for a, b in zip(*ahead[:2], strict=True))
                pl.when(n_next < products)(lambda: copy(n_next, k_next, expert, size))

        def scales_of(n):
            slot = team * scale_slots + lax.rem(n, jnp.int32(scale_slots))
            return scales_smem.at[slot, warpgroup], scales_here.at[slot * WARPGROUPS + warpgroup]

        def fetch_scales(n, expert):
            @pl.when(n < products)
            def _():
                _, stripe = place(n)
                at = ((expert * stripes + stripe) * WARPGROUPS + warpgroup) * scale_rows
                plgpu.copy_gmem_to_smem(scales.at[pl.ds(at, scale_rows)], *scales_of(n))

        def multiply(n, ahead):
            ahead = (*ahead, look_up(n + 2))
            (t, stripe), (expert, size) = place(n), ahead[0]
            own = stripe * WARPGROUPS + warpgroup
            own_scales, arrived = scales_of(n)
            plgpu.barrier_wait(arrived)

            def of_rows(rows):
                extras = many_rows._read_extras(p, rows)(
                    bias.at[expert, pl.ds(own * OUTPUTS, OUTPUTS)],
                    *(a.at[pl.ds(t * P, rows)] for a in weights),
                )

                def all_steps(sums):
                    @pl.loop(0, steps, step=together)
                    def _(first_k):
                        for j in range(together):
                            k = first_k + j
                            slot = slot_of(n * steps + k)
                            plgpu.barrier_wait(here.at[slot])
                            own_w = w_smem.at[slot, pl.ds(warpgroup * OUTPUTS, OUTPUTS)]
                            loaded = many_rows._load(p)(own_w, own_scales, k, *places)
                            for i in range(p.step // 2):
                                x_pair = x_smem.at[slot, pl.ds(0, rows), pl.ds(64 * i, 64)]
                                decoded = many_rows._decode(p, i)(loaded)
                                plgpu.wgmma(sums, decoded, x_pair.transpose((1, 0)))
                                end = j == together - 1 and i == p.step // 2 - 1
                                plgpu.wgmma_wait(int(not end))
                                if i == 0 and j:
                                    before = slot_of(n * steps + k - 1)
                                    plgpu.barrier_arrive(read.at[before])
                                if i == min(1, p.step // 2 - 1):
                                    refill(n, k, ahead)
                        plgpu.barrier_arrive(read.at[slot])

                    return sums[...]

                sums = pl.run_scoped(all_steps, plgpu.ACC((OUTPUTS, rows), jnp.float32))
                plgpu.commit_smem()
                fetch_scales(n + scale_slots, ahead[scale_slots][0])
                sharing = p.outputs // p.width
                to = out.at[pl.ds(t * P, rows), pl.ds(own // sharing * OUTPUTS, OUTPUTS)]
                many_rows._finish(p, rows)(sums, own % sharing, extras, to)

            sized(size, of_rows)
            return ahead[1:]

        ahead = look_up(jnp.int32(0)), look_up(jnp.int32(1))

        @pl.when((warpgroup == 0) & (products > 0))
        def _():
            for k in range(stages):
                copy(jnp.int32(0), jnp.int32(k), *ahead[0])

        for n in range(scale_slots):
            fetch_scales(jnp.int32(n), ahead[n][0])
        lax.fori_loop(0, products, multiply, ahead)

        @pl.when((warpgroup == 0) & (products > 0))
        def _():
            plgpu.barrier_wait(read.at[slot_of(products * steps - 1)])

    num_blocks = min(many_rows.multiprocessors(), T * stripes)
    all_teams = teams * num_blocks
    return plgpu.kernel(
        block,
        out_type=jax.ShapeDtypeStruct((T * P, p.width), jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM((teams * stages, _BLOCK_OUTPUTS, 16 * p.step), jnp.uint8),
            plgpu.SMEM((teams * stages, P, 32 * p.step), jnp.bfloat16, transforms=tiled),
            plgpu.SMEM((teams * scale_slots, WARPGROUPS, scale_rows, _BLOCK_OUTPUTS), jnp.uint8),
            plgpu.Barrier(num_arrivals=2, num_barriers=teams * stages),
            plgpu.Barrier(num_barriers=teams * scale_slots * WARPGROUPS),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=teams * stages),
        ],
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=teams * WARPGROUPS,
        thread_name="warpgroup",
        kernel_name="mxfp4_teams_" + ("down" if p.limit is None else "up"),
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


def by_teams(x_MD, experts_MX, weights_MX, w, *, limit, tile=None, **how):
    """The layer, as `many_rows.many_rows`."""
    from gpt_oss_jax.kernels.expert_matmul.tuning import tile_rows

    tile = tile or tile_rows(experts_MX.size, len(w.down_bias))
    with mock.patch.object(many_rows, "grouped", functools.partial(grouped, **how)):
        return many_rows.many_rows(x_MD, experts_MX, weights_MX, w, limit=limit, tile=tile)


WAYS = {
    "one team": {},
    "one team, three steps": {"together": 3},
    "two teams": {"teams": 2, "step": 6},
    "two teams, three steps": {"teams": 2, "step": 6, "together": 3},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("20b", "120b"), default="20b")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 128, 1024, 8192])
    parser.add_argument("--ways", choices=tuple(WAYS), nargs="+", default=list(WAYS))
    args = experts.seeded(parser)
    if reason := why_not_hopper():
        sys.exit(f"there is nothing to measure: {reason}")
    experts.KERNELS |= {name: functools.partial(by_teams, **how) for name, how in WAYS.items()}
    for kernel in ("many_rows", *args.ways, "many_rows"):
        experts.measure(kernel, args.model, args.rows, {"uniform": 0.0}, args.seed)


if __name__ == "__main__":
    main()
