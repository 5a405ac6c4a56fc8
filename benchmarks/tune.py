"""Finds the fastest expert kernel and tile for each number of rows, on the Hopper that is here.

`python benchmarks/tune.py [--models 20b 120b]` tries those that can be the best, holds them against
each other, and writes what it finds into the table that the package reads
(`kernels/expert_matmul/tuning.json`); other devices' entries stay. A few minutes. Whether a kernel
is right, `experts.py` tells.
"""

import argparse
import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
from experts import CALLS, LARGEST_ERROR, LIMIT, in_a_loop, microseconds, routing, weights

from gpt_oss_jax import config
from gpt_oss_jax.kernels.expert_matmul import tuning
from gpt_oss_jax.kernels.expert_matmul.few_rows import few_rows
from gpt_oss_jax.kernels.expert_matmul.many_rows import many_rows
from gpt_oss_jax.kernels.target import multiprocessors, why_not_hopper

ROWS = [2**n for n in range(14)]
# What a choice must be faster by than the rule's to be taken: less is noise.
GAIN = 0.02


def candidates(rows: int, experts: int, choices: int) -> list[int | None]:
    """Tiles around the mean number of an expert's rows, and None for `few_rows`; the rule's first.

    What reads weights, as up to five rows an expert do, nobody but `few_rows` can win.
    """
    pairs = rows * choices
    if pairs >= 256 * experts:
        return [tuning.tile_rows(pairs, experts)]
    first = tuning.default_tile(rows, experts, choices)
    if pairs <= 5 * experts and rows <= tuning.MAX_FEW_ROWS:
        return [first]
    usual = tuning.tile_rows(pairs, experts)
    near = [n for n in (usual // 2, usual, 2 * usual) if 8 <= n <= 128]
    few = [None] * (rows <= tuning.MAX_FEW_ROWS and pairs <= 16 * experts)
    return sorted({*near, *few}, key=lambda tile: (tile != first, tile or 0))


def tuned(model: str) -> tuple[str, dict[int, int | None]]:
    """Shape of a model's experts, and the fastest tile for each number of rows."""
    sizes = {"20b": config.GPT_OSS_20B, "120b": config.GPT_OSS_120B}[model]
    E, X, D = sizes.num_experts, sizes.experts_per_token, sizes.hidden_size
    w, found = weights(sizes, seed=0), {}
    for M in ROWS:
        tiles = candidates(M, E, X)
        found[M], best, want = tiles[0], None, None
        for tile in tiles if len(tiles) > 1 else ():
            call = functools.partial(many_rows, tile=tile) if tile else few_rows
            # Compiled once, however often the loop has it.
            call = jax.jit(functools.partial(call, limit=LIMIT))
            chosen, weight = map(jnp.asarray, routing(sizes, M, 0.0, seed=0))
            x = jax.random.normal(jax.random.key(M), (M, D), jnp.bfloat16)
            got = call(x, chosen, weight, w).astype(jnp.float32)
            want = got if want is None else want
            error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
            if not error < LARGEST_ERROR:
                sys.exit(f"{model}, {M} rows, tiles {tiles[0]} and {tile} differ by {error:.1e}")
            turned = jnp.stack([(chosen + X * i) % E for i in range(CALLS)])
            us = microseconds(in_a_loop(call), x, turned, weight, w)
            print(f"{model} {M:5} rows, {tile or 'few rows':>8}: {us:7.1f} us", flush=True)
            if best is None or us < (1 - GAIN) * best:
                found[M], best = tile, us
    return tuning.shape_key((E, D, sizes.intermediate_size), X), found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", choices=("20b", "120b"), nargs="+", default=["20b", "120b"])
    args = parser.parse_args()
    if reason := why_not_hopper():
        sys.exit(f"there is nothing to tune: {reason}")
    start = time.perf_counter()
    for model in args.models:
        shape, found = tuned(model)
        table = json.loads(tuning.TABLE.read_text()) if tuning.TABLE.exists() else {}
        table.setdefault(tuning.device_key(multiprocessors()), {})[shape] = found
        tuning.TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{time.perf_counter() - start:.0f} s; written to {tuning.TABLE}")


if __name__ == "__main__":
    main()
