"""What the commands that may run as several processes share: their options, and coming together."""

import argparse
import logging
import os
import sys

from gpt_oss_jax import distributed
from gpt_oss_jax.cli.terminal import positive


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Which of several processes this is."""
    options = parser.add_argument_group(
        "several processes",
        "The same command on every host; process 0 prompts and prints. Slices of Cloud TPU, TPUs "
        "of GKE and steps of Slurm are detected and need none of these.",
    )
    options.add_argument(
        "--coordinator",
        metavar="HOST[:PORT]",
        help="of process 0; default port 8482; :PORT for another one of the host that is detected",
    )
    options.add_argument(
        "--num-processes",
        type=positive,
        metavar="N",
        help="how many there are; 1 is alone, whatever is detected",
    )
    options.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")
    options.add_argument(
        "--wait",
        type=positive,
        default=300,
        metavar="SECONDS",
        help="how long for the others to come; who does not is named; default %(default)s",
    )


def join(args: argparse.Namespace) -> None:
    """Brings the processes together that `add_process_options` speak of, before any device.

    What was asked of process 0 is asked of all. The others print nothing but errors.

    Raises:
      ValueError: If this process was started with another command than process 0.
    """
    own = ("coordinator", "num_processes", "process_id")
    distributed.distributed_init(*(getattr(args, name) for name in own), timeout=args.wait)
    if distributed.count() == 1:
        return
    plain = {k: v for k, v in vars(args).items() if k not in own and not callable(v)}
    asked = distributed.broadcast(plain)
    if asked["command"] != args.command:
        raise ValueError(
            f"process 0 was started with {asked['command']}, this one with {args.command}: give "
            "every process the same command."
        )
    vars(args).update(asked)
    if distributed.index():
        logging.getLogger("gpt_oss_jax").setLevel(logging.ERROR)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    elif not sys.stdout.isatty():
        # What carries messages between CPUs writes to stdout that it has connected.
        sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors="replace")
        os.dup2(2, 1)
