"""Compiles a released model for TPUs that are not there, and prints what its programs need.

Needs libtpu. From the root: python benchmarks/aot_tpu.py 120b v5e --expert 8
"""

import argparse
import dataclasses
import math
import re
import sys
import time
from collections import Counter

from gpt_oss_jax import aot
from gpt_oss_jax.checkpoint import outline
from gpt_oss_jax.config import GPT_OSS_20B, GPT_OSS_120B
from gpt_oss_jax.generate import ahead
from gpt_oss_jax.sampling import SamplingParams
from gpt_oss_jax.sharding import make_mesh

CONFIGS = {"20b": GPT_OSS_20B, "120b": GPT_OSS_120B}
KERNELS = r'"tpu_custom_call".*op_name="(?:[^"]*/)?((?:expert|attention)_\w+)/pallas_call'
MOVES = r"= (\w+)\[([\d,]*)\]\S* (all-\w+|collective-\w+|reduce-scatter)\("
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "u8": 1}


def devices(kind: str, count: int) -> list:
    """Those of `gpt_oss_jax.aot`; why there are none is the last line."""
    try:
        return aot.devices(kind, count)
    except ValueError as error:
        sys.exit(str(error))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("kind", help="v5e, v5p, v6e or tpu7x")
    parser.add_argument("--expert", type=int, default=1, help="devices that split the experts")
    parser.add_argument("--tokens", type=int, default=1024, help="of a prompt, a row and call")
    parser.add_argument("--batch", type=int, default=1, help="rows")
    parser.add_argument("--expert-form", default="packed", help="packed or folded")
    parser.add_argument("--context", type=int, default=32768, help="slots of the cache")
    parser.add_argument("--layers", type=int, help="instead of all")
    args = parser.parse_args()
    config = CONFIGS[args.model]
    config = dataclasses.replace(config, num_hidden_layers=args.layers or config.num_hidden_layers)
    there = devices(args.kind, args.expert)
    mesh = make_mesh(expert=args.expert, devices=there) if args.expert > 1 else None
    options = {"memory": 0, "samplings": [SamplingParams(0.0)]}
    start = time.perf_counter()
    with aot.in_place_of_ours(there[0]):
        model = outline(config, mesh=mesh, expert_form=args.expert_form)
        for program in ahead.of_cache(model, args.batch, args.context, [args.tokens], **options):
            print(f"{program.what}: compiled in {time.perf_counter() - start:.0f} s")
            report(program.compiled)
            start = time.perf_counter()


def report(program):
    memory, text = program.memory_analysis(), program.as_text()
    print(f"arguments   {memory.argument_size_in_bytes / 1e9:.2f} GB a device")
    print(f"donated     {memory.alias_size_in_bytes / 1e9:.2f} GB")
    print(f"temporaries {memory.temp_size_in_bytes / 1e6:.1f} MB")
    for name, count in sorted(Counter(re.findall(KERNELS, text)).items()):
        print(f"{name}: {count} calls")
    for (kind, shape, name), count in Counter(re.findall(MOVES, text)).items():
        size = math.prod(int(x) for x in shape.split(",") if x) * BYTES[kind]
        print(f"{name} of {kind}[{shape}]: {count} times {size / 1e3:.1f} kB")


if __name__ == "__main__":
    main()
