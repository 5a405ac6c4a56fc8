"""Whether the small model says the same on the kernels as on XLA: needs a Hopper.

From the root: python benchmarks/tokens.py. Greedy, in bfloat16, random prompts of several lengths,
together and alone; both implementations are named.
"""

import argparse
import sys

import jax.numpy as jnp
import numpy as np

from gpt_oss_jax import SamplingParams, generate_batch, load
from gpt_oss_jax.kernels.target import why_not_hopper

LENGTHS, VOCABULARY = (330, 7, 130), 190_000


def tokens(implementation: str, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Of all prompts together, then of each alone."""
    model = load("tiny", dtype=jnp.bfloat16, implementation=implementation)
    how = {"max_tokens": count, "stop_tokens": (), "sampling": SamplingParams(temperature=0.0)}
    groups = [prompts, *([prompt] for prompt in prompts)]
    return [list(c.tokens) for group in groups for c in generate_batch(model, group, **how)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--implementation", default="mosaic_gpu")
    args = parser.parse_args()
    if args.implementation == "mosaic_gpu" and (reason := why_not_hopper()):
        sys.exit(f"there is nothing to compare: {reason}")
    random = np.random.default_rng()
    prompts = [random.integers(VOCABULARY, size=length).tolist() for length in LENGTHS]
    ours, xla = (tokens(name, prompts, args.tokens) for name in (args.implementation, "xla"))
    same = sum(a == b for a, b in zip(ours, xla, strict=True))
    print(f"{same} of {len(xla)} answers of {args.tokens} tokens are the same")
    sys.exit(same != len(xla))


if __name__ == "__main__":
    main()
