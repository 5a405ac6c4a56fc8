"""Checks, then times what stands around attention and experts in a decode step on Hopper.

Sizes of 20b. `python benchmarks/hopper_dense.py`; a line as soon as it is known.
Three launches a layer (`gpt_oss_jax/kernels/dense`), one after the other as in a layer: queries,
keys and values; output projection; router. Weights rotate over several sets, too large for L2. The
seed of all random inputs is printed first, and --seed repeats it.

Each time stands beside the one that its weights allow, at the copy bandwidth and matrix rate that
are measured first. At 4.2 TB/s: 29.5 MB, 7.0 us; 23.6 MB, 5.6 us; 0.2 MB in one block, 1.6 us at 64
bytes a clock. Expected with one row: 8.3, 7.0 and 3.8 us, together 19; with eight 21.
"""

import argparse
import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from experts import device_limits, roofline, seeded

from gpt_oss_jax.kernels.dense import mosaic_gpu, xla
from gpt_oss_jax.kernels.target import why_not_hopper

D, K, G, H, EPSILON = 2880, 8, 8, 64, 1e-5
SETS, TIMES = 4, 40
ROOM = 4 * D // 2  # As one row has.
PRODUCTS = "qkv", "out", "router"
LARGEST_ERROR = 5e-3


def weights(key, E=32):
    """Scale and weight and bias of the three products, as a layer has them."""
    keys = iter(jax.random.split(key, 8))
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


def rows(M, key):
    keys = jax.random.split(key, 4)
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


def errors_of(name, args, got, want):
    """Of all results of a product, as numpy has them, relative to their norms.

    Of the router's experts it is the largest difference of the logits in the same place, since two
    of a near tie may change places; infinite if they are not so many different experts.
    """
    norm = lambda x: np.linalg.norm(np.float32(x))
    errors = [norm(np.float32(a) - np.float32(b)) / norm(b) for a, b in zip(got, want, strict=True)]
    if name == "router":
        errors[1] = np.inf
        _, _, weight_ED, bias_E = map(np.float32, args)
        ids = np.sort(got[1], axis=1)
        if (ids >= 0).all() and (ids < len(bias_E)).all() and (np.diff(ids) > 0).all():
            logits_ME = np.float32(want[0]) @ weight_ED.T + bias_E
            ours, theirs = (np.take_along_axis(logits_ME, x[1], axis=1) for x in (got, want))
            errors[1] = np.abs(ours - theirs).max()
    return errors


def are_small(errors) -> bool:
    return all(error < LARGEST_ERROR for error in errors)  # NaN is not.


def check(M, E, key):
    of_rows, of_weights = jax.random.split(key)
    x, heads, cos, sin = rows(M, of_rows)
    w = weights(of_weights, E)
    inputs = {"qkv": (x, *w["qkv"], cos, sin), "out": (heads, *w["out"], x)}
    inputs["router"] = (x, *w["router"])
    for name, args in inputs.items():
        got = jax.tree.leaves(poisoned(jax.jit(OURS[name]), *args))
        want = jax.tree.leaves(jax.device_get(jax.jit(XLA[name])(*args)))
        errors = errors_of(name, args, got, want)
        right = are_small(errors)
        print(f"{name:6} {M:2} rows, {E:3} experts: {'right' if right else 'WRONG'}", end=", ")
        print("errors", " ".join(f"{e:.1e}" for e in errors), flush=True)
        if not right:
            sys.exit("not timed")


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


def timed(name, of, key, x, *rest, reached, only=PRODUCTS):
    """Prints the time of one of many steps, and the time that the limits allow."""
    sets, step = [weights(k) for k in jax.random.split(key, SETS)], layer(of, only)
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
    args = seeded(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    if reason := why_not_hopper():
        sys.exit(f"there is nothing to measure: {reason}")
    print(jax.devices()[0].device_kind, "JAX", jax.__version__)
    key, of_checks, of_rows = jax.random.split(jax.random.key(args.seed), 3)
    for M in (1, 3, 8, 13, 16, 32, 35):
        check(M, 128 if M == 3 else 32, jax.random.fold_in(of_checks, M))
    reached = device_limits()
    print(f"copying reaches {reached[0] / 1e12:.3g} TB/s, products {reached[1] / 1e12:.3g} TFLOP/s")

    def time_of(name, of, M, only=PRODUCTS):
        timed(name, of, key, *rows(M, of_rows), reached=reached, only=only)

    for M in (1, 8, 16, 32):
        time_of(f"all three, {M} rows", OURS, M)
        if M == 1:
            for name, *only in (
                ("out + router", "out", "router"),
                ("qkv + copy", "qkv"),
                ("router", "router"),
            ):
                time_of(name, OURS, M, only=tuple(only))
    for M in (1, 8, 32):
        time_of(f"all three in XLA, {M} rows", XLA, M)


if __name__ == "__main__":
    main()
