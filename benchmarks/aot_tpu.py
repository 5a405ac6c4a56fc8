"""Compiles a step of gpt-oss-20b for a TPU that is not there, and prints what it needs.

Needs libtpu. From the root: PYTHONPATH=.:tests python benchmarks/aot_tpu.py v5e:1x1 --tokens 1
"""

import argparse
import dataclasses
import re

import aot
import jax
import jax.numpy as jnp
from flax import nnx

from gpt_oss_jax.config import GPT_OSS_20B
from gpt_oss_jax.model import Transformer
from gpt_oss_jax.model.cache import init_cache

KERNELS = r"expert_(?:up|down)_(?:few|many)|attention_(?:full|window)"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("topology", help=f"such as {', '.join(aot.TOPOLOGIES)}")
    parser.add_argument("--tokens", type=int, default=1, help="new tokens of the step")
    parser.add_argument("--context", type=int, default=32768, help="slots of the cache")
    parser.add_argument("--layers", type=int, default=GPT_OSS_20B.num_hidden_layers)
    args = parser.parse_args()
    config = dataclasses.replace(GPT_OSS_20B, num_hidden_layers=args.layers)
    target = aot.Target(args.topology)

    def make():
        model = Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        for layer in model.layers:
            layer.mlp.use_words()
        return model

    graphdef, state = nnx.split(nnx.eval_shape(make))
    leaves, tree = jax.tree.flatten(state)
    cache = jax.eval_shape(lambda: init_cache(config, 1, args.context, jnp.bfloat16))
    leaves, cache = jax.tree.map(lambda x: target.array(x.shape, x.dtype), (leaves, cache))
    tokens_BT = target.array((1, args.tokens), jnp.int32)

    def step(cache, leaves, tokens_BT, positions_BT):
        model = nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))
        last = jnp.full(1, args.tokens - 1, jnp.int32)
        logits, cache = model.forward(tokens_BT, positions_BT, cache, logits_at=last)
        return logits.argmax(-1), cache

    program = target.compile(step, cache, leaves, tokens_BT, tokens_BT, donate_argnums=0)
    memory = program.memory_analysis()
    found = re.findall(rf'custom-call[^\n]*op_name="[^"]*({KERNELS})', program.as_text())
    print(f"arguments   {memory.argument_size_in_bytes / 1e9:.2f} GB")
    print(f"donated     {memory.alias_size_in_bytes / 1e9:.2f} GB")
    print(f"temporaries {memory.temp_size_in_bytes / 1e6:.1f} MB")
    for name in sorted(set(found)):
        print(f"{name}: {found.count(name)} calls")


if __name__ == "__main__":
    main()
