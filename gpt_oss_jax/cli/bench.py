"""`gpt-oss-jax bench`: tokens per second, and how near they are to what the device allows."""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Sequence

from gpt_oss_jax import distributed
from gpt_oss_jax.bench import Measurement, measure
from gpt_oss_jax.cli import bench_plot
from gpt_oss_jax.cli.processes import add_process_options
from gpt_oss_jax.cli.terminal import add_model_options, load_model, positive, remark, write

_GROUPS = {"": 13, "first token": 19, "prompts": 18, "decoding": 23, "experts": 15, "a step": 26}
_COLUMNS = (
    ("batch", 5),
    ("prompt", 7),
    ("ms", 6),
    ("min..max", 12),
    ("tokens/s", 9),
    ("of limit", 8),
    ("tokens/s", 8),
    ("min..max", 14),
    ("counted", 7),
    ("if even", 7),
    ("GB", 6),
    ("GFLOP", 6),
    ("of limit", 12),
)


def add(commands) -> None:
    """Declare `bench MODEL`."""
    parser = commands.add_parser(
        "bench",
        help="measure tokens per second",
        description="Times greedy generation from random prompts: medians of several runs, a line "
        "of the table for each batch and length of the prompts. Its limits are measured in the "
        "same run: prompts are held against products of large matrices, decoding against "
        "products or the memory's bandwidth, whichever allows less. Experts are the distinct "
        "ones of a layer that a step went through, counted. The last line is JSON: a list, an "
        "object with the same numbers and some more for each line of the table. Weights need not "
        "be real: MODEL may be synthetic:20b or synthetic:120b, made on the device.",
    )
    add_model_options(parser)
    add_process_options(parser)
    parser.add_argument(
        "--batch",
        type=_several,
        default=[1],
        metavar="ROWS,...",
        help="rows at once, such as 1,8,32; default 1",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=_several,
        default=[512],
        metavar="N,...",
        help="of each row, such as 1024,8192, each with each batch; default 512",
    )
    parser.add_argument(
        "--new-tokens", type=int, default=128, metavar="N", help="default %(default)s"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="timed runs; default %(default)s"
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw tokens/s against the batch, .svg or .png; needs matplotlib",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print and draw."""
    if args.plot:
        bench_plot.check(args.plot)
    shapes = [
        (batch, prompt) for prompt, batch in itertools.product(args.prompt_tokens, args.batch)
    ]
    context = max(args.prompt_tokens) + args.new_tokens
    model = load_model(args, batch=max(args.batch), context=context)
    options = {"new_tokens": args.new_tokens, "repeats": args.repeats, "report": remark}
    done = []
    try:
        for measured in measure(model, shapes, **options):
            if not done:
                write(_head(args.model, measured))
            write(_line(measured))
            done.append(measured)
    finally:
        # A later shape may not fit the memory; what was measured before it is said.
        if done:
            write(json.dumps([{"model": args.model} | dataclasses.asdict(x) for x in done]) + "\n")
    if args.plot and not distributed.index():
        bench_plot.draw(args.model, done, args.plot)
        remark(f"{args.plot} is written")
    return 0


def _head(model: str, first: Measurement) -> str:
    mesh = "" if first.mesh == "none" else f" (--mesh {first.mesh})"
    groups = [f" {name} ".center(width, "-" if name else " ") for name, width in _GROUPS.items()]
    return (
        f"{model} on {first.devices} x {first.device}{mesh}, JAX {first.jax}, {first.dtype}, "
        f"{first.new_tokens} new tokens a row, medians of {first.repeats} runs\n"
        f"copying reaches {first.gb_per_second_limit:,.4g} GB/s, products "
        f"{first.tflop_per_second_limit:,.4g} TFLOP/s\n\n{' '.join(groups)}\n"
        + _aligned([name for name, _ in _COLUMNS])
    )


def _line(found: Measurement) -> str:
    least, most = found.decode_tokens_per_second_range
    return _aligned(
        (
            str(found.batch),
            f"{found.prompt_tokens:,}",
            _number(found.first_token_ms),
            "..".join(map(_number, found.first_token_ms_range)),
            _number(found.prefill_tokens_per_second),
            f"{found.prefill_percent_of_limit:.1f}%",
            _number(found.decode_tokens_per_second),
            f"{_number(least)}..{_number(most)}",
            f"{found.decode_experts:.2f}",
            f"{found.decode_experts_if_uniform:.2f}",
            _number(found.decode_gb_per_step, 3),
            _number(found.decode_gflop_per_step, 3),
            f"{found.decode_limit} {found.decode_percent_of_limit:.0f}%",
        )
    )


def _aligned(cells: Sequence[str]) -> str:
    widths = (width for _, width in _COLUMNS)
    return " ".join(f"{x:>{width}}" for x, width in zip(cells, widths, strict=True)) + "\n"


def _number(value: float, digits: int = 4) -> str:
    return f"{value:,.0f}" if value >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def _several(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]
