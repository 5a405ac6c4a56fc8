"""`gpt-oss-jax compile`: the programs of `chat`, `generate` and `bench`, before anything is loaded.

They go into this machine's cache, or into an archive for another one, of which there need be none.
"""

import argparse
import contextlib
import itertools
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from gpt_oss_jax import aot, compile_archive
from gpt_oss_jax.checkpoint import outline, preparations
from gpt_oss_jax.cli.terminal import (
    add_model_options,
    add_sampling_options,
    placement,
    positive,
    remark,
    sampling,
    sizes,
    write,
)
from gpt_oss_jax.generate import ahead
from gpt_oss_jax.plan import GIB, kind_of, parse_device
from gpt_oss_jax.sampling import SamplingParams


def add(commands) -> None:
    """Declare `compile MODEL` and `compile --unpack ARCHIVE`."""
    parser = commands.add_parser(
        "compile",
        help="compile ahead of time, for this machine or a TPU that is not there",
        description="Compiles what chat, generate and bench run, from the model's sizes alone: no "
        "weights are loaded, and for 20b and 120b none need be there. A line for each program, "
        "with its seconds and its MB. 20b takes about 20 s a program.",
    )
    add_model_options(parser, optional=True)
    parser.add_argument(
        "--device",
        metavar="KIND",
        help="a TPU that is not there: v5e, v5e-8, v6e-4, v5p-8 (4 chips), tpu7x-2 (one); needs "
        "libtpu, and --output; default: what JAX finds here",
    )
    parser.add_argument(
        "-c", "--context", type=positive, default=8192, metavar="TOKENS",
        help="most tokens of a conversation, as chat has it; default %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=positive, default=1, metavar="ROWS", help="default %(default)s"
    )
    parser.add_argument(
        "--output",
        metavar="ARCHIVE",
        help="write a tar of the programs; default: into the cache of this machine",
    )
    parser.add_argument(
        "--unpack",
        metavar="ARCHIVE",
        help="put the programs of an archive into the cache of this machine, instead; they are "
        "machine code, so only your own",
    )
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compile and pack, or unpack."""
    if (args.model is None) == (args.unpack is None):
        raise ValueError("wanted is either a MODEL to compile or --unpack ARCHIVE.")
    if args.unpack is not None:
        return _unpack(Path(args.unpack))
    if args.output is not None and not Path(args.output).absolute().parent.is_dir():
        raise ValueError(f"the folder of {args.output} does not exist.")
    if args.device is not None and args.output is None:
        raise ValueError("programs for another machine need --output ARCHIVE to travel in.")
    config, experts = sizes(args.model)
    if not 2 <= args.context <= config.max_context:
        raise ValueError(f"the context must be 2 to {config.max_context:,} tokens.")
    with contextlib.ExitStack() as stack:
        devices = jax.devices() if args.device is None else _named(args.device)
        device = devices[0]
        if args.device is not None:
            stack.enter_context(aot.in_place_of_ours(device))
        of_use = {"batch": args.batch, "context": args.context}
        mesh, form = placement(args, devices, config, experts, must_fit=True, **of_use)
        if device.platform == "tpu" and jax.__version_info__ < (0, 11):
            # Its names of programs hold the paths and lines of the code that leads to a kernel.
            raise ValueError(
                f"programs for TPU are found again from JAX 0.11 on, not {jax.__version__}."
            )
        if args.output is not None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stack.enter_context(compile_archive.kept_in(directory))
        else:
            directory = _ours()
        start = time.perf_counter()
        dtype = jnp.dtype(args.dtype) if args.dtype else None
        model = outline(config, experts=experts, mesh=mesh, dtype=dtype, expert_form=form)
        # Those of `bench` are greedy; of the values of options no program depends.
        samplings = {x.tree_flatten()[1]: x for x in (sampling(args), SamplingParams(0.0))}
        memory = kind_of(device).memory_gib * GIB
        of_use |= {"memory": memory, "samplings": list(samplings.values())}
        loading = (
            ahead.Program("load", f"load: {what}", lowered.compile())
            for what, lowered in preparations(model)
        )
        made = itertools.chain(loading, ahead.programs(model, **of_use))
        count = _watched(made, directory)
        said = f"{count} programs for {device.device_kind} in {time.perf_counter() - start:.1f} s"
        if args.output is not None:
            size = compile_archive.pack(directory, Path(args.output).absolute(), device)
            said += f", {size / 1e6:.1f} MB: {args.output}"
    write(f"{said}\n")
    return 0


def _named(name: str) -> list[jax.Device]:
    """The devices of a slice that is not there."""
    kind, count = parse_device(name)
    if kind.platform != "tpu":
        raise ValueError(
            f"of devices that are not there only TPUs can be compiled for, not {kind.name}; on a "
            "machine with the GPU leave --device out."
        )
    return aot.devices(kind.name, count)


def _watched(programs, directory: Path) -> int:
    """Says of each program how long it took; returns how many there were."""
    known, count, start = set(compile_archive.programs(directory)), 0, time.perf_counter()
    for program in programs:
        now = set(compile_archive.programs(directory))
        size = sum(path.stat().st_size for path in now - known)
        kept = f"{size / 1e6:.2f} MB" if size else "was there"
        remark(f"{program.what}: {time.perf_counter() - start:.1f} s, {kept}")
        known, count, start = now, count + 1, time.perf_counter()
    return count


def _ours() -> Path:
    """Where this machine keeps its programs."""
    chosen = jax.config.jax_compilation_cache_dir
    if not chosen or "://" in chosen:
        raise ValueError(
            f"compiled programs are kept in {chosen or 'no folder'}: set JAX_COMPILATION_CACHE_DIR "
            "to a local folder; or write an archive with --output and unpack it with tar."
        )
    return Path(chosen)


def _unpack(archive: Path) -> int:
    if not archive.is_file():
        raise ValueError(f"{archive} is no file; wanted is an archive of compile --output.")
    directory = _ours()
    count = compile_archive.unpack(archive, directory, jax.devices()[0])
    write(f"{count} programs unpacked into {directory}\n")
    return 0
