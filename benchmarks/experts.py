"""The expert layer alone: right, then how fast, for each implementation and number of rows.

`python benchmarks/experts.py [--model 20b] [--rows 1 8] [--implementation mosaic_gpu xla]`, on an
accelerator. Weights, rows and routing are random and of full size; the choice of experts changes
from call to call, so that no weights are found in the cache. Calls are timed inside one jitted
loop, launches counted, and the loop's own time shown. Ends with one JSON line.
"""

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss_jax import config
from gpt_oss_jax.kernels import expert_mlp
from gpt_oss_jax.kernels.expert_matmul.weights import ExpertWeights
from gpt_oss_jax.quant import MXArray

CALLS, LOOPS, REPEATS = 8, 40, 7
LIMIT = 7.0


def weights(sizes: config.Config) -> ExpertWeights:
    """One layer of random bf16 biases and MXFP4 matrices, made on the device."""
    E, D, F = sizes.num_experts, sizes.hidden_size, sizes.intermediate_size
    keys = jax.random.split(jax.random.key(0), 6)

    @functools.partial(jax.jit, static_argnums=(1,))
    def packed(keys, shape):
        blocks = jax.random.bits(keys[0], (*shape[:-1], shape[-1] // 32, 16), jnp.uint8)
        scales = jax.random.randint(keys[1], blocks.shape[:-1], 112, 122)
        return MXArray(blocks, scales.astype(jnp.uint8))

    return ExpertWeights(
        packed(keys[:2], (E, F, 2, D)),
        jax.random.normal(keys[2], (E, F, 2), jnp.bfloat16),
        packed(keys[3:5], (E, D, F)),
        jax.random.normal(keys[5], (E, D), jnp.bfloat16),
    )


def copied_bytes_per_second() -> float:
    """Bytes read and written by copying 4 GB, best of several."""
    x = jnp.zeros(2**30, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(x))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(8):
            y = copy(x)
        jax.block_until_ready(y)
        times.append((time.perf_counter() - start) / 8)
    return 2 * x.nbytes / min(times)


def relative_error(call, w: ExpertWeights, x, chosen, weight) -> float:
    """Against XLA in float32, the call's result written over memory full of NaN."""
    want = jax.jit(lambda *a: expert_mlp(*a, limit=LIMIT, implementation="xla"))(
        x.astype(jnp.float32), chosen, weight, w
    )
    poison = [jnp.full(2**n, jnp.nan) for n in range(8, 24)]
    jax.block_until_ready(poison)
    del poison
    got = jax.jit(call)(x, chosen, weight, w).astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def microseconds(call, w: ExpertWeights, x, chosen, weight) -> float:
    """Median time of a call in a loop in which each waits for the one before."""

    @jax.jit
    def loop(x, w):
        def body(_, y):
            for experts in chosen:
                y = x + jnp.bfloat16(1e-3) * call(y, experts, weight, w)
            return y

        return jax.lax.fori_loop(0, LOOPS, body, x)

    jax.block_until_ready(loop(x, w))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(loop(x, w))
        times.append(time.perf_counter() - start)
    return statistics.median(times) / (LOOPS * len(chosen)) * 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("20b", "120b"), default="20b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--implementation", nargs="+", default=["mosaic_gpu", "xla"])
    args = parser.parse_args()
    sizes = {"20b": config.GPT_OSS_20B, "120b": config.GPT_OSS_120B}[args.model]
    E, X, D, F = (
        sizes.num_experts,
        sizes.experts_per_token,
        sizes.hidden_size,
        sizes.intermediate_size,
    )
    bandwidth, w = copied_bytes_per_second(), weights(sizes)
    random = np.random.default_rng(0)
    print(f"{args.model} on {jax.devices()[0].device_kind}, copies at {bandwidth / 1e12:.2f} TB/s")
    rows = []
    for M in args.rows:
        x = jnp.asarray(random.normal(size=(M, D)), jnp.bfloat16)
        weight = jnp.asarray(random.dirichlet(np.ones(X), M), jnp.float32)
        # Each call takes the next experts of every row's own order: none is in the cache by then.
        order = [random.permutation(E) for _ in range(M)]
        chosen = [np.stack([np.roll(o, -X * i)[:X] for o in order]) for i in range(CALLS)]
        distinct = statistics.mean(len(np.unique(c)) for c in chosen)
        size = distinct * 3 * D * F * 17 / 32
        chosen = [jnp.asarray(c, jnp.int32) for c in chosen]
        empty = microseconds(lambda x, *_: x, w, x, chosen, weight)
        for name in args.implementation:
            call = functools.partial(expert_mlp, limit=LIMIT, implementation=name)
            error = relative_error(call, w, x, chosen[0], weight)
            if not error < 1e-2:
                raise SystemExit(f"{name} with {M} rows is wrong: relative error {error:.1e}")
            us = microseconds(call, w, x, chosen, weight)
            rows.append(
                {
                    "implementation": name,
                    "rows": M,
                    "experts": round(distinct, 1),
                    "megabytes": round(size / 1e6, 1),
                    "microseconds": round(us, 1),
                    "loop_microseconds": round(empty, 1),
                    "tb_per_second": round(size / us / 1e6, 2),
                    "percent_of_bandwidth": round(100 * size / us * 1e6 / bandwidth, 1),
                    "relative_error": float(f"{error:.1e}"),
                }
            )
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    print(json.dumps({"model": args.model, "copy_tb_per_second": bandwidth / 1e12, "rows": rows}))


if __name__ == "__main__":
    main()
