"""`gpt-oss-jax parity`: where the numbers part from a reference; exit code 1 if they do."""

import argparse
import dataclasses
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from gpt_oss_jax.checkpoint import open_source
from gpt_oss_jax.checkpoint.progress import progress
from gpt_oss_jax.cli.terminal import remark, write
from gpt_oss_jax.config import GPT_OSS_20B
from gpt_oss_jax.harmony import encode_text, token_bytes
from gpt_oss_jax.parity import Recorder, Streamed, compare, golden, html, pytorch, values

_PYTORCH = ("official", "hf")


def add(commands) -> None:
    """Declare `parity MODEL`."""
    parser = commands.add_parser(
        "parity",
        help="compare with PyTorch or a golden file, op by op",
        description="Compares the model, op by op, with a reference on the same checkpoint, one "
        "block in memory at a time. Exit code 0: rounding explains every difference. 1: it does "
        "not, and the first op that differs is named. docs/parity.md says what all of it means.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder or a Hugging Face repository")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="to compute ours in; default: %(default)s, in which mistakes stand out",
    )
    against = parser.add_mutually_exclusive_group()
    against.add_argument(
        "--reference",
        default="official",
        metavar="WHAT",
        help="official (OpenAI's torch model, the default), hf (that of transformers), both in "
        "float32; or another checkpoint, run by us in float32; or an .npz of arrays by the names "
        "of capture=, with tokens",
    )
    against.add_argument("--golden", metavar="FILE", help="a golden file; needs no PyTorch")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", help="what to read; default: random tokens")
    text.add_argument("--ids", type=_ids, metavar="1,2,...", help="tokens to read")
    text.add_argument(
        "--length", type=int, metavar="N", help="random tokens; default: 160, past the window"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of random tokens; default: 0")
    parser.add_argument("--save", metavar="FILE", help="write the reference as a golden file")
    parser.add_argument("--html", metavar="FILE", help="write the report as a page with plots")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare, print and write what is asked for."""
    if args.save and (args.golden or args.reference.endswith(".npz")):
        raise ValueError("--save keeps what official, hf or a checkpoint computes, nothing saved.")
    for path in (args.save, args.html):
        if path is not None:
            _check_writable(Path(path))
    reference, tokens = None, None
    if args.golden:
        reference = golden.load(args.golden)
        tokens = reference.tokens_T
    elif args.reference.endswith(".npz"):
        reference, tokens = _arrays(args.reference)
    given = [x for x in ("text", "ids", "length", "seed") if getattr(args, x) is not None]
    if tokens is not None and given:
        raise ValueError(f"the file of the reference brings its tokens; leave out --{given[0]}.")
    if args.seed is not None and (args.text is not None or args.ids is not None):
        raise ValueError("--seed is of random tokens; leave it out with --text and --ids.")
    source = open_source(args.model)
    if tokens is None:
        tokens = _tokens(args, source.config.vocab_size)
    if args.golden:
        reference.check(tokens, source.config)
        if reference.provenance.get("checkpoint") != golden.fingerprint(source):
            remark("the golden file was made from other weights than these")
    # A reference that is computed reads the checkpoint too.
    total = (1 + (reference is None)) * sum(x.nbytes for x in source.variables.values())
    with progress("comparing", total) as step:
        if reference is None:
            reference = Recorder(_reference(args.reference, source, step))
        report = compare(Streamed(source, jnp.dtype(args.dtype), step=step), reference, tokens)
    write(report.table())
    if args.save:
        about = golden.provenance(f"{args.reference}, float32", source)
        golden.save(reference.golden(about), args.save)
        remark(f"{args.save} is written")
    if args.html:
        title = f"{args.model} against {args.golden or args.reference}"
        has_text = source.config.vocab_size == GPT_OSS_20B.vocab_size
        html.write(report, args.html, title, _decode if has_text else None)
        remark(f"{args.html} is written")
    return 0 if report.ok else 1


def _check_writable(path: Path) -> None:
    """Said before the comparison, which may take an hour, not after."""
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path} must lie in a folder that exists.")
    if path.is_dir():
        raise ValueError(f"a file to write is wanted, but {path} is a folder.")


def _decode(token: int) -> str:
    return token_bytes(token).decode("utf-8", "replace")


def _reference(name: str, source, step):
    if name in _PYTORCH:
        return pytorch.reference(name, source, step)
    other = open_source(name)
    if odd := golden.unlike(source.config, dataclasses.asdict(other.config)):
        raise ValueError(
            f"{name} must have the config of the model it is compared with, which has {odd}."
        )
    return partial(values, Streamed(other, jnp.float32, step=step))


def _tokens(args: argparse.Namespace, vocab_size: int) -> np.ndarray:
    if args.text == "":
        raise ValueError("--text must not be empty.")
    if args.text is not None:
        return np.asarray(encode_text(args.text), np.int32)
    if args.ids is not None:
        return args.ids
    length = 160 if args.length is None else args.length
    if length < 1:
        raise ValueError(f"--length must be at least 1 token, got {length}.")
    seed = args.seed or 0
    if seed < 0:
        raise ValueError(f"--seed must not be negative, got {seed}.")
    return np.random.default_rng(seed).integers(0, vocab_size, length, np.int32)


def _ids(text: str) -> np.ndarray:
    try:
        return np.array([int(x) for x in text.split(",")], np.int32)
    except (ValueError, OverflowError) as error:
        message = f"wanted token ids, such as 1,2,3, got {text!r}"
        raise argparse.ArgumentTypeError(message) from error


def _arrays(path: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    arrays = golden.read(path)
    if "provenance" in arrays:
        raise ValueError(f"{path} is a golden file: --golden {path} compares with it.")
    if "tokens" not in arrays:
        raise ValueError(f"{path} must hold tokens, ids [T], beside the arrays.")
    return arrays, arrays.pop("tokens")
