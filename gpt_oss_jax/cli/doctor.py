"""`gpt-oss-jax doctor`: what is installed, and what is wrong; exit code 1 if anything is."""

import argparse

from gpt_oss_jax.cli.terminal import write
from gpt_oss_jax.doctor import examine


def add(commands) -> None:
    """Declare `doctor [MODEL]`."""
    parser = commands.add_parser("doctor", help="check the installation, and a checkpoint")
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="also check this checkpoint: its index against its files, and their shapes",
    )
    # What it says of a GPU's memory is what programs of the user's own have.
    parser.set_defaults(run=run, takes_memory=False)


def run(args: argparse.Namespace) -> int:
    """Print a line for everything that was looked at."""
    problems = 0
    for finding in examine(args.model):
        problems += finding.is_problem
        mark = "PROBLEM " if finding.is_problem else ""
        write(f"{finding.about:<11} {mark}{finding.text}\n")
    result = f"{problems} problem{'s' * (problems > 1)}" if problems else "all well"
    write(f"{'result':<11} {result}\n")
    return 1 if problems else 0
