"""Checks, then times what stands around attention and experts in a decode step on Hopper.

Sizes of 20b. `python benchmarks/hopper_dense.py`, under a minute; a line as soon as it is known.
Three launches a layer (`gpt_oss_jax/kernels/dense`), one after the other as in a layer: queries,
keys and values; output projection; router. Weights rotate over several sets, too large for L2.

Each time stands beside the one that its weights allow, at the copy bandwidth and matrix rate that
are measured first. At 4.2 TB/s: 29.5 MB, 7.0 us; 23.6 MB, 5.6 us; 0.2 MB in one block, 1.6 us at 64
bytes a clock. Expected with one row: 8.3, 7.0 and 3.8 us, together 19; with eight 21. Plain XLA:
29, 45.
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from experts import device_limits, roofline

from gpt_oss_jax.kernels.dense import mosaic_gpu, xla
from gpt_oss_jax.kernels.target import why_not_hopper

D, K, G, H, EPSILON = 2880, 8, 8, 64, 1e-5
SETS, TIMES = 4, 40
ROOM = 4 * D // 2  # As one row has.
PRODUCTS = "qkv", "out", "router"


def weights(seed, E=32):
    """Scale and weight and bias of the three products, as a layer has them."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    make = lambda *s, std=1.0: (std * jax.random.normal(next(keys), s)).astype(jnp.bfloat16)
    return {
        "qkv": (1 + make(D, std=0.1), make(K * (G + 2) * H, D, std=D**-0.5), make(K * (G + 2) * H)),
        "out": (make(D, K * G * H, std=(K * G * H) ** -0.5), make(D)),
        "router": (1 + make(D, std=0.1), make(E, D, std=D**-0.5), make(E)),
    }


def products(module):
    return {
        "qkv": functools.partial(module.queries_keys_values, epsilon=EPSILON, group=G),
        "out": module.add_product,
        "router": functools.partial(module.route, epsilon=EPSILON, choices=4, room=ROOM),
    }


XLA, OURS = products(xla), products(mosaic_gpu)


def rows(M, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    x = 3 * jax.random.normal(keys[0], (M, D))
    heads = jax.random.normal(keys[1], (M, K * G * H))
    angle = 1e3 * jax.random.uniform(keys[2], (M, H // 2))
    return [z.astype(jnp.bfloat16) for z in (x, heads, jnp.cos(angle), jnp.sin(angle))]


def poisoned(function, *args):
    """Calls it when the memory that its results will lie in is likely full of NaN."""
    outs = jax.tree.leaves(jax.eval_shape(function, *args))
    for _ in range(3):
        waste = [jnp.full(o.shape, -1, jnp.int32) for o in outs for _ in range(2)]
        jax.block_until_ready(waste)
        del waste
    return jax.device_get(function(*args))


def check(M, E):
    x, heads, cos, sin = rows(M, seed=M)
    w = weights(M, E)
    inputs = {"qkv": (x, *w["qkv"], cos, sin), "out": (heads, *w["out"], x)}
    inputs["router"] = (x, *w["router"])
    for name, args in inputs.items():
        got = jax.tree.leaves(poisoned(jax.jit(OURS[name]), *args))
        want = jax.tree.leaves(jax.device_get(jax.jit(XLA[name])(*args)))
        errors = [
            np.linalg.norm(np.float32(a) - np.float32(b)) / np.linalg.norm(np.float32(b))
            for a, b in zip(got, want, strict=True)
        ]
        if name == "router" and (got[1] != want[1]).any():
            print(f"  experts differ in {(got[1] != want[1]).sum()} of {got[1].size}: near ties?")
        state = "right" if max(errors) < 5e-3 or name == "router" else "WRONG"
        print(f"{name:6} {M:2} rows, {E:3} experts: {state}, relative errors", end=" ")
        print(" ".join(f"{e:.1e}" for e in errors), flush=True)
        assert state == "right", "not timed"


def rounds(step, times):
    """Many steps, each with another set of weights; all that they compute is kept alive."""

    def run(x, sets, *rest):
        def all_sets(_, carry):
            x, _ = carry
            results = []
            for w in sets:
                x, more = step(x, w, *rest)
                results.append(more)
            return x, results

        return jax.lax.fori_loop(1, times, all_sets, all_sets(0, (x, None)))

    return jax.jit(run)


def cost(w, only, M) -> tuple[int, int]:
    """Bytes of the weights of some products, and FLOPs of M rows."""
    parts = jax.tree.leaves([w[name] for name in only])
    return sum(x.nbytes for x in parts), 2 * M * sum(x.size for x in parts if x.ndim > 1)


def timed(name, of, x, *rest, reached, only=PRODUCTS):
    """Prints the time of one of many steps, and the time that the limits allow."""
    sets, step = [weights(i) for i in range(SETS)], layer(of, only)
    start = time.perf_counter()
    run = rounds(step, TIMES).lower(x, sets, *rest).compile()
    compiling = time.perf_counter() - start
    jax.block_until_ready(run(x, sets, *rest))
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        jax.block_until_ready(run(x, sets, *rest))
        seconds.append((time.perf_counter() - start) / (TIMES * SETS))
    us = 1e6 * np.median(seconds)
    roof = roofline(*cost(sets[0], only, len(x)), *reached, us)
    print(
        f"{name:24} {us:6.2f} us, {roof['percent_of_limit']:5.1f}% of the limit, "
        f"{roof['limit_microseconds']:6.2f} us  (compiled in {compiling:.1f} s)",
        flush=True,
    )


def layer(of, only):
    """Some of the three products, one after the other."""

    def step(x, w, heads, cos, sin):
        more = []
        if "qkv" in only:
            q, *more = of["qkv"](x, *w["qkv"], cos, sin)
            heads = q.reshape(heads.shape)
        if "out" in only:
            x = of["out"](heads, *w["out"], x)
        if "router" in only:
            x, *chosen = of["router"](x, *w["router"])
            more += chosen
        return (heads[:, :D] if only == ("qkv",) else x), more

    return step


def main():
    if reason := why_not_hopper():
        sys.exit(f"there is nothing to measure: {reason}")
    print(jax.devices()[0].device_kind, "JAX", jax.__version__)
    for M in (1, 3, 8, 13, 16, 35):
        check(M, 128 if M == 3 else 32)
    reached = device_limits()
    print(f"copying reaches {reached[0] / 1e12:.3g} TB/s, products {reached[1] / 1e12:.3g} TFLOP/s")
    for M in (1, 8, 16):
        timed(f"all three, {M} rows", OURS, *rows(M), reached=reached)
        if M == 1:
            for name, *only in (
                ("out + router", "out", "router"),
                ("qkv + copy", "qkv"),
                ("router", "router"),
            ):
                timed(name, OURS, *rows(M), reached=reached, only=tuple(only))
    for M in (1, 8):
        timed(f"all three in XLA, {M} rows", XLA, *rows(M), reached=reached)


if __name__ == "__main__":
    main()
