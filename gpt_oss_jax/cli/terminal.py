"""What the commands share: their common options, and how they write to the terminal.

It knows no command.
"""

import argparse
import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp

from gpt_oss_jax.checkpoint import load
from gpt_oss_jax.model import Transformer
from gpt_oss_jax.sampling import SamplingParams
from gpt_oss_jax.sharding import make_mesh

DIM = "\033[2m"
_PATIENCE = 2.0  # Seconds.
_MEM_FRACTION, _OLD_MEM_FRACTION = "0.95", "XLA_PYTHON_CLIENT_MEM_FRACTION"
_T = TypeVar("_T")
_PLAIN = "\033[0m"
# A model may write what a terminal takes for commands.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def remark(text: str) -> None:
    """One line to the person at the terminal; never part of an answer."""
    sys.stderr.write(f"gpt-oss-jax: {text}\n")
    sys.stderr.flush()


def write(text: str, style: str = "") -> None:
    """Part of an answer, at once; as it is when piped, harmless and styled on a terminal."""
    if sys.stdout.isatty():
        text = text.translate(_CONTROLS)
        if style and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
            text = f"{style}{text}{_PLAIN}"
    sys.stdout.write(text)
    sys.stdout.flush()


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Says why, if what is waited for takes long."""
    timer = threading.Timer(
        _PATIENCE,
        remark,
        ["compiling for this device, or reading a long prompt; later runs are faster"],
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def announced(pieces: Iterator[_T]) -> Iterator[_T]:
    """The pieces; if the first takes long, it is said why."""
    with waiting():
        first = next(pieces, None)
    if first is not None:
        yield first
        yield from pieces


def add_model_options(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """MODEL, which may be left out if `optional`, and how to load it."""
    parser.add_argument(
        "model",
        nargs="?" if optional else None,
        metavar="MODEL",
        help="a folder, a Hugging Face repository or tiny",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of weights, activations and cache; default: bfloat16, on a CPU float32",
    )
    parser.add_argument(
        "--mesh",
        type=mesh_axes,
        metavar="AXIS=N,...",
        help="spread over devices, e.g. tensor=2 or expert=2,tensor=2; default: one device",
    )


def take_gpu_memory() -> None:
    """Lets JAX have nearly all of a GPU, where by itself it leaves a quarter; before it starts."""
    if not any(name in os.environ for name in ("XLA_CLIENT_MEM_FRACTION", _OLD_MEM_FRACTION)):
        os.environ["XLA_CLIENT_MEM_FRACTION"] = _MEM_FRACTION


def load_model(args: argparse.Namespace) -> Transformer:
    """The model that `add_model_options` asked for."""
    try:
        platform = jax.devices()[0].platform
    except Exception as error:  # Of any kind, a busy TPU or a missing driver.
        why = str(error) or type(error).__name__
        raise ValueError(f"JAX finds no device: {why}. gpt-oss-jax doctor says more.") from error
    if platform == "gpu" and os.environ.get("XLA_CLIENT_MEM_FRACTION") == _MEM_FRACTION:
        share = f"{100 * float(_MEM_FRACTION):.0f}%"
        remark(f"JAX takes {share} of the GPU's memory (XLA_CLIENT_MEM_FRACTION={_MEM_FRACTION})")
    return load(
        args.model,
        mesh=make_mesh(**args.mesh) if args.mesh else None,
        dtype=jnp.dtype(args.dtype) if args.dtype else None,
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How the next token is drawn; the defaults are those the model was released with."""
    defaults = SamplingParams()
    options = parser.add_argument_group("sampling")
    options.add_argument(
        "--temperature",
        type=float,
        default=defaults.temperature,
        help="0 is greedy; default %(default)s",
    )
    options.add_argument(
        "--top-p", type=float, default=defaults.top_p, help="default %(default)s: off"
    )
    options.add_argument(
        "--top-k", type=int, default=defaults.top_k, help="default %(default)s: off"
    )
    options.add_argument(
        "--min-p", type=float, default=defaults.min_p, help="default %(default)s: off"
    )
    options.add_argument("--seed", type=int, help="makes the reply repeatable")


def sampling(args: argparse.Namespace) -> SamplingParams:
    """The parameters that `add_sampling_options` asked for."""
    return SamplingParams(args.temperature, args.top_k, args.top_p, args.min_p, args.seed)


def positive(text: str) -> int:
    """An option that counts something."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number of at least 1, got {text!r}.")
    return number


def mesh_axes(text: str) -> dict[str, int]:
    """An option that says how to spread a model."""
    try:
        parts = [part.split("=") for part in text.split(",")]
        axes = {name: int(size) for name, size in parts}
    except ValueError:
        axes = {}
    if (
        not axes
        or len(axes) < len(parts)
        or not set(axes) <= {"data", "expert", "tensor"}
        or min(axes.values()) < 1
    ):
        raise argparse.ArgumentTypeError(
            f"wanted sizes of data, expert or tensor, such as expert=4, got {text!r}."
        )
    return axes
