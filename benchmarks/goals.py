"""The speeds that we want of one H200, and what comes: all shapes of a model in one process.

From the root: python benchmarks/goals.py 20b
Limits and lines are those of `gpt-oss-jax bench`, which times every batch with every length of the
prompts, where only these are wanted. Weights are made on the device. Goals are tokens/s of all
rows: decoding, and where there is a second one prompts.
"""

import argparse
import sys

from gpt_oss_jax import bench, load
from gpt_oss_jax.cli.bench import _head, _line
from gpt_oss_jax.cli.terminal import remark
from gpt_oss_jax.kernels.target import why_not_hopper

# Rows and tokens of their prompts.
GOALS = {
    "20b": {
        (1, 1024): (860,),
        (8, 1024): (2950,),
        (32, 1024): (8000,),
        (64, 1024): (14_000,),
        (128, 1024): (23_000,),
        (1, 8192): (820, 95_000),
        (1, 130_900): (440,),
    },
    "120b": {
        (1, 1024): (640,),
        (8, 1024): (1450,),
        (128, 1024): (6000,),
        (1, 8192): (None, 65_000),
    },
}


def reached(found: bench.Measurement, decoding: float | None, prompts: float | None = None) -> str:
    """How much of the goals."""
    pairs = (
        ("decoding", decoding, found.decode_tokens_per_second),
        ("prompts", prompts, found.prefill_tokens_per_second),
    )
    share = lambda goal, came: f"{100 * came / goal:.1f}% of {goal:,} tokens/s"
    return "; ".join(f"{name} {share(goal, came)}" for name, goal, came in pairs if goal)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=tuple(GOALS))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if reason := why_not_hopper():
        sys.exit(f"there is nothing to measure: {reason}")
    goals, name = GOALS[args.size], f"synthetic:{args.size}"
    how = {"new_tokens": args.new_tokens, "repeats": args.repeats, "report": remark}
    all_found = bench.measure(load(name), tuple(goals), **how)
    for i, (found, wanted) in enumerate(zip(all_found, goals.values(), strict=True)):
        print((_head(name, found) if not i else "") + _line(found), end="")
        print(f"      {reached(found, *wanted)}", flush=True)


if __name__ == "__main__":
    main()
