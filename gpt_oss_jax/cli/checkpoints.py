"""`gpt-oss-jax convert` to Orbax and `gpt-oss-jax export` back out. The work is in checkpoint/."""

import argparse

from gpt_oss_jax.checkpoint import convert, export
from gpt_oss_jax.checkpoint.writer import FORMATS
from gpt_oss_jax.cli.processes import add_process_options
from gpt_oss_jax.cli.terminal import remark


def add(commands) -> None:
    """Declare `convert SRC DST` and `export SRC DST --to FORMAT`."""
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint as Orbax",
        description="Writes Orbax; if it is stopped, the same command goes on where it was.",
    )
    _add_paths(parser)
    parser.set_defaults(run=_convert)
    parser = commands.add_parser(
        "export",
        help="write a checkpoint as safetensors",
        description="Writes a folder that Transformers (hf-mxfp4; hf-bf16: unpacked experts) or "
        "OpenAI's own programs (original) load as it is.",
    )
    _add_paths(parser)
    parser.add_argument(
        "--to", required=True, choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS)
    )
    parser.set_defaults(run=_export)


def _add_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="whatever can be loaded")
    parser.add_argument("target", metavar="DST", help="a folder that does not exist yet")
    add_process_options(parser)


def _convert(args: argparse.Namespace) -> int:
    try:
        convert(args.source, args.target)
    except (KeyboardInterrupt, SystemExit):
        remark("stopped; the same command goes on from the last layer that is written")
        raise
    remark(f"{args.target} is written, read back and equal")
    return 0


def _export(args: argparse.Namespace) -> int:
    export(args.source, args.target, args.to)
    remark(f"{args.target} is written, read back and equal")
    return 0
