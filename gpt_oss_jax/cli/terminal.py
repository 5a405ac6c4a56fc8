"""What the commands share: their common options, and how they write to the terminal.

It knows no command.
"""

import argparse
import contextlib
import math
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt_oss_jax import distributed
from gpt_oss_jax.checkpoint import load, open_source, outline, synthetic
from gpt_oss_jax.checkpoint.experts import model_kind
from gpt_oss_jax.checkpoint.hub import ALIASES
from gpt_oss_jax.config import GPT_OSS_20B, GPT_OSS_120B, Config
from gpt_oss_jax.doctor import why_no_device
from gpt_oss_jax.generate import ahead
from gpt_oss_jax.kernels.target import default_device
from gpt_oss_jax.model import Transformer
from gpt_oss_jax.model.moe import EXPERT_FORMS
from gpt_oss_jax.plan import GIB, Plan, kind_of, plan
from gpt_oss_jax.sampling import SamplingParams
from gpt_oss_jax.sharding import MESH_AXES, make_mesh, spelled

DIM = "\033[2m"
_PATIENCE = 2.0  # Seconds.
_MEM_FRACTION, _OLD_MEM_FRACTION = "0.95", "XLA_PYTHON_CLIENT_MEM_FRACTION"
FORMS = {
    "packed": "experts packed, 4.25 bits a weight",
    "folded": "experts folded, 8.25 bits a weight",
}
_RELEASED = {"openai/gpt-oss-20b": GPT_OSS_20B, "openai/gpt-oss-120b": GPT_OSS_120B}
_T = TypeVar("_T")
_PLAIN = "\033[0m"
# A model may write what a terminal takes for commands.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def remark(text: str, *, error: bool = False) -> None:
    """One line to the person at the terminal; never part of an answer.

    Of several processes only process 0 makes remarks; each says its own errors.
    """
    if distributed.index():
        if not error:
            return
        text = f"process {distributed.index()}: {text}"
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
    add_placement_options(parser)


def add_placement_options(parser: argparse.ArgumentParser) -> None:
    """What `plan` decides where it is not said."""
    parser.add_argument(
        "--mesh",
        type=mesh_axes,
        metavar="AXIS=N,...",
        help="devices to spread over, e.g. expert=4 or data=2,expert=4; axes: "
        f"{', '.join(MESH_AXES)}; none: one device; "
        "default: one GPU if that is enough, else all devices",
    )
    parser.add_argument(
        "--expert-form",
        choices=tuple(EXPERT_FORMS),
        help="of MXFP4 experts on TPU, 4.25 or 8.25 bits a weight; default: folded for more than "
        "eight rows at once (tpu7x: two) if that fits, else packed",
    )


def take_gpu_memory() -> None:
    """Lets JAX have nearly all of a GPU, where by itself it leaves a quarter; before it starts."""
    if not any(name in os.environ for name in ("XLA_CLIENT_MEM_FRACTION", _OLD_MEM_FRACTION)):
        os.environ["XLA_CLIENT_MEM_FRACTION"] = _MEM_FRACTION


def load_model(
    args: argparse.Namespace,
    *,
    batch: int = 1,
    context: int = 8192,
    first: tuple[int, int, SamplingParams] | None = None,
) -> Transformer:
    """The model that `add_model_options` asked for.

    Args:
      args: Of the command line.
      batch: Rows that it is to be run with at once.
      context: Tokens of each.
      first: Tokens of the first prompt, of it with its answer, and how these are drawn. What that
        runs is lowered while the weights are read, on one device.
    """
    try:
        platform = default_device().platform
    except Exception as error:  # Of any kind, a busy TPU or a missing driver.
        why = why_no_device(error)
        raise ValueError(f"JAX finds no device: {why}. gpt-oss-jax doctor says more.") from error
    if platform == "gpu" and os.environ.get("XLA_CLIENT_MEM_FRACTION") == _MEM_FRACTION:
        share = f"{100 * float(_MEM_FRACTION):.0f}%"
        remark(f"JAX takes {share} of the GPU's memory (XLA_CLIENT_MEM_FRACTION={_MEM_FRACTION})")
    of_model = sizes(args.model, download=True)
    mesh, form = placement(args, jax.devices(platform), *of_model, batch=batch, context=context)
    options = {"mesh": mesh, "expert_form": form}
    options["dtype"] = jnp.dtype(args.dtype) if args.dtype else None
    if first is None or mesh is not None:
        return load(args.model, **options)
    prompt, whole, sampling = first
    answer = prompt, min(whole, context, of_model[0].max_context), sampling
    lowering = threading.Thread(target=_lower, args=(of_model, options, answer), daemon=True)
    lowering.start()
    try:
        return load(args.model, **options)
    finally:
        # An interpreter that ends while another thread is in the compiler may crash.
        lowering.join()


def _lower(of_model: tuple[Config, str], options: Mapping, answer: tuple) -> None:
    config, experts = of_model
    try:
        memory = (default_device().memory_stats() or {}).get("bytes_limit", 0)
        ahead.lower_answer(outline(config, experts=experts, **options), *answer, memory)
    except Exception as error:
        remark(f"the first answer is lowered when it comes, not before: {error!r}")


def placement(
    args: argparse.Namespace,
    devices: Sequence[jax.Device],
    config: Config,
    experts: str,
    *,
    batch: int,
    context: int,
    must_fit: bool = False,
) -> tuple[Mesh | None, str | None]:
    """The mesh, None for one device, and the form of experts: those asked for or those of `plan`.

    What `plan` has chosen is said.

    Args:
      args: What `add_model_options` asked for.
      devices: That are there, or are named.
      config: Sizes.
      experts: Their kind, as `sizes` returns it.
      batch: Rows at once.
      context: Tokens of each.
      must_fit: Whether to refuse what `plan` says does not fit TPUs; `load` does for itself.

    Raises:
      ValueError: If it must fit and does not.
    """
    kind, context = kind_of(devices[0]), min(context, config.max_context)
    found = plan(
        config,
        kind,
        len(devices),
        context=context,
        batch=batch,
        dtype=args.dtype or ("float32" if kind.platform == "cpu" else "bfloat16"),
        experts=experts,
        mesh=args.mesh,
        expert_form=args.expert_form,
    )
    if must_fit and kind.platform == "tpu" and not found.fits:
        raise ValueError(
            f"{args.model} with {batch} x {context:,} tokens needs {-found.margin / GIB:,.2f} GiB "
            f"more than each {kind.name} has; gpt-oss-jax plan says what fits."
        )
    count = math.prod(found.mesh.values())
    if args.mesh is None and len(devices) > 1:
        say_used(args.model, len(devices), found)
    say_unsplit(found.mesh)
    if found.expert_form and args.expert_form is None:
        remark(f"{FORMS[found.expert_form]}, for {batch} x {context:,} tokens")
    return make_mesh(**found.mesh, devices=devices) if count > 1 else None, found.expert_form


def say_used(model: str, devices: int, found: Plan) -> None:
    """How many of several devices the default mesh takes, and what would take more of them."""
    if found.spread:
        count = math.prod(found.spread.values())
        said = f"running on 1 of {devices} GPUs, where {model} fits; --mesh {spelled(found.spread)}"
        said += " spreads it" + ("" if count == devices else f" over {count}")
    else:
        count = math.prod(found.mesh.values())
        said = f"spread over {count} of {devices} devices, --mesh {spelled(found.mesh)}"
    if found.on_all:
        said += f"; --mesh {spelled(found.on_all)} takes all, on slower kernels"
    elif found.on_all is not None:
        said += f"; no mesh splits it over all {devices}"
    remark(said)


def say_unsplit(mesh: Mapping[str, int]) -> None:
    """Which axes have devices that all do the same."""
    for axis, what in (("data", "rows"), ("context", "tokens and slots")):
        size = mesh.get(axis, 1)
        if size & (size - 1):
            fewer = 1 << (size.bit_length() - 1)
            remark(
                f"--mesh {axis}={size} does not split {what}, which come in powers of two; "
                f"{axis}={fewer} does"
            )


def sizes(name: str, *, download: bool = False) -> tuple[Config, str]:
    """Config and kind of the experts; those of the released models are known."""
    if name.startswith(synthetic.PREFIX):
        return synthetic.config_of(name), "mxfp4"
    released = _RELEASED.get(ALIASES.get(name, name))
    if not download:
        # By its last part as well: a folder that is not there is not looked for elsewhere.
        released = released or _RELEASED.get(f"openai/{name}")
    if released is not None and not os.path.isdir(name):
        return released, "mxfp4"
    source = open_source(name, download=download)
    return source.config, model_kind(source)


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
    """An option that says how to spread a model; `none`, over one device, has no axes."""
    if text == "none":
        return {}
    try:
        parts = [part.split("=") for part in text.split(",")]
        axes = {name: int(size) for name, size in parts}
    except ValueError:
        axes = {}
    if (
        not axes
        or len(axes) < len(parts)
        or not set(axes) <= set(MESH_AXES)
        or min(axes.values()) < 1
    ):
        raise argparse.ArgumentTypeError(
            f"wanted sizes of {', '.join(MESH_AXES)}, such as expert=4, or none, got {text!r}."
        )
    return axes
