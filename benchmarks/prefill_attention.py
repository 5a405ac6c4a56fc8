"""The attention of many queries alone: right, then how fast, for prompts, chunks and rings.

`python benchmarks/prefill_attention.py [--cases 8k] [--forms 3,128 2,128] [--xla]`, on a
Hopper GPU. Keys and values are random, heads those of 20b. Right means: of some queries of
each case the result, written over memory full of NaN, against XLA in float32. What is right is
timed inside a jitted loop of twelve calls, as many as 20b has layers of a kind, which share their
lists of tiles; launches, lists and about 1 us of glue count. FLOPs are those of visible
pairs. Prints the seed first, which --seed repeats, and a line as soon as it knows it; ends with one
line of JSON.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from experts import device_limits, roofline, rounded, say, seeded

from gpt_oss_jax.kernels.attention import xla
from gpt_oss_jax.kernels.attention.many_queries import many_queries
from gpt_oss_jax.kernels.target import why_not_hopper

H = 64
LARGEST_ERROR = 1e-2
CHECKED, SLOTS = 128, 1 << 15  # Queries of a row that are checked, and room for keys.
LAYERS, REPEATS, RUN_SECONDS = 12, 7, 0.05


@dataclasses.dataclass(frozen=True)
class Case:
    """Queries and keys: positions, of which negative ones are none, and heads.

    Attributes:
      name: What is printed.
      q_pos_BT: Of queries.
      k_pos_BS: Of keys.
      window: Keys visible to a query; None for all.
      heads: Key heads, and queries of each.
      timed: Whether it is of a size worth timing.
    """

    name: str
    q_pos_BT: np.ndarray
    k_pos_BS: np.ndarray
    window: int | None
    heads: tuple[int, int] = (8, 8)
    timed: bool = True

    def pairs(self) -> int:
        """Visible pairs of query and key, of one head."""
        total = 0
        for q, k in zip(self.q_pos_BT, self.k_pos_BS, strict=True):
            q, k = q[q >= 0], np.sort(k[k >= 0])
            total += np.searchsorted(k, q, "right").sum()
            if self.window is not None:
                total -= np.searchsorted(k, q - self.window, "right").sum()
        return int(total)

    def arrays(self, seed: int):
        """Random queries, keys, values and sinks, and the positions."""
        B, T = self.q_pos_BT.shape
        K, G = self.heads
        S = self.k_pos_BS.shape[1]
        shapes = (B, T, K, G, H), (B, S, K, H), (B, S, K, H), (K, G)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), T + S), 4)
        draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
        q, k, v, sinks = (draw(*of, jnp.bfloat16) for of in zip(keys, shapes, strict=True))
        return 2 * q, k, v, sinks, jnp.asarray(self.q_pos_BT), jnp.asarray(self.k_pos_BS)


def cases(seed: int) -> list[Case]:
    """What is checked and timed, and what is only checked."""

    def span(start, stop, B=1):
        return np.broadcast_to(np.arange(start, stop, dtype=np.int32), (B, stop - start))

    def ring(start, R=128):
        return (start - 1 - (start - 1 - np.arange(R)) % R)[None].astype(np.int32)

    both = []
    for name, q, k in (
        ("1k", span(0, 1024), span(0, 1024)),
        ("8k", span(0, 8192), span(0, 8192)),
        ("32k", span(0, 32768), span(0, 32768)),
        ("8 x 1k", span(0, 1024, 8), span(0, 1024, 8)),
        ("2k of 32k slots", span(30720, 32768), span(0, 32768)),
    ):
        both += [Case(f"{name} full", q, k, None)]
        if "slots" not in name:
            both += [Case(f"{name} window", q, k, 128)]
    new = span(5000, 7048)
    both.append(Case("ring + 2k", new, np.concatenate([ring(5000), new], axis=1), 128))

    random = np.random.default_rng(seed)
    q = np.stack([np.arange(300), np.where(np.arange(300) < 177, np.arange(300), -1)])
    shuffled = np.stack([random.permutation(1003) for _ in range(3)])
    shuffled[1, shuffled[1] > 900] = -1
    late = np.stack([np.arange(s, s + 101) for s in (902, 800, 3)])
    late[2, 50:] = -1
    empty = np.stack([np.full(70, -1), np.arange(70)])
    for name, q_pos, k_pos, window, heads in (
        ("ragged", q, q, None, (8, 8)),
        ("ragged, small model", q, q, 128, (2, 2)),
        ("shuffled", late, shuffled, None, (8, 8)),
        ("shuffled, window", late, shuffled, 200, (8, 8)),
        ("nothing to see", empty, np.full((2, 5), 70), None, (8, 8)),
    ):
        positions = q_pos.astype(np.int32), k_pos.astype(np.int32)
        both.append(Case(name, *positions, window, heads, timed=False))
    return both


@jax.jit
def reference(q, k, v, sinks, q_pos, k_pos, window):
    """XLA in float32."""
    args = (x.astype(jnp.float32) for x in (q, k, v, sinks))
    return xla.attention(*args, q_pos_BT=q_pos, k_pos_BS=k_pos, window=window)


def errors(call, case: Case, args) -> tuple[float, float]:
    """Of a call, written over memory full of NaN: of the norm, and the largest over the largest."""
    q, k, v, sinks, q_pos, k_pos = map(np.asarray, args)
    T = q.shape[1]
    some = np.unique(np.linspace(0, T - 1, CHECKED).astype(int))
    window = case.window or SLOTS + 1

    def padded(x, length, fill=0):
        return np.pad(x, [(0, length - len(x)), *[(0, 0)] * (x.ndim - 1)], constant_values=fill)

    want = []
    for b in range(len(q)):  # So that there is one program for all.
        row = (
            padded(q[b, some], CHECKED)[None],
            *(padded(x[b], SLOTS)[None] for x in (k, v)),
            sinks,
            padded(q_pos[b, some], CHECKED, -1)[None],
            padded(k_pos[b], SLOTS, -1)[None],
        )
        want.append(np.asarray(reference(*row, window))[0, : len(some)])
    poison = [jnp.full(2**n, jnp.nan) for n in range(8, 28)]
    jax.block_until_ready(poison)
    del poison
    got = np.asarray(call(*args)).astype(np.float32)
    if np.isnan(got).any():
        return np.nan, np.nan
    want, difference = np.stack(want), got[:, some] - np.stack(want)
    # Where nothing is to be seen, zeros are wanted.
    norm = np.linalg.norm(difference) / max(np.linalg.norm(want), 1e-3)
    return float(norm), float(np.abs(difference).max() / max(np.abs(want).max(), 1e-3))


def in_a_loop(call):
    """A program that calls again and again, each time with what the call before it gave."""

    @jax.jit
    def loop(q, k, v, sinks, q_pos, k_pos, loops):
        def body(_, sinks):
            for _ in range(LAYERS):
                out = call(q, k, v, sinks, q_pos, k_pos)
                sinks += jnp.bfloat16(1e-3) * out[0, 0, :, :, 0]
            return sinks

        return jax.lax.fori_loop(0, loops, body, sinks)

    return loop


def microseconds(loop, args) -> float:
    """Median time of a call in a loop."""

    def seconds(loops):
        start = time.perf_counter()
        jax.block_until_ready(loop(*args, loops))
        return time.perf_counter() - start

    seconds(1)
    loops = max(1, min(1000, int(RUN_SECONDS / seconds(1))))
    return statistics.median(seconds(loops) for _ in range(REPEATS)) / (loops * LAYERS) * 1e6


def form_of(text: str):
    """The kernel with the options that a form like "2,128" names."""
    warpgroups, keys = map(int, text.split(","))
    return functools.partial(many_queries, warpgroups=warpgroups or None, keys=keys or None)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", help="parts of names; without it all")
    parser.add_argument(
        "--forms", nargs="+", default=["0,0"], help='"warpgroups,keys", 0 for the default'
    )
    parser.add_argument("--xla", action="store_true", help="XLA is timed too")
    args = seeded(parser)
    if reason := why_not_hopper():
        sys.exit(f"there is nothing to measure: {reason}")
    started = time.perf_counter()
    kernels = {form: form_of(form) for form in args.forms}
    if args.xla:
        kernels["xla"] = xla.attention
    chosen = [
        case
        for case in cases(args.seed)
        if not args.cases or any(part in case.name for part in args.cases)
    ]

    def call_of(kernel, case):
        def call(q, k, v, sinks, q_pos, k_pos):
            where = {"q_pos_BT": q_pos, "k_pos_BS": k_pos, "window": case.window}
            return kernels[kernel](q, k, v, sinks, **where)

        return call

    right = []
    for case in chosen:
        for kernel in kernels:
            result = {"case": case.name, "kernel": kernel}
            try:
                norm, largest = errors(jax.jit(call_of(kernel, case)), case, case.arrays(args.seed))
            except Exception as error:  # Whatever it is, the next one is to be tried.
                say(result | {"failed": f"{type(error).__name__}: {str(error)[:300]}"})
                continue
            result |= {"relative_error": norm, "largest_error": largest}
            say(result | {"right": norm < LARGEST_ERROR})
            if norm < LARGEST_ERROR and case.timed:
                right.append((result, case))
    bandwidth, rate = device_limits()
    say({"copy_tb_per_second": bandwidth / 1e12, "bf16_tflop_per_second": rate / 1e12})
    done = []
    for result, case in right:
        arrays = case.arrays(args.seed)
        flops = 4 * H * np.prod(case.heads) * case.pairs()
        size = sum(x.nbytes for x in arrays) + arrays[0].nbytes
        try:
            us = microseconds(in_a_loop(call_of(result["kernel"], case)), arrays)
        except Exception as error:
            say(result | {"failed": f"{type(error).__name__}: {str(error)[:300]}"})
            continue
        done.append(
            result
            | {
                "gigaflop": flops / 1e9,
                "megabytes": size / 1e6,
                "microseconds": us,
                "tflop_per_second": flops / us / 1e6,
                "percent_of_bf16_rate": 100 * flops / rate / us * 1e6,
            }
            | roofline(size, flops, bandwidth, rate, us)
        )
        say(done[-1])
    say({"seconds_in_all": time.perf_counter() - started})
    print(json.dumps([rounded(result) for result in done]), flush=True)


if __name__ == "__main__":
    main()
