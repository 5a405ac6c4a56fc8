"""How far bfloat16 logits are from the float32 model's, on the kernels and on XLA: needs a Hopper.

Random prompts, logits at the tokens behind the 300th, as one chunk and step by step. From the root:
python benchmarks/precision.py synthetic:20b
"""

import argparse
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss_jax import load
from gpt_oss_jax.kernels.target import why_not_hopper
from gpt_oss_jax.model import init_cache

BEFORE, AFTER = 300, 20
# Implementation, rows of a call, tokens of a call behind the prompt.
WAYS = [("xla", 8, 20), ("xla", 8, 1), ("xla", 64, 1)]
WAYS += [("mosaic_gpu", 8, 20)] + [("mosaic_gpu", rows, 1) for rows in (1, 8, 64)]
# What a single row is held against: XLA multiplies the experts of eight in the same way.
LIKE = {1: 8}


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
    return jnp.stack([kl_BT, wanted_BTV.argmax(-1) == got_BTV.argmax(-1)])


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


def in_float32(model):
    """The same model with float32 activations, on XLA."""
    wide = lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
    exact = jax.tree.map(wide, model)
    exact.implementation = "xla"
    return exact


def logprobs(model, tokens_BT, call):
    """Of the tokens behind the prompt, [B, call, V] each."""
    B = tokens_BT.shape[0]
    at = np.broadcast_to(np.arange(BEFORE + AFTER, dtype=np.int32), tokens_BT.shape)
    cache = init_cache(model.config, B, 512, model.dtype)
    cache = read(model, tokens_BT[:, :BEFORE], at[:, :BEFORE], cache)
    for i in range(BEFORE, BEFORE + AFTER, call):
        part = np.s_[:, i : i + call]
        out, cache = forward(model, tokens_BT[part], at[part], cache)
        yield out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--few", type=int, default=8, help="prompts of the way with single rows")
    args = parser.parse_args()
    if reason := why_not_hopper():
        sys.exit(f"there is nothing to measure: {reason}")
    model = calmed(load(args.model, dtype=jnp.bfloat16))
    exact = in_float32(model)
    size = args.prompts, BEFORE + AFTER
    tokens = np.random.default_rng().integers(model.config.vocab_size, size=size, dtype=np.int32)

    start = time.perf_counter()
    groups = np.split(tokens, args.prompts // 8)
    # On the host: 1 GB for every row of a thousand.
    wanted = np.concatenate([np.asarray(next(logprobs(exact, g, AFTER))) for g in groups])
    print(f"float32: {time.perf_counter() - start:.0f} s", flush=True)
    # Weights are arguments here, as where tokens are generated.
    model.weights_at_rest = True
    of_xla = {}
    for implementation, rows, call in WAYS:
        start = time.perf_counter()
        model.implementation = implementation
        found = []
        for first in range(0, args.prompts if rows > 1 else args.few, rows):
            group = slice(first, first + rows)
            parts = (
                divergence(wanted[group, i * call : (i + 1) * call], got)
                for i, got in enumerate(logprobs(model, tokens[group], call))
            )
            found.append(np.concatenate([np.asarray(x) for x in parts], axis=2))
        kl_BT, same_BT = np.concatenate(found, axis=1)
        error = lambda x: x.std() / len(x) ** 0.5
        # Tokens of a prompt are not independent, and all ways see the same.
        kl_B = kl_BT.mean(axis=1)
        xla_B = of_xla.setdefault((LIKE.get(rows, rows), call), kl_B)[: len(kl_B)]
        print(
            f"{implementation:<10} {rows:2} rows, {call:2} tokens a call: KL {kl_B.mean():.3e} +- "
            f"{error(kl_B):.1e} nats, to XLA {(kl_B - xla_B).mean():+.1e} +- "
            f"{error(kl_B - xla_B):.1e}, largest {kl_BT.max():.2e}, the same first choice "
            f"{100 * same_BT.mean():.2f}%, {kl_BT.size} tokens, "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
