"""One GPU beside several: the same logits, speed, and what sums over the GPUs cost.

From the root: python benchmarks/several_gpus.py synthetic:120b --mesh expert=2
The model runs on one device first, is then moved to the mesh, and runs again. Logits are of random
prompts with calmed weights, and are held against those of float32 on XLA (see `precision`): on a
mesh they must not be farther from them than on one device. Sums are those of a layer, after
attention and after experts, timed by themselves in a loop; what is expected of them is a sum of two
numbers, and one of 64 MB, times their sizes.
"""

import argparse
import functools
import math
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from precision import AFTER, BEFORE, calmed, divergence, in_float32, logprobs

from gpt_oss_jax import bench, load
from gpt_oss_jax.cli.bench import _head, _line
from gpt_oss_jax.cli.terminal import mesh_axes
from gpt_oss_jax.kernels.dense.mosaic_gpu import MAX_ROWS
from gpt_oss_jax.sharding import MESH_AXES, make_mesh, named_sharding, spelled

ROWS, CALLS = 8, (AFTER, 1)
LARGE = 2**24  # float32


def spread(model, mesh):
    """Moves a model to a mesh, array by array."""
    model.mesh = mesh
    for x in jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        x[...] = jax.device_put(x[...], named_sharding(mesh, x.axes, x.shape))


def logits(model, call):
    """Of the same tokens, behind a prompt, so many a call; on the host."""
    size = ROWS, BEFORE + AFTER
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=size, dtype=np.int32)
    return np.concatenate(list(map(np.asarray, logprobs(model, tokens, call))), axis=1)


def report_logits(model, exact, of_one):
    """How far they are from the float32 model's, and how much farther than those of one device."""
    calm = calmed(model)
    calm.weights_at_rest = True
    error = lambda x: x.std(ddof=1) / ROWS**0.5
    for call in CALLS:
        kl_BT, same_BT = divergence(exact, logits(calm, call))
        kl_B = kl_BT.mean(axis=1)
        # The same prompts, so what is compared is prompt by prompt.
        more_B = kl_B - of_one.setdefault(call, kl_B)
        print(
            f"{call:2} tokens a call: KL to float32 {kl_B.mean():.3e} +- {error(kl_B):.1e} nats, "
            f"to one device's {more_B.mean():+.1e} +- {error(more_B):.1e}, the same first choice "
            f"{100 * same_BT.mean():.2f}% of {same_BT.size}",
            flush=True,
        )


def seconds_of_sum(mesh, *shapes, times=200):
    """Of one after the other over all devices, as they stand in a layer; median of five."""

    def sums(xs):
        for x in xs:
            yield jax.lax.psum(x, MESH_AXES).astype(x.dtype)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    def loop(xs):
        return jax.lax.fori_loop(0, times, lambda _, xs: tuple(sums(xs)), xs)

    xs, taken = tuple(jnp.zeros(shape, dtype) for shape, dtype in shapes), []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(loop(xs))
        taken.append((time.perf_counter() - start) / times)
    return float(np.median(taken[1:]))


def report_sums(mesh, config, shapes):
    """Of a decode step and of a prompt, for each shape."""
    L, D = config.num_hidden_layers, config.hidden_size
    least = seconds_of_sum(mesh, ((2,), jnp.float32))
    rate = 4 * LARGE / seconds_of_sum(mesh, ((LARGE,), jnp.float32), times=20)
    print(f"a sum of two numbers takes {1e6 * least:.1f} us, one of 64 MB {rate / 1e9:.4g} GB/s")
    for batch, prompt in shapes:
        for what, rows in ("a decode step", batch), ("the prompts", batch * (prompt - 1)):
            # What heads give in the launches of few rows is added in float32.
            heads = jnp.float32 if rows <= MAX_ROWS else jnp.bfloat16
            sizes = ((rows, D), heads), ((rows, D), jnp.bfloat16)
            size = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in sizes)
            expected = L * (2 * least + size / rate)
            came = L * seconds_of_sum(mesh, *sizes, times=200 if rows <= 128 else 20)
            print(
                f"{batch:4} x {prompt:6,}: {2 * L} sums of {what}, {L * size / 1e6:,.4g} "
                f"MB: expected {1e3 * expected:.3g} ms, {1e3 * came:.3g} ms came",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--mesh", type=mesh_axes, action="append", required=True)
    parser.add_argument("--shapes", default="1x1024,8x1024,128x1024,1x8192", metavar="BxT,...")
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    shapes = [tuple(map(int, x.split("x"))) for x in args.shapes.split(",")]
    try:  # Before anything takes its time.
        meshes = [make_mesh(**sizes) for sizes in args.mesh]
    except ValueError as error:
        sys.exit(str(error))
    model = load(args.model)

    def report(name):
        for i, found in enumerate(
            bench.measure(model, shapes, new_tokens=args.new_tokens, repeats=3)
        ):
            print(("" if i else _head(name, found)) + _line(found), end="", flush=True)

    exact = logits(in_float32(calmed(model)), AFTER)
    report_logits(model, exact, of_one := {})
    report(args.model)
    for sizes, mesh in zip(args.mesh, meshes, strict=True):
        spread(model, mesh)
        print(f"\nspread over {spelled(sizes)}")
        report_logits(model, exact, of_one)
        report(f"{args.model}, {spelled(sizes)}")
        report_sums(mesh, model.config, shapes)


if __name__ == "__main__":
    main()
