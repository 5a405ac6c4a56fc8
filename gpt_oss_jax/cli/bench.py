"""`gpt-oss-jax bench`: tokens per second, and how near to the memory's limit."""

import argparse
import dataclasses
import json

from gpt_oss_jax.bench import measure
from gpt_oss_jax.cli.terminal import add_model_options, load_model, remark, write


def add(commands) -> None:
    """Declare `bench MODEL`."""
    parser = commands.add_parser(
        "bench",
        help="measure tokens per second",
        description="Prints what it measured, and the same as JSON on the last line. Weights need "
        "not be real: MODEL may be synthetic:20b or synthetic:120b, made on the device.",
    )
    add_model_options(parser)
    parser.add_argument("--batch", type=int, default=1, metavar="ROWS", help="default %(default)s")
    parser.add_argument(
        "--prompt-tokens", type=int, default=512, metavar="N", help="default %(default)s"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=128, metavar="N", help="default %(default)s"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="default %(default)s")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    result = measure(
        load_model(args),
        batch=args.batch,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        report=remark,
    )
    write(
        f"{args.model} on {result.devices} x {result.device}, {result.dtype}\n"
        f"prefill  {result.prefill_tokens_per_second:,.1f} tokens/s "
        f"({result.batch} x {result.prompt_tokens} tokens)\n"
        f"decode   {result.decode_tokens_per_second:,.1f} tokens/s "
        f"({result.batch} x {result.new_tokens} tokens), "
        f"{result.decode_percent_of_bandwidth:.1f}% of what "
        f"{result.bandwidth_gb_per_second:,.1f} GB/s allow at "
        f"{result.decode_gb_per_step:.4f} GB a step\n"
        f"compile  {result.compile_seconds:.2f} s\n"
    )
    write(json.dumps({"model": args.model} | dataclasses.asdict(result)) + "\n")
    return 0
