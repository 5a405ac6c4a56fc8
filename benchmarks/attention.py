"""Attention while decoding: right, then how fast, for each size of batch and cache.

`python benchmarks/attention.py [--blocks 8 16] [--warps 8] [--kernels few_queries xla]`, on a
Hopper GPU, with the heads of gpt-oss (8 of 64 for keys, 8 queries to each). First small caches of
every kind are held against XLA in float32, the result written over memory full of NaN; then those
to be timed. Calls are timed inside one jitted loop, each waiting for the one before, over so many
caches in turn that none but the smallest is found in L2; launches are counted and the loop's own
time is shown. The limit is the time that copying an array takes to move as many bytes as the
visible keys and values have. Prints a line as soon as it knows it.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss_jax.kernels import attention
from gpt_oss_jax.kernels.attention.few_queries import launch, program, whole_tiles

K, G, H = 8, 8, 64
KERNELS = ("few_queries", "xla")
LARGEST_ERROR = 2e-2
COLD_BYTES, MAX_CACHES = 1.2e8, 48
REPEATS, RUN_SECONDS = 5, 0.02
# Rows, slots, of which so many are used, window.
TIMED = (
    (1, 128, 128, 128),
    (1, 1024, 1024, None),
    (1, 8192, 8192, None),
    (1, 131072, 131072, None),
    (1, 131072, 1024, None),
    (8, 128, 128, 128),
    (8, 1024, 1024, None),
    (8, 8192, 8192, None),
    (32, 128, 128, 128),
    (32, 1024, 1024, None),
    (128, 128, 128, 128),
    (128, 1024, 1024, None),
)


def positions(B: int, S: int, used: int, window: int | None) -> dict[str, jax.Array]:
    """Of a cache in which each row ends at slot `used`, or of a ring that has gone round."""
    at = used - 1 if window is None else 1000
    slots = np.arange(S)
    k_pos = at - (at - slots) % S if window else np.where(slots < used, slots, -1)
    return {
        "q_pos_BT": jnp.full((B, 1), at, jnp.int32),
        "k_pos_BS": jnp.asarray(np.broadcast_to(k_pos, (B, S)), jnp.int32),
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def arrays(shape: tuple[int, ...], S: int, number: int):
    """Queries, sinks, and keys and values of some caches."""
    B, _, K, G, H = shape
    keys = jax.random.split(jax.random.key(S), 2 * number + 2)
    normal = lambda i, shape: jax.random.normal(keys[i], shape, jnp.bfloat16)
    caches = [[normal(2 * n + i, (B, S, K, H)) for i in (2, 3)] for n in range(number)]
    return 2 * normal(0, shape), normal(1, (K, G)), caches


@functools.partial(jax.jit, static_argnames="window")
def reference(q, k, v, sinks, **where):
    """XLA in float32, row by row."""
    window = where.pop("window")
    q, k, v, sinks = (a.astype(jnp.float32) for a in (q, k, v, sinks))

    def row(x):
        q, k, v, *pos = (a[None] for a in x)
        where = {"q_pos_BT": pos[0], "k_pos_BS": pos[1], "window": window}
        return attention(q, k, v, sinks, **where, implementation="xla")[0]

    return jax.lax.map(row, (q, k, v, where["q_pos_BT"], where["k_pos_BS"]))


def error(call, q, k, v, sinks, where, window) -> float:
    """Largest difference of a call, written over memory full of NaN."""
    want = reference(q, k, v, sinks, **where, window=window)
    poison = [jnp.full(2**n, jnp.nan) for n in range(8, 24)]
    jax.block_until_ready(poison)
    del poison
    return float(jnp.abs(jax.jit(call)(q, k, v, sinks, **where).astype(jnp.float32) - want).max())


def unusual():
    """Caches that test what the timed ones do not: shape [B, T, K, G, H], positions and window."""
    random = np.random.default_rng(0)
    for B, T, K, G, S, window in (
        (3, 1, 8, 8, 200, None),
        (2, 1, 8, 8, 1000, 128),
        (4, 1, 2, 2, 77, 16),
        (2, 4, 2, 2, 520, 100),
        (1, 8, 3, 1, 5000, None),
        (16, 1, 8, 8, 2048, None),
        (5, 1, 8, 7, 300, 1),
    ):
        used = random.integers(T, S + 1, B)  # Rows of different length.
        used[0] = S
        k_pos = np.where(np.arange(S) < used[:, None], np.arange(S), -1)
        for row in k_pos:
            random.shuffle(row)
        q_pos = used[:, None] - 1 - np.arange(T)[::-1]
        if B > 2:
            q_pos[1] = -1
            k_pos[2] = -1
        where = {
            "q_pos_BT": jnp.asarray(q_pos, jnp.int32),
            "k_pos_BS": jnp.asarray(k_pos, jnp.int32),
        }
        yield (B, T, K, G, H), S, where, window


def in_a_loop(call, where):
    """A program that calls again and again, with each of the caches in turn."""
    call = jax.jit(call)

    @jax.jit
    def loop(q, sinks, caches, where, loops):
        def body(_, q):
            for k, v in caches:
                q = q + jnp.bfloat16(1e-3) * call(q, k, v, sinks, **where)
            return q

        return jax.lax.fori_loop(0, loops, body, q)

    return lambda q, sinks, caches, loops: loop(q, sinks, caches, where, loops)


def microseconds(loop, q, sinks, caches) -> float:
    """Median time of a call."""

    def seconds(loops):
        start = time.perf_counter()
        jax.block_until_ready(loop(q, sinks, caches, loops))
        return time.perf_counter() - start

    seconds(1)
    loops = max(1, int(RUN_SECONDS / seconds(1)))
    times = [seconds(loops) for _ in range(REPEATS)]
    return statistics.median(times) / (loops * len(caches)) * 1e6


def copy_bytes_per_second() -> float:
    """Read and written, of 4 GB; best of several."""
    x = jnp.zeros(2**30, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(x))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(4):
            y = copy(x)
        jax.block_until_ready(y)
        times.append((time.perf_counter() - start) / 4)
    return 2 * x.nbytes / min(times)


def plans(shape, S, window, kernel, blocks, warps):
    """Name and call for every way to spread the work that was asked for."""
    if kernel == "xla":
        yield "xla", functools.partial(attention, window=window, implementation="xla")
        return
    for given in itertools.product(blocks or [None], warps or [None]):
        given = {k: v for k, v in zip(("blocks", "warps"), given, strict=True) if v}
        run = dataclasses.replace(program(shape, S, window), **given)

        def call(q, k, v, sinks, *, q_pos_BT, k_pos_BS, run=run):
            return launch(run, q, k, v, sinks, q_pos_BT, whole_tiles(k_pos_BS))

        yield f"few_queries blocks {run.blocks} warps {run.warps}", call


def check(call, cache, where, window) -> dict:
    """Whether a call is right."""
    difference = error(call, *cache, where, window)
    return {"largest_error": difference, "right": difference < LARGEST_ERROR}


def measure(call, q, sinks, caches, where, window, size: int, limit: float) -> dict:
    """Time of a call that is right."""
    result = check(call, (q, *caches[0], sinks), where, window)
    if not result["right"]:
        return result
    glue = microseconds(in_a_loop(lambda q, *_, **__: q, where), q, sinks, caches)
    us = microseconds(in_a_loop(call, where), q, sinks, caches)
    return result | {
        "caches": len(caches),
        "megabytes": size / 1e6,
        "microseconds": us,
        "loop_microseconds": glue,
        "limit_microseconds": limit,
        "gb_per_second": size / us / 1e3,
        "percent_of_limit": 100 * limit / us,
    }


def say(name: str, work, *args):
    """Works and prints what came; whatever fails, the next one is to be tried."""
    try:
        result = work(*args)
    except Exception as failure:
        result = {"failed": f"{type(failure).__name__}: {str(failure)[:300]}"}
    numbers = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items())
    print(f"{name}: {', '.join(numbers)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", choices=KERNELS, nargs="+", default=KERNELS[:1])
    parser.add_argument("--blocks", type=int, nargs="+", default=[], help="of a cluster")
    parser.add_argument("--warps", type=int, nargs="+", default=[], help="of a block")
    parser.add_argument("--rows", type=int, nargs="+", help="time these only")
    parser.add_argument("--slots", type=int, nargs="+", help="time these only")
    args = parser.parse_args()

    for shape, S, where, window in unusual():
        q, sinks, [(k, v)] = arrays(shape, S, 1)
        for name, call in plans(shape, S, window, KERNELS[0], args.blocks, args.warps):
            name = f"check {name}, queries {list(shape)}, slots {S}, window {window}"
            say(name, check, call, (q, k, v, sinks), where, window)

    speed = copy_bytes_per_second()
    print(f"copying reads and writes {speed / 1e12:.3g} TB/s", flush=True)
    for B, S, used, window in TIMED:
        if args.rows and B not in args.rows or args.slots and S not in args.slots:
            continue
        size, visible = 4 * B * S * K * H, 4 * B * used * K * H
        number = max(1, min(MAX_CACHES, int(COLD_BYTES / visible), int(8e9 / size)))
        shape, where = (B, 1, K, G, H), positions(B, S, used, window)
        data = arrays(shape, S, number)
        for kernel in args.kernels:
            for name, call in plans(shape, S, window, kernel, args.blocks, args.warps):
                name = f"{name}, rows {B}, slots {S}, used {used}"
                say(name, measure, call, *data, where, window, visible, visible / speed * 1e6)
        del data


if __name__ == "__main__":
    main()
