"""Attention while decoding: right, then how fast, for each size of batch and cache.

`python benchmarks/attention.py [--blocks 8 16] [--warps 8] [--splits 1 2] [--kernels stored]`, on
a Hopper GPU, with the heads of gpt-oss (8 of 64 for keys, 8 queries to each). First small caches of
every kind are held against XLA in float32, the result written over memory full of NaN; then those
to be timed. Calls are timed inside one jitted loop, each waiting for the one before, over so many
caches in turn that none but the smallest is found in L2; launches are counted and the loop's own
time is shown. Where the clusters of a head meet in global memory, filling it with -1 is timed, too,
which in a model the launch before does. "stored" writes a key and a value a row into the cache as
well. The limit is the time that copying an array takes to move as many bytes as the visible keys
and values have. Prints the seed of the random inputs first, which --seed repeats, and a line as
soon as it knows it.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from experts import seeded

from gpt_oss_jax import limits
from gpt_oss_jax.kernels import attention
from gpt_oss_jax.kernels.attention import xla
from gpt_oss_jax.kernels.attention.few_queries import (
    launch,
    launch_storing,
    program,
    room_for,
    whole_tiles,
)
from gpt_oss_jax.kernels.target import why_not_hopper

K, G, H = 8, 8, 64
KERNELS = ("few_queries", "stored", "xla")
RELATIVE_ERROR = 1e-2
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
def arrays(shape: tuple[int, ...], S: int, number: int, seed: int):
    """Queries, sinks, and keys and values of some caches."""
    B, _, K, G, H = shape
    key = jax.random.fold_in(jax.random.key(seed), S)
    keys = jax.random.split(key, 2 * number + 2)
    normal = lambda i, shape: jax.random.normal(keys[i], shape, jnp.bfloat16)
    caches = [[normal(2 * n + i, (B, S, K, H)) for i in (2, 3)] for n in range(number)]
    return 2 * normal(0, shape), normal(1, (K, G)), caches


def beside(q, k, where):
    """What "stored" writes: new keys and values, made of queries, and the slots they go to."""
    B, T, K, _, H = q.shape
    slots = jnp.argmax(where["k_pos_BS"] == where["q_pos_BT"][:, -1:], axis=1)[:, None]
    visible = (where["q_pos_BT"][:, -1:] >= 0) & (where["k_pos_BS"] >= 0).any(axis=1, keepdims=True)
    slots = jnp.where(visible, slots, k.shape[1]).astype(jnp.int32)
    return q[:, :, :, 0] * 0.5, q[:, :, :, -1] * 0.5, slots


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


def errors(kernel, call, q, k, v, sinks, where, window) -> tuple[float, float]:
    """Of a call, written over memory full of NaN: of the norm, and the largest difference."""
    k_want, v_want, new = k, v, beside(q, k, where)
    if kernel == "stored":
        k_new, v_new, slots = new
        k_want, v_want = xla.write(k, slots, k_new), xla.write(v, slots, v_new)
    want = reference(q, k_want, v_want, sinks, **where, window=window)
    poison = [jnp.full(2**n, jnp.nan) for n in range(8, 24)]
    jax.block_until_ready(poison)
    del poison
    got, k, v = jax.jit(call)(q, k, v, sinks, new, **where)
    if not (k == k_want).all() or not (v == v_want).all():
        return float("inf"), float("inf")
    difference = got.astype(jnp.float32) - want
    relative = jnp.linalg.norm(difference) / jnp.linalg.norm(want)
    return float(relative), float(jnp.abs(difference).max())


def unusual(seed: int):
    """Caches that test what the timed ones do not: shape [B, T, K, G, H], positions and window."""
    random = np.random.default_rng(seed)
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
        new = beside(q, caches[0][0], where)

        def body(_, carried):
            q, caches = carried
            after = []
            for k, v in caches:
                heads, k, v = call(q, k, v, sinks, new, **where)
                q = q + jnp.bfloat16(1e-3) * heads
                after.append([k, v])
            return q, after

        return jax.lax.fori_loop(0, loops, body, (q, caches))[0]

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


def plans(shape, S, window, kernel, blocks, warps, splits):
    """Name and call for every way to spread the work that was asked for."""
    if kernel == "xla":
        plain = functools.partial(attention, window=window, implementation="xla")
        yield "xla", lambda q, k, v, sinks, _, **where: (plain(q, k, v, sinks, **where), k, v)
        return
    for given in itertools.product(blocks or [None], warps or [None], splits or [None]):
        given = {k: v for k, v in zip(("blocks", "warps", "splits"), given, strict=True) if v}
        if "blocks" in given:
            given = {"splits": 1} | given
        run = dataclasses.replace(program(shape, S, window), **given, stores=kernel == "stored")

        def call(q, k, v, sinks, new, *, q_pos_BT, k_pos_BS, run=run):
            inputs = sinks, q_pos_BT, whole_tiles(k_pos_BS)
            if not run.stores:
                return launch(run, q, k, v, *inputs, *room_for(run)), k, v
            inputs = *(flat(x) for x in (k, v)), *inputs, *new, *room_for(run)
            heads, *after = launch_storing(run, q, *inputs)
            return heads, *(x.reshape(k.shape) for x in after)

        yield f"{kernel} blocks {run.blocks} warps {run.warps} splits {run.splits}", call


def flat(k_BSKH: jax.Array) -> jax.Array:
    return k_BSKH.reshape(*k_BSKH.shape[:2], -1)


def check(kernel, call, cache, where, window) -> dict:
    """Whether a call is right."""
    relative, largest = errors(kernel, call, *cache, where, window)
    right = relative < RELATIVE_ERROR
    return {"relative_error": relative, "largest_error": largest, "right": right}


def measure(kernel, call, q, sinks, caches, where, window, size: int, limit: float) -> dict:
    """Time of a call that is right."""
    result = check(kernel, call, (q, *caches[0], sinks), where, window)
    if not result["right"]:
        return result
    glue = microseconds(in_a_loop(lambda q, k, v, *_, **__: (q, k, v), where), q, sinks, caches)
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
    parser.add_argument("--kernels", choices=KERNELS, nargs="+", default=KERNELS[:2])
    parser.add_argument("--blocks", type=int, nargs="+", default=[], help="of a cluster")
    parser.add_argument("--warps", type=int, nargs="+", default=[], help="of a block")
    parser.add_argument(
        "--splits", type=int, nargs="+", default=[], choices=range(1, 17), help="clusters of a head"
    )
    parser.add_argument("--rows", type=int, nargs="+", help="time these only")
    parser.add_argument("--slots", type=int, nargs="+", help="time these only")
    args = seeded(parser)
    if reason := why_not_hopper():
        sys.exit(f"there is nothing to measure: {reason}")
    ways = args.blocks, args.warps, args.splits

    for shape, S, where, window in unusual(args.seed):
        q, sinks, [(k, v)] = arrays(shape, S, 1, args.seed)
        for kernel in KERNELS[: 2 if shape[1] == 1 else 1]:
            for name, call in plans(shape, S, window, kernel, *ways):
                name = f"check {name}, queries {list(shape)}, slots {S}, window {window}"
                say(name, check, kernel, call, (q, k, v, sinks), where, window)

    speed = limits.copy_bandwidth(jax.devices()[0])
    print(f"copying reads and writes {speed / 1e12:.3g} TB/s", flush=True)
    for B, S, used, window in TIMED:
        if args.rows and B not in args.rows or args.slots and S not in args.slots:
            continue
        whole, visible = 4 * B * S * K * H, 4 * B * used * K * H
        number = max(1, min(MAX_CACHES, int(COLD_BYTES / visible), int(8e9 / whole)))
        shape, where = (B, 1, K, G, H), positions(B, S, used, window)
        data = arrays(shape, S, number, args.seed)
        for kernel in args.kernels:
            for name, call in plans(shape, S, window, kernel, *ways):
                name = f"{name}, rows {B}, slots {S}, used {used}"
                say(
                    name,
                    measure,
                    kernel,
                    call,
                    *data,
                    where,
                    window,
                    visible,
                    visible / speed * 1e6,
                )
        del data


if __name__ == "__main__":
    main()
