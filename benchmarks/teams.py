"""An experiment: experts of small tiles by two teams to a multiprocessor, against `many_rows`.

On a Hopper, from the root: python benchmarks/teams.py --rows 64 128
Why, and what is expected: results/2026-11-29-h200-first-token.md. Tiles have 32 places, of which
the 8, 16 or 32 that are needed are copied. A thread block has two teams of three warpgroups, each
with products of its own; the first warpgroup of a team starts the copies of a step once all three
have read what was there before. Lines are those of `experts.py`, both kernels by turns.
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

TILE, STEP = 32, 6  # With ten blocks a step, two stages do not fit.
TEAMS, WARPGROUPS = 2, 3
SHARED_BYTES = 226 << 10
_BLOCK_OUTPUTS = WARPGROUPS * OUTPUTS


def grouped(p, w, bias, tiles, x_RK, weights_R=None, *, scale_slots=2, fit=True):
    """`many_rows.grouped`, with `scale_slots` products' scales and, if not `fit`, whole tiles."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    p = dataclasses.replace(p, step=STEP)
    (T, P), E = tiles.pairs.shape, w.scales.shape[0]
    stripes, steps = p.outputs // _BLOCK_OUTPUTS, p.blocks // p.step
    scale_rows = OUTPUTS * p.blocks // _BLOCK_OUTPUTS
    scale_bytes = scale_slots * _BLOCK_OUTPUTS * p.blocks
    stage_bytes = (_BLOCK_OUTPUTS * 16 + P * 64) * p.step
    stages = min(6, (SHARED_BYTES // TEAMS - scale_bytes - 512) // stage_bytes)
    # Whoever fetches scales has waited until all have read those that were there.
    stages = min(stages, scale_slots * steps)
    sizes = [n for n in (8, 16) if n < P and fit] + [P]
    size_T = sum((tiles.pairs[:, n] >= 0).astype(jnp.int32) for n in sizes[:-1])
    more = () if weights_R is None else (weights_R,)
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def block(experts, size_of, count, blocks, scales, x, bias, *rest):
        *weights, out, w_smem, x_smem, scales_smem, here, scales_here, done = rest
        thread = lax.axis_index("warpgroup")
        team, warpgroup = thread // WARPGROUPS, lax.rem(thread, jnp.int32(WARPGROUPS))
        first = lax.axis_index("block") + team * grid
        products = count[0] * stripes
        own = lax.max(0, (products - first + teams - 1) // teams)
        places = many_rows._places_of_thread(p)()
        slot_of = lambda step: team * stages + lax.rem(step, jnp.int32(stages))
        scales_of = lambda n: team * scale_slots + lax.rem(n, jnp.int32(scale_slots))

        def place(n):
            """Tile, expert and stripe of outputs of the team's product n."""
            product = first + n * teams
            t = product // stripes
            return t, experts[t], product % stripes

        def copy(step):
            """Weights and rows of the team's step, once all have read what its slot had."""
            slot = slot_of(step)

            @pl.when(step < own * steps)
            def _():
                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(done.at[slot])

                t, expert, stripe = place(step // steps)
                k = lax.rem(step, jnp.int32(steps))
                outputs = pl.ds((expert * stripes + stripe) * _BLOCK_OUTPUTS, _BLOCK_OUTPUTS)
                inputs = pl.ds(k * 16 * p.step, 16 * p.step)
                plgpu.copy_gmem_to_smem(
                    blocks.at[outputs, inputs], w_smem.at[slot], here.at[slot]
                )

                def copy_rows(rows):
                    source = x.at[pl.ds(t * P, rows), pl.ds(k * 32 * p.step, 32 * p.step)]
                    target = x_smem.at[slot, pl.ds(0, rows)]
                    plgpu.copy_gmem_to_smem(source, target, here.at[slot])

                for number, rows in enumerate(sizes):
                    pl.when(size_of[t] == number)(functools.partial(copy_rows, rows))

        def fetch_scales(n):
            @pl.when(n < own)
            def _():
                _, expert, stripe = place(n)
                rows = WARPGROUPS * scale_rows
                source = scales.at[pl.ds((expert * stripes + stripe) * rows, rows)]
                slot = scales_of(n)
                plgpu.copy_gmem_to_smem(source, scales_smem.at[slot], scales_here.at[slot])

        @pl.when(warpgroup == 0)
        def _():
            for n in range(scale_slots):
                fetch_scales(jnp.int32(n))
            pl.loop(0, stages)(copy)

        @pl.loop(0, own)
        def _(n):
            plgpu.barrier_wait(scales_here.at[scales_of(n)])
            own_scales = scales_smem.at[scales_of(n), pl.ds(warpgroup * scale_rows, scale_rows)]

            def multiply(sums):
                @pl.loop(0, steps)
                def _(k):
                    step = n * steps + k
                    slot = slot_of(step)
                    plgpu.barrier_wait(here.at[slot])
                    own_w = w_smem.at[slot, pl.ds(warpgroup * OUTPUTS, OUTPUTS)]
                    loaded = many_rows._load(p)(own_w, own_scales, k, *places)
                    for i in range(p.step // 2):
                        x_pair = x_smem.at[slot, :, pl.ds(64 * i, 64)].transpose((1, 0))
                        plgpu.wgmma(sums, many_rows._decode(p, i)(loaded), x_pair)
                        plgpu.wgmma_wait(int(i < p.step // 2 - 1))
                    plgpu.barrier_arrive(done.at[slot])

                    @pl.when(warpgroup == 0)
                    def _():
                        copy(step + stages)

                return sums[...]

            sums = pl.run_scoped(multiply, plgpu.ACC((OUTPUTS, P), jnp.float32))

            @pl.when(warpgroup == 0)
            def _():
                fetch_scales(n + scale_slots)

            t, expert, stripe = place(n)
            outputs, sharing = stripe * WARPGROUPS + warpgroup, p.outputs // p.width
            many_rows._finish(p, len(weights))(
                sums,
                outputs % sharing,
                bias.at[expert, pl.ds(outputs * OUTPUTS, OUTPUTS)],
                out.at[pl.ds(t * P, P), pl.ds(outputs // sharing * OUTPUTS, OUTPUTS)],
                *(a.at[pl.ds(t * P, P)] for a in weights),
            )

    grid = min(many_rows.multiprocessors(), T * stripes)
    teams = TEAMS * grid
    return plgpu.kernel(
        block,
        out_type=jax.ShapeDtypeStruct((T * P, p.width), jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM((TEAMS * stages, _BLOCK_OUTPUTS, 16 * p.step), jnp.uint8),
            plgpu.SMEM((TEAMS * stages, P, 32 * p.step), jnp.bfloat16, transforms=tiled),
            plgpu.SMEM(
                (TEAMS * scale_slots, WARPGROUPS * scale_rows, _BLOCK_OUTPUTS), jnp.uint8
            ),
            plgpu.Barrier(num_arrivals=2, num_barriers=TEAMS * stages),
            plgpu.Barrier(num_barriers=TEAMS * scale_slots),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=TEAMS * stages),
        ],
        grid=(grid,),
        grid_names=("block",),
        num_threads=TEAMS * WARPGROUPS,
        thread_name="warpgroup",
        kernel_name="mxfp4_teams_" + ("down" if p.limit is None else "up"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(
        tiles.expert_of_tile.astype(jnp.int32),
        jnp.broadcast_to(size_T, T).astype(jnp.int32),
        tiles.count.astype(jnp.int32).reshape(1),
        w.blocks.reshape(E * p.outputs, 16 * p.blocks),
        w.scales.reshape(-1, _BLOCK_OUTPUTS),
        x_RK,
        bias.reshape(E, p.outputs),
        *more,
    )


def by_teams(x_MD, experts_MX, weights_MX, w, *, limit, tile=TILE, **how):
    """The layer, as `many_rows.many_rows`."""
    with mock.patch.object(many_rows, "grouped", functools.partial(grouped, **how)):
        return many_rows.many_rows(x_MD, experts_MX, weights_MX, w, limit=limit, tile=tile)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("20b", "120b"), default="20b")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 128])
    args = experts.seeded(parser)
    if reason := why_not_hopper():
        sys.exit(f"there is nothing to measure: {reason}")
    ways = {
        "teams": {},
        "teams, one product's scales": {"scale_slots": 1},
        "teams, whole tiles": {"fit": False},
        "teams, tiles of 8": {"tile": 8},
    }
    experts.KERNELS |= {name: functools.partial(by_teams, **how) for name, how in ways.items()}
    for kernel in ("many_rows", *ways, "many_rows", "teams"):
        experts.measure(kernel, args.model, args.rows, {"uniform": 0.0}, args.seed)


if __name__ == "__main__":
    main()
