"""The command line, one program: `gpt-oss-jax COMMAND ...`, also `python -m gpt_oss_jax`.

Answers go to stdout, progress and remarks to stderr. An error of the package is one line and exit
code 2, Ctrl-C is 130; `--debug` shows the traceback instead. One file a command; each has `add`,
which declares its arguments, and `run`. What a command does lives in the package, not here.
"""

import argparse
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence

import jax

from gpt_oss_jax import __version__, compile_cache, distributed
from gpt_oss_jax.cli import (
    bench,
    chat,
    checkpoints,
    compile as compile_command,
    doctor,
    generate,
    parity,
    plan,
)
from gpt_oss_jax.cli.processes import join
from gpt_oss_jax.cli.terminal import remark, take_gpu_memory

COMMANDS = (chat, generate, checkpoints, bench, doctor, parity, plan, compile_command)


class _Parser(argparse.ArgumentParser):
    """Takes `chat MODEL --mesh ... PROMPT`, too, as Python does by itself from 3.12.7 on."""

    _mixes = False

    def parse_known_args(self, args=None, namespace=None):
        if self._mixes:
            return super().parse_known_args(args, namespace)
        self._mixes = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixes = False


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; parsed arguments carry `run`, what to call with them."""
    parser = argparse.ArgumentParser(
        prog="gpt-oss-jax",
        description="OpenAI's gpt-oss in JAX. MODEL is a checkpoint folder (Hugging Face, original "
        "or Orbax), a Hugging Face repository such as openai/gpt-oss-20b, or tiny: the small "
        "trained model in the package.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(takes_memory=True)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_Parser
    )
    for command in COMMANDS:
        command.add(commands)
    for each in commands.choices.values():
        # Behind the command, too, which is where it is put when something went wrong.
        each.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code of the process."""
    _make_streams_usable()
    _end_cleanly_when_asked_to()
    args = build_parser().parse_args(argv)
    logging.basicConfig(format="gpt-oss-jax: %(message)s", force=True)
    logging.getLogger("gpt_oss_jax").setLevel(logging.INFO)
    try:
        code = _run(args)
    except SystemExit as ended:
        _fall_silent(argv)
        distributed.leave(ended.code)
        raise
    if code:
        _fall_silent(argv)
        # Other processes would wait for this one.
        distributed.leave(code)
    return code


def _run(args: argparse.Namespace) -> int:
    try:
        if args.takes_memory:
            take_gpu_memory()
        _enable_compile_cache()
        if "coordinator" in args:
            join(args)
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; keep the interpreter from saying so at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
        if args.debug:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            distributed.await_news()
        remark(_one_line(error), error=True)
        return 2


def _fall_silent(argv: Sequence[str] | None) -> None:
    """What threads could not finish is not said after the reason why a command has ended."""
    if argv is None:  # The process ends, too.
        threading.excepthook = lambda _: None
        logging.disable()
        warnings.simplefilter("ignore")


def _make_streams_usable() -> None:
    """Whoever starts a program may close its streams, or have them in an encoding of 1968."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _end_cleanly_when_asked_to() -> None:
    """A closed terminal or `kill` then end a command as Ctrl-C does."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores one of them.
                signal.signal(number, lambda number, _: sys.exit(128 + number))


def _one_line(error: Exception) -> str:
    if "RESOURCE_EXHAUSTED" in str(error):
        return (
            "the device ran out of memory. A shorter --context or a smaller --batch needs less; "
            "--mesh spreads a model over devices; XLA_CLIENT_MEM_FRACTION is the share of a GPU's "
            "memory that JAX takes. --debug shows the details."
        )
    return str(error)


def _enable_compile_cache() -> None:
    try:
        compile_cache.enable()
    except OSError as error:
        remark(f"compiled programs are not kept for the next run: {error}")
