"""Compiles a step of a released model for TPUs that are not there, and prints what it needs.

Needs libtpu. From the root: python benchmarks/aot_tpu.py 120b v5e --expert 8 --tokens 1
"""

import argparse
import dataclasses
import math
import re
import time
from collections import Counter

from gpt_oss_jax import aot
from gpt_oss_jax.config import GPT_OSS_20B, GPT_OSS_120B
from gpt_oss_jax.sharding import make_mesh

CONFIGS = {"20b": GPT_OSS_20B, "120b": GPT_OSS_120B}
KERNELS = r'"tpu_custom_call".*op_name="(?:[^"]*/)?((?:expert|attention)_\w+)/pallas_call'
MOVES = r"= (\w+)\[([\d,]*)\]\S* (all-\w+|collective-\w+|reduce-scatter)\("
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "u8": 1}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("kind", help="v5e, v5p, v6e or tpu7x")
    parser.add_argument("--expert", type=int, default=1, help="devices that split the experts")
    parser.add_argument("--tokens", type=int, default=1, help="new tokens of each row")
    parser.add_argument("--batch", type=int, default=1, help="rows")
    parser.add_argument("--expert-form", default="packed", help="packed or folded")
    parser.add_argument("--context", type=int, default=32768, help="slots of the cache")
    parser.add_argument("--layers", type=int, help="instead of all")
    args = parser.parse_args()
    config = CONFIGS[args.model]
    config = dataclasses.replace(config, num_hidden_layers=args.layers or config.num_hidden_layers)
    mesh = make_mesh(expert=args.expert, devices=aot.devices(args.kind, args.expert))
    start = time.perf_counter()
    options = {"tokens": args.tokens, "context": args.context, "batch": args.batch}
    program = aot.compile_step(config, mesh, **options, expert_form=args.expert_form)
    memory, text = program.memory_analysis(), program.as_text()
    print(f"compiled in {time.perf_counter() - start:.0f} s")
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
