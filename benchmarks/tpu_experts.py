"""Counts the schedule of the expert kernels for TPUs that are not there, beside their bytes.

What comes out are lower bounds of times, by the compiler, not speeds: bundles are issue slots, and
no wait for memory or for the matrix unit is among them. Rows choose experts evenly. Needs libtpu.
From the root: python benchmarks/tpu_experts.py v6e folded --rows 1 8 64 4096
"""

import argparse
import dataclasses
import functools
import os
import re
import tempfile
from pathlib import Path

# Of four matrix units of 128 (v5e, v5p) or 256 (v6e) a core, from the vendor's bf16 rates.
GHZ = {"v5e": 1.5, "v5p": 1.75, "v6e": 1.75}
CORES = {"v5p": 2}
EXPERTS, CHOSEN, D = 32, 4, 2880  # Of 20b, whose width is D too.
BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(LB)? *: (>*) *\{")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", help="v5e, v5p, v6e or tpu7x")
    parser.add_argument("form", choices=("packed", "folded"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 4096])
    sizes = "lanes=512,few=2048: other sizes than those of the table, to be compared"
    parser.add_argument("--tiles", default="", metavar="NAME=N,...", help=sizes)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Read when libtpu is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        use_tiles(args.kind, args.tiles)
        for rows in args.rows:
            for old in Path(folder).iterdir():
                old.unlink()
            memory = compile_layer(args.kind, args.form, rows)
            print(f"{args.kind}, {args.form}, {rows} rows")
            print(f"  temporaries {memory.temp_size_in_bytes / 1e6:.2f} MB")
            report(args.kind, args.form, rows, kernels(Path(folder)))


def use_tiles(kind, text):
    from gpt_oss_jax.kernels.expert_matmul.tpu_tiles import TILES, tiles
    from gpt_oss_jax.plan import KINDS

    name = KINDS[kind].jax_name
    given = (one.split("=") for one in text.split(",") if one)
    TILES[name] = dataclasses.replace(tiles(name), **{key: int(value) for key, value in given})


def compile_layer(kind, form, rows):
    import jax
    import jax.numpy as jnp
    from aot_tpu import devices

    from gpt_oss_jax import aot
    from gpt_oss_jax.kernels import expert_mlp
    from gpt_oss_jax.kernels.expert_matmul.weights import ExpertWeights
    from gpt_oss_jax.kernels.target import knows_fp4
    from gpt_oss_jax.quant import MXArray
    from gpt_oss_jax.sharding import make_mesh, named_sharding

    mesh = make_mesh(devices=devices(kind, 1))
    packed = functools.partial(MXArray.in_words, native=knows_fp4(mesh.devices.flat[0].device_kind))
    make = {"packed": packed, "folded": MXArray.folded}[form]

    def array(shape, dtype=jnp.bfloat16):
        where = named_sharding(mesh, (None,) * len(shape))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def matrix(*shape):
        scales = jax.ShapeDtypeStruct((*shape[:-1], shape[-1] // 32), jnp.uint8)
        blocks = jax.ShapeDtypeStruct((*scales.shape, 16), jnp.uint8)
        found = jax.eval_shape(make, MXArray(blocks, scales))
        return jax.tree.map(lambda x: array(x.shape, x.dtype), found)

    biases = array((EXPERTS, D, 2)), array((EXPERTS, D))
    w = ExpertWeights(matrix(EXPERTS, D, 2, D), biases[0], matrix(EXPERTS, D, D), biases[1])
    chosen = (rows, CHOSEN)
    run = functools.partial(expert_mlp, limit=7.0, implementation="mosaic_tpu")
    x = array((rows, D))
    args = x, array(chosen, jnp.int32), array(chosen, jnp.float32), w
    with aot.in_place_of_ours(mesh.devices.flat[0]):
        return jax.jit(run).lower(*args).compile().memory_analysis()


def kernels(folder):
    """Bundles of each kernel: of a group of outputs and the last one; of decoding; of the rest.

    The rest is of a step, and of a call, before its first step and after its last.
    """
    found = {}
    for path in folder.glob("*-expert_*-*final_bundles.txt"):
        if "schedule-analysis" in path.name:
            continue
        loops, around, once, inside = [], 0, 0, None
        for line in path.read_text().splitlines():
            if inside is not None:
                inside["matmul"] |= "vmatmul" in line
            if not (bundle := BUNDLE.match(line)):
                continue
            depth = len(bundle[2])
            if depth < 2:
                around += depth
                once += not depth
                inside = None
                continue
            if bundle[1] or inside is None:
                inside = {"bundles": 0, "matmul": "vmatmul" in line}
                loops.append(inside)
            inside["bundles"] += 1
        products = sorted(x["bundles"] for x in loops if x["matmul"])[-2:][::-1]
        others = sorted(x["bundles"] for x in loops if not x["matmul"])
        name = re.search(r"(expert_\w+?_(?:few|many))", path.name)[1]
        # Of loops without products only decoding is large. The others copy outputs to their place:
        # those of more than a few bundles 64 registers at a time, which few rows do not have.
        decode = [others.pop() if others and others[-1] > 100 else 0 for _ in range(2)]
        copies = sum(x for x in others if x < 20 or name.endswith("many"))
        found[name] = (products, decode, around + copies, once)
    return found


def report(kind, form, rows, found):
    import jax.numpy as jnp
    import numpy as np

    from gpt_oss_jax.kernels.expert_matmul.tiles import sort_into_tiles
    from gpt_oss_jax.kernels.expert_matmul.tpu_tiles import tiles
    from gpt_oss_jax.plan import KINDS

    sizes = tiles(KINDS[kind].jax_name)

    random = np.random.default_rng(0)
    chosen = np.stack([random.permutation(EXPERTS)[:CHOSEN] for _ in range(rows)])
    experts = len(np.unique(chosen))
    many = any(name.endswith("many") for name in found)
    steps, total = experts, 0
    if many:
        size = min(sizes.rows, max(16, 1 << (-(-rows * CHOSEN // EXPERTS) - 1).bit_length()))
        steps = int(sort_into_tiles(jnp.asarray(chosen.ravel()), EXPERTS, size).count)
    for name, (products, decode, around, once) in sorted(found.items()):
        groups = D // sizes.lanes
        parts = 2 if "up" in name else 1
        outputs = -(-D // (sizes.many if many else sizes.few // parts))
        bundles = steps * (groups * products[0] + products[1] + outputs * around)
        bundles += experts * (groups * decode[0] + decode[1]) + once
        total += bundles
        weights = D * D * (2 if "up" in name else 1)
        print(
            f"  {name}: {products[0]} bundles for {sizes.lanes} outputs "
            f"({sizes.lanes * weights / D / products[0]:,.0f} "
            f"weights a bundle), {decode[0]} to decode them, {around} around a step, {once} once; "
            f"{steps} steps"
        )
    bits = {"packed": 4.25, "folded": 8}[form]
    size = 3 * D * D * experts * bits / 8
    line = f"  {experts} experts, {size / 1e6:.1f} MB; {total:,} bundles"
    if kind in GHZ:
        of_bytes = size / KINDS[kind].bandwidth_gb / 1e3
        of_bundles = total / GHZ[kind] / CORES.get(kind, 1) / 1e3
        of_products = 6 * D * D * rows * CHOSEN / KINDS[kind].tflops / 1e6
        line += (
            f"; bytes {of_bytes:,.1f} us, bundles {of_bundles:,.1f} us, products {of_products:,.1f}"
            f" us; at least {max(of_bytes, of_bundles, of_products):,.1f} us"
        )
    print(line, flush=True)


if __name__ == "__main__":
    main()
