"""The expert layer alone: right, then how fast, for each kernel, number of rows and routing.

`python benchmarks/experts.py [--model 20b] [--rows 1 8] [--kernels few_rows xla]`, on a Hopper GPU.
Weights, rows and routing are random and of full size: each row goes to any experts ("uniform") or
mostly to a few ("skewed"). The experts change from call to call, so that no weights are found in
the cache. Calls are timed inside one jitted loop, launches counted, and the loop's own time shown.
Each kernel has a process of its own, so that the others are measured whatever happens to one; each
prints the seed of its random inputs, which --seed repeats, and a line as soon as it knows it, and
ends with one line of JSON.
"""

import argparse
import functools
import json
import secrets
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss_jax import config, limits
from gpt_oss_jax.kernels import expert_mlp
from gpt_oss_jax.kernels.expert_matmul.few_rows import few_rows, words_of_room
from gpt_oss_jax.kernels.expert_matmul.many_rows import many_rows
from gpt_oss_jax.kernels.expert_matmul.tuning import MAX_FEW_ROWS, expert_tile, tile_rows
from gpt_oss_jax.kernels.expert_matmul.weights import ExpertWeights
from gpt_oss_jax.kernels.target import multiprocessors, why_not_hopper
from gpt_oss_jax.quant import MXArray

LIMIT, LARGEST_ERROR = 7.0, 1e-2
CALLS, LOOPS, REPEATS, RUN_SECONDS = 8, 40, 7, 0.03


def with_usual_tiles(x_MD, experts_MX, weights_MX, w, *, limit):
    """Those of the table, and where that has none, as few rows are faster, of the rule."""
    (M, X), (E, F, _, D) = experts_MX.shape, w.up.shape
    tile = expert_tile(M, (E, D, F), X, multiprocessors()) or tile_rows(M * X, E)
    return many_rows(x_MD, experts_MX, weights_MX, w, limit=limit, tile=tile)


def with_room(x_MD, experts_MX, weights_MX, w, *, limit):
    """As in a model, but that the room is made here."""
    room = jnp.full(words_of_room(*experts_MX.shape, w), -1, jnp.int32)
    return few_rows(x_MD, experts_MX, weights_MX, w, limit=limit, room=room)


KERNELS = {
    "few_rows": with_room,
    "many_rows": with_usual_tiles,
    "xla": functools.partial(expert_mlp, implementation="xla"),
}


def seeded(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, and the seed of all random inputs: drawn if none is given, and printed."""
    parser.add_argument("--seed", type=int, default=secrets.randbits(31), help="drawn without it")
    args = parser.parse_args()
    if args.seed < 0:
        parser.error(f"argument --seed: wanted 0 or more, got {args.seed}")
    print(f"seed {args.seed}", flush=True)
    return args


def weights(sizes: config.Config, seed: int) -> ExpertWeights:
    """One layer of random bf16 biases and MXFP4 matrices, made on the device."""
    E, D, F = sizes.num_experts, sizes.hidden_size, sizes.intermediate_size
    keys = jax.random.split(jax.random.key(seed), 6)

    @functools.partial(jax.jit, static_argnums=(1,))
    def packed(keys, shape):
        blocks = jax.random.bits(keys[0], (*shape[:-1], shape[-1] // 32, 16), jnp.uint8)
        scales = jax.random.randint(keys[1], blocks.shape[:-1], 112, 122)
        return MXArray(blocks, scales.astype(jnp.uint8), shuffled=True)

    return ExpertWeights(
        packed(keys[:2], (E, F, 2, D)),
        jax.random.normal(keys[2], (E, F, 2), jnp.bfloat16),
        packed(keys[3:5], (E, D, F)),
        jax.random.normal(keys[5], (E, D), jnp.bfloat16),
    )


def routing(sizes: config.Config, M: int, skew: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Experts and weights of M rows; with a skew, expert e is chosen about as often as e^-skew."""
    random = np.random.default_rng([seed, M])
    E, X = sizes.num_experts, sizes.experts_per_token
    scores = random.gumbel(size=(M, E)) - skew * np.log(np.arange(1, E + 1))
    chosen = np.argsort(-scores, axis=1)[:, :X]
    return chosen.astype(np.int32), random.dirichlet(np.ones(X), M).astype(np.float32)


def device_limits() -> tuple[float, float]:
    """Bytes read and written a second by copying, FLOPs a second of a bf16 product."""
    device = jax.devices()[0]
    return limits.copy_bandwidth(device), limits.matrix_rate(device, jnp.bfloat16)


def roofline(size: float, flops: float, bandwidth: float, rate: float, us: float) -> dict:
    """The time that bytes and FLOPs allow at these limits, and the share of it that is reached."""
    limit = max(size / bandwidth, flops / rate) * 1e6
    return {"limit_microseconds": limit, "percent_of_limit": 100 * limit / us}


@jax.jit
def reference(x, chosen, weight, w):
    """XLA in float32."""
    x = x.astype(jnp.float32)
    return expert_mlp(x, chosen, weight, w, limit=LIMIT, implementation="xla")


def errors(call, x, chosen, weight, w: ExpertWeights) -> tuple[float, float]:
    """Of a call, written over memory full of NaN: of the norm, and the largest over the largest."""
    want = reference(x, chosen, weight, w)
    poison = [jnp.full(2**n, jnp.nan) for n in range(8, 27)]
    jax.block_until_ready(poison)
    del poison
    got = call(x, chosen, weight, w).astype(jnp.float32)
    difference = got - want
    norm = jnp.linalg.norm(difference) / jnp.linalg.norm(want)
    return float(norm), float(jnp.abs(difference).max() / jnp.abs(want).max())


def in_a_loop(call):
    """A program that calls again and again, for each of the choices of experts in turn."""

    @jax.jit
    def loop(x, chosen, weight, w, loops):
        def body(_, y):
            for experts in chosen:
                y = x + jnp.bfloat16(1e-3) * call(y, experts, weight, w)
            return y

        return jax.lax.fori_loop(0, loops, body, x)

    return loop


def microseconds(loop, x, chosen, weight, w: ExpertWeights) -> float:
    """Median time of a call in a loop in which each waits for the one before."""

    def seconds(loops):
        start = time.perf_counter()
        jax.block_until_ready(loop(x, chosen, weight, w, loops))
        return time.perf_counter() - start

    seconds(1)
    loops = max(1, min(LOOPS, int(RUN_SECONDS / seconds(1))))
    times = [seconds(loops) for _ in range(REPEATS)]
    return statistics.median(times) / (loops * len(chosen)) * 1e6


def measure(kernel: str, model: str, counts: list[int], skews: dict[str, float], seed: int):
    """Checks a kernel for all numbers of rows, then times it where it is right."""
    sizes = {"20b": config.GPT_OSS_20B, "120b": config.GPT_OSS_120B}[model]
    E, X, D = sizes.num_experts, sizes.experts_per_token, sizes.hidden_size
    size_of_expert = 3 * D * sizes.intermediate_size
    w = weights(sizes, seed)
    # `fold_in` of the seed's own key would give the keys of the weights again.
    rows_key = jax.random.fold_in(jax.random.key(seed), 1 << 20)
    # Compiled once, however often the loop has it.
    call = jax.jit(functools.partial(KERNELS[kernel], limit=LIMIT))
    loop, empty_loop = in_a_loop(call), in_a_loop(lambda x, *_: x)
    results = []
    for M in counts:
        x = jax.random.normal(jax.random.fold_in(rows_key, M), (M, D), jnp.bfloat16)
        for name, skew in skews.items():
            args = x, *map(jnp.asarray, routing(sizes, M, skew, seed))
            result = {"kernel": kernel, "model": model, "rows": M, "routing": name}
            try:
                norm, largest = errors(call, *args, w)
            except Exception as error:  # Whatever it is, the next one is to be tried.
                say(result | {"failed": f"{type(error).__name__}: {str(error)[:300]}"})
                continue
            result |= {"relative_error": norm, "largest_error": largest}
            say(result | {"right": norm < LARGEST_ERROR})
            if norm < LARGEST_ERROR:
                results.append((result, args))
    bandwidth, rate = device_limits()
    say({"copy_tb_per_second": bandwidth / 1e12, "bf16_tflop_per_second": rate / 1e12})
    done = []
    for result, (x, chosen, weight) in results:
        M = len(x)
        rotated = jnp.stack([(chosen + X * i) % E for i in range(CALLS)])
        experts = len(np.unique(chosen))
        size, flops = experts * size_of_expert * 17 / 32, 2 * M * X * size_of_expert
        try:
            empty = microseconds(empty_loop, x, rotated, weight, w)
            us = microseconds(loop, x, rotated, weight, w)
        except Exception as error:
            say(result | {"failed": f"{type(error).__name__}: {str(error)[:300]}"})
            continue
        done.append(
            result
            | {
                "experts": experts,
                "megabytes": size / 1e6,
                "gigaflop": flops / 1e9,
                "microseconds": us,
                "loop_microseconds": empty,
                "gb_per_second": size / us / 1e3,
                "tflop_per_second": flops / us / 1e6,
            }
            | roofline(size, flops, bandwidth, rate, us)
        )
        say(done[-1])
    print(json.dumps([rounded(result) for result in done]), flush=True)


def rounded(result: dict) -> dict:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()}


def say(result: dict):
    print(", ".join(f"{k} {v}" for k, v in rounded(result).items()), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    rows = [1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192]
    parser.add_argument("--model", choices=("20b", "120b"), default="20b")
    parser.add_argument("--rows", type=int, nargs="+", default=rows)
    parser.add_argument("--routing", choices=("uniform", "skewed"), nargs="+")
    parser.add_argument("--kernels", choices=tuple(KERNELS), nargs="+", default=list(KERNELS))
    parser.add_argument("--seconds", type=float, default=180, help="for each kernel; then the next")
    args = seeded(parser)
    if args.kernels != ["xla"] and (reason := why_not_hopper()):
        sys.exit(f"there is nothing to measure but --kernels xla: {reason}")
    if len(args.kernels) == 1:
        (kernel,) = args.kernels
        counts = [M for M in args.rows if M <= MAX_FEW_ROWS or kernel != "few_rows"]
        skews = {"uniform": 0.0, "skewed": 1.5}
        skews = {k: skews[k] for k in args.routing or skews}
        measure(kernel, args.model, counts, skews, args.seed)
        return
    for kernel in args.kernels:
        command = [sys.executable, *sys.argv, "--kernels", kernel, "--seed", str(args.seed)]
        try:
            subprocess.run(command, timeout=args.seconds)
        except subprocess.TimeoutExpired:
            print(f"kernel {kernel}: not done in {args.seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
