"""How far bfloat16 logits are from the float32 model's, on the kernels and on XLA: needs a Hopper.

Random prompts, logits at the tokens behind the 300th, as one chunk and step by step. For each mesh
the model is then spread over it; that of float32 runs on one device. From the root:
python benchmarks/precision.py synthetic:20b
python benchmarks/precision.py synthetic:120b --prompts 16 --mesh expert=2 --mesh tensor=2
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt_oss_jax import load
from gpt_oss_jax.cli.terminal import mesh_axes
from gpt_oss_jax.generate import device
from gpt_oss_jax.model import init_cache
from gpt_oss_jax.sharding import make_mesh, named_sharding, spelled

BEFORE, AFTER = 300, 20
# Implementation, rows of a call, tokens of a call behind the prompt.
WAYS = [("xla", 8, 20), ("xla", 8, 1)]
WAYS += [("mosaic_gpu", 8, 20), ("mosaic_gpu", 8, 1), ("mosaic_gpu", 64, 1)]
# What can runs on kernels.
WAYS_OF_MESH = [(None, 8, 20), (None, 8, 1)]


@jax.jit
def forward(model, tokens_BT, positions_BT, cache):
    logits_BTV, cache = model.forward(tokens_BT, positions_BT, cache)
    return jax.nn.log_softmax(logits_BTV), cache


@jax.jit
def read(model, tokens_BT, positions_BT, cache):
    return model.forward(tokens_BT, positions_BT, cache)[1]


@jax.jit
def divergence(wanted_BTV, got_BTV):
    """KL to the float32 model in nats [B, T], and whether both have the same greatest logit."""
    kl_BT = (jnp.exp(wanted_BTV) * (wanted_BTV - got_BTV)).sum(-1)
    return kl_BT, wanted_BTV.argmax(-1) == got_BTV.argmax(-1)


def calmed(model):
    """A model whose blocks add a thirty-second of what they did.

    In one with random weights every block adds as much as there is, and rounding grows from layer
    to layer until nothing is left of the first choice; in a trained one it does not.
    """

    def less(path, x):
        path = jax.tree_util.keystr(path)
        if ".down.scales" in path:
            return x - jnp.uint8(5)  # Powers of two.
        if ".down.bias" in path or ".attention.out." in path:
            return x / 32
        return x

    return jax.tree_util.tree_map_with_path(less, model)


def spread(model, mesh):
    """Moves a model to a mesh, array by array."""
    model.mesh = mesh
    for x in jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        x[...] = jax.device_put(x[...], named_sharding(mesh, x.axes, x.shape))


def logprobs(model, tokens_BT, call):
    """Of the tokens behind the prompt, [B, call, V] each."""
    B = tokens_BT.shape[0]
    at = np.broadcast_to(np.arange(BEFORE + AFTER, dtype=np.int32), tokens_BT.shape)
    skeleton, _ = device.split(model)
    place = jax.jit(lambda: skeleton.placed(init_cache(model.config, B, 512, model.dtype)))
    cache = place()
    cache = read(model, tokens_BT[:, :BEFORE], at[:, :BEFORE], cache)
    for i in range(BEFORE, BEFORE + AFTER, call):
        part = np.s_[:, i : i + call]
        out, cache = forward(model, tokens_BT[part], at[part], cache)
        yield out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--mesh", type=mesh_axes, default=[], action="append")
    args = parser.parse_args()
    model = calmed(load(args.model, dtype=jnp.bfloat16))
    wide = lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
    exact = jax.tree.map(wide, model)
    exact.implementation = "xla"
    size = args.prompts, BEFORE + AFTER
    tokens = np.random.default_rng().integers(model.config.vocab_size, size=size, dtype=np.int32)

    start = time.perf_counter()
    groups = np.split(tokens, args.prompts // 8)
    # On the host: 1 GB for every row of a thousand.
    wanted = np.concatenate([np.asarray(next(logprobs(exact, g, AFTER))) for g in groups])
    print(f"float32: {time.perf_counter() - start:.0f} s", flush=True)
    del exact
    report(model, tokens, wanted, WAYS)
    for sizes in args.mesh:
        spread(model, make_mesh(**sizes))
        print(f"spread over {spelled(sizes)}", flush=True)
        report(model, tokens, wanted, WAYS_OF_MESH)


def report(model, tokens, wanted, ways):
    """Prints how far the model is from the logits that are wanted, each way."""
    for implementation, rows, call in ways:
        start = time.perf_counter()
        model.implementation = implementation
        kls, same = [], []
        for first in range(0, len(tokens), rows):
            group = slice(first, first + rows)
            for i, got in enumerate(logprobs(model, tokens[group], call)):
                kl, equal = divergence(wanted[group, i * call : (i + 1) * call], got)
                kls.append(np.asarray(kl).ravel())
                same.append(np.asarray(equal).ravel())
        kl, same = np.concatenate(kls), np.concatenate(same)
        print(
            f"{implementation or 'fastest':<10} {rows:2} rows, {call:2} tokens a call: "
            f"KL {kl.mean():.3e} +- {kl.std() / len(kl) ** 0.5:.1e} nats, largest {kl.max():.2e}, "
            f"the same first choice {100 * same.mean():.2f}%, {len(kl)} tokens, "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
