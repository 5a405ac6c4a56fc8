"""Counts the schedule of attention for TPUs that are not there, beside its bytes.

What comes out are lower bounds of times, by the compiler, not speeds: bundles are issue slots, and
no wait for memory or for the matrix unit is among them. One row of a layer of either model, whose
cache is full: the tokens are its last ones. Of several devices each has some heads. Needs libtpu.
From the root: python benchmarks/tpu_attention.py v6e --tokens 1 4096
"""

import argparse
import dataclasses
import os
import re
import tempfile
from pathlib import Path

from tpu_experts import CORES, GHZ

G, H, WINDOW = 8, 64, 128
BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(\w\w)? *: (>*) *\{")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", help="v5e, v5p, v6e or tpu7x")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4096])
    parser.add_argument("--context", type=int, default=32768, help="slots of the cache")
    parser.add_argument("--heads", type=int, default=8, help="of keys, on one device")
    sizes = "queries=64,keys=512,rows=256: other sizes than those of the table, to be compared"
    parser.add_argument("--block", default="", metavar="NAME=N,...", help=sizes)
    parser.add_argument("--groups", type=int, help="of heads, in a step of one query")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Read when libtpu is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        use_tiles(args.kind, args.block, args.groups)
        for tokens in args.tokens:
            for window in (None, WINDOW):
                for old in Path(folder).iterdir():
                    old.unlink()
                slots = args.context
                if window:  # A ring, and behind it what is new.
                    slots = WINDOW + tokens if tokens > 1 else WINDOW
                layer = args.kind, args.heads, tokens, slots, window
                memory = compile_layer(*layer)
                report(*layer, memory, bundles(Path(folder)))


def use_tiles(kind, block, groups):
    from gpt_oss_jax.kernels.attention.tpu_tiles import TILES, Tiles
    from gpt_oss_jax.plan import KINDS

    name = KINDS[kind].jax_name
    given = {key: int(value) for key, value in (one.split("=") for one in block.split(",") if one)}
    old = TILES.get(name, Tiles())
    TILES[name] = dataclasses.replace(
        old,
        full=dataclasses.replace(old.full, **given),
        window=dataclasses.replace(old.window, **given),
        groups=groups or old.groups,
    )


def compile_layer(kind, K, tokens, slots, window):
    import jax
    import jax.numpy as jnp
    from aot_tpu import devices

    from gpt_oss_jax import aot
    from gpt_oss_jax.kernels import attention
    from gpt_oss_jax.sharding import make_mesh, named_sharding

    mesh = make_mesh(devices=devices(kind, 1))

    def array(shape, dtype=jnp.bfloat16):
        where = named_sharding(mesh, (None,) * len(shape))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def run(q, k, v, sinks, q_pos, k_pos):
        # As the cache has them, heads side by side.
        k, v = (x.reshape(1, slots, K, H) for x in (k, v))
        where = {"q_pos_BT": q_pos, "k_pos_BS": k_pos, "window": window}
        return attention(q, k, v, sinks, **where, implementation="mosaic_tpu")

    caches = [array((1, slots, K * H))] * 2
    positions = array((1, tokens), jnp.int32), array((1, slots), jnp.int32)
    with aot.in_place_of_ours(mesh.devices.flat[0]):
        jitted = jax.jit(run)
        args = array((1, tokens, K, G, H)), *caches, array((K, G)), *positions
        return jitted.lower(*args).compile().memory_analysis()


def bundles(folder):
    """Of a step's products and softmax; of a block of queries, once; of what is left, each step."""
    (path,) = (
        path
        for path in folder.glob("*-attention_*final_bundles.txt")
        if "schedule-analysis" not in path.name
    )
    found, part = [0, 0, 0], {"bundles": 0, "matmul": False, "branch": False}
    for line in path.read_text().splitlines():
        if not (bundle := BUNDLE.match(line)):
            continue
        joins, branches = bundle[1] in ("LB", "PF"), "sbr.rel" in line
        if joins:
            # What a branch jumps over: where it lands is a part of every step again.
            found[(0 if part["matmul"] else 1) if part["branch"] else 2] += part["bundles"]
            part = {"bundles": 0, "matmul": False, "branch": False}
        part["bundles"] += bool(bundle[2])
        part["matmul"] |= "vmatmul" in line
        if branches:
            found[2] += part["bundles"]
            part = {"bundles": 0, "matmul": False, "branch": True}
    return found


def report(kind, K, tokens, slots, window, memory, found):
    import jax.numpy as jnp

    from gpt_oss_jax.kernels.attention.mosaic_tpu import _steps
    from gpt_oss_jax.kernels.attention.tpu_tiles import of_step
    from gpt_oss_jax.plan import KINDS

    groups = max(1, K * H // 128)
    block, together = of_step(KINDS[kind].jax_name, tokens, slots, groups, window)
    queries, keys, rounds = block.queries, block.keys, groups // together
    k_pos = jnp.arange(slots)[None]
    k_pos = jnp.pad(k_pos, ((0, 0), (0, -slots % keys)), constant_values=-1)
    q_pos = jnp.arange(slots - tokens, slots)[None]
    q_pos = jnp.pad(q_pos, ((0, 0), (0, -tokens % queries)), constant_values=-1)
    _, counts = _steps(q_pos, k_pos, queries, keys, window)
    steps = int(counts.sum()) * rounds
    computed, once, around = found
    total = steps * (computed + around) + counts.size * rounds * once
    read = 2 * 2 * K * H * min(slots, window + tokens - 1 if window else slots)
    pairs = sum(min(i + 1, window or slots) for i in range(slots - tokens, slots))
    print(
        f"{kind}, {tokens} tokens, {f'a window of {window}' if window else 'full'}, {slots} slots"
    )
    print(f"  temporaries {memory.temp_size_in_bytes / 1e6:.2f} MB")
    line = f"  {steps} steps of {queries} x {keys}: {computed} bundles and {around} around; "
    line += f"{counts.size * rounds} times {once} at the start and end; "
    line += f"{total:,} bundles, {read / 1e6:.1f} MB"
    if kind in GHZ:
        of_bytes = read / KINDS[kind].bandwidth_gb / 1e3
        cores = min(CORES.get(kind, 1), counts.size * rounds)
        of_bundles = total / GHZ[kind] / cores / 1e3
        of_products = 4 * K * G * H * pairs / KINDS[kind].tflops / 1e6
        line += (
            f"; bytes {of_bytes:,.2f} us, bundles {of_bundles:,.2f} us, products {of_products:,.2f}"
            " us"
        )
    print(line, flush=True)


if __name__ == "__main__":
    main()
