"""`gpt-oss-jax plan`: whether a model fits a device, before anything is loaded."""

import argparse
import contextlib
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp

from gpt_oss_jax import aot, compile_archive
from gpt_oss_jax.checkpoint import outline
from gpt_oss_jax.cli.terminal import (
    FORMS,
    add_placement_options,
    positive,
    remark,
    say_unsplit,
    say_used,
    sizes,
    write,
)
from gpt_oss_jax.config import Config
from gpt_oss_jax.generate import ahead
from gpt_oss_jax.generate.loop import prompt_calls
from gpt_oss_jax.model.cache import MIN_SLOTS, bucket
from gpt_oss_jax.model.moe import can_use_words
from gpt_oss_jax.plan import GIB, KINDS, MOST_ROWS, POOL, Plan, parse_device, plan, variables
from gpt_oss_jax.sampling import SamplingParams
from gpt_oss_jax.sharding import abstract_mesh, make_mesh, not_split, spelled

_DEFAULT_POOL = 0.75  # Of a GPU's memory, what JAX takes by itself.


def add(commands) -> None:
    """Declare `plan MODEL --device KIND`."""
    parser = commands.add_parser(
        "plan",
        help="does it fit, before anything is loaded",
        description="Counts what a model needs on each device, from its sizes alone: nothing is "
        "downloaded for 20b and 120b, nothing loaded, no device touched. Exit code 0: it fits. "
        "1: it does not. Speeds are limits of the hardware, not measurements.",
    )
    parser.add_argument("model", metavar="MODEL", help="20b, 120b, or a checkpoint")
    parser.add_argument(
        "--device",
        required=True,
        metavar="KIND",
        help=f"{', '.join(KINDS)}; with a count v5e-8, v5p-8 (4 chips), 2xh100; or 16GB",
    )
    parser.add_argument(
        "-c", "--context", type=positive, default=8192, metavar="TOKENS", help="default %(default)s"
    )
    parser.add_argument(
        "--batch", type=positive, default=1, metavar="ROWS", help="default %(default)s"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add_placement_options(parser)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="ask the TPU compiler too (libtpu; minutes) and show its memory beside the estimate",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Count and print."""
    kind, devices = parse_device(args.device)
    if args.compile and kind.platform != "tpu":
        raise ValueError("--compile asks the compiler for TPU; name a TPU.")
    config, experts = sizes(args.model)
    if args.compile and experts != "mxfp4":
        raise ValueError("--compile asks about MXFP4 experts; this checkpoint has others.")
    dtype = jnp.dtype(args.dtype)
    options = {
        "context": args.context,
        "batch": args.batch,
        "dtype": dtype,
        "experts": experts,
        "mesh": args.mesh,
        "expert_form": args.expert_form,
    }
    found = plan(config, kind, devices, **options)
    write(f"{args.model} on {_devices(found)}, {args.dtype}, ")
    write(f"context {args.context:,} tokens, batch {args.batch}\n\n{_table(found)}\n")
    paths = {"/".join(map(str, k)): x for k, x in variables(config, dtype, experts).items()}
    if whole := not_split(paths, abstract_mesh(found.mesh)):
        remark(whole)
    if experts == "mxfp4" and not can_use_words(config, abstract_mesh(found.mesh)):
        remark(
            f"--mesh {spelled(found.mesh)} splits the width of experts, and the fastest kernels "
            "want whole ones: speeds will be far from these limits; expert= splits no expert"
        )
    if found.spread or found.on_all is not None:
        say_used(args.model, devices, found)
    say_unsplit(found.mesh)
    if args.compile:
        _ask_compiler(config, found, dtype)
    return 0 if found.fits else 1


def _devices(found: Plan) -> str:
    count = math.prod(found.mesh.values())
    if count == 1:
        return found.kind.name
    return f"{count} x {found.kind.name} (--mesh {spelled(found.mesh)})"


def _table(found: Plan) -> str:

    def gib(size):
        large = abs(size) >= 0.1 * GIB
        return f"{size / GIB:>9.2f} GiB" if large else f"{size * 1024 / GIB:>9.2f} MiB"

    missing = gib(-found.margin).strip()
    where = " on each device" if max(found.mesh.values()) > 1 else ""
    form = f", {FORMS[found.expert_form]}" if found.expert_form else ""
    lines = [
        f"{'weights':<12}{gib(found.weights)}{where}{form}",
        f"{'cache':<12}{gib(found.cache)}",
        f"{'workspace':<12}{gib(found.workspace)}, an estimate",
        f"{'margin':<12}{gib(found.margin)} of {found.kind.memory_gib:.2f} that JAX can have",
        "",
    ]
    if found.fits:
        lines.append(
            f"It fits. Largest context at batch {found.batch}: {found.largest_context:,} tokens; "
            f"largest batch at this context: {found.largest_batch:,}"
            f"{' or more' if found.largest_batch == MOST_ROWS else ''}."
        )
    elif found.largest_context:
        lines.append(
            f"It does NOT fit: {missing} are missing. "
            f"--context {found.largest_context} would fit at batch {found.batch}."
        )
    elif found.largest_batch:
        lines.append(
            f"It does NOT fit: {missing} are missing. "
            f"--batch {found.largest_batch} would fit at this context."
        )
    else:
        lines.append(
            f"It does NOT fit: {missing} are missing. More devices are needed, "
            f"or larger ones{', or --expert-form packed' if found.expert_form == 'folded' else ''}."
        )
    needed = POOL * (1 - found.margin / GIB / found.kind.memory_gib)
    if found.fits and found.kind.platform == "gpu" and needed > _DEFAULT_POOL:
        lines.append(
            f"From Python, JAX takes {100 * _DEFAULT_POOL:.0f}% of a GPU's memory unless told "
            f"otherwise: export XLA_CLIENT_MEM_FRACTION={POOL}"
        )
    if found.kind.bandwidth_gb:
        lines.append(
            f"At most {found.decode_tokens_per_second:,.0f} tokens/s when decoding at a full "
            f"context, by {found.decode_bytes / 1e9:.2f} GB a step at "
            f"{found.kind.bandwidth_gb:,.0f} GB/s;\n"
            f"at most {found.prefill_tokens_per_second:,.0f} tokens/s of prompts that fill it, by "
            f"{found.prefill_flops / 1e9:.2f} GFLOP a token at {found.kind.tflops:,.0f} TFLOP/s."
        )
    else:
        lines.append("The speed of a device known by its memory alone is not known.")
    return "\n".join(lines)


def _ask_compiler(config: Config, found: Plan, dtype) -> None:
    count = math.prod(found.mesh.values())
    devices = aot.devices(found.kind.name, count)
    rows, slots = bucket(found.batch), bucket(found.context - 1, MIN_SLOTS)
    memory = found.kind.memory_gib * GIB
    chunk = max(prompt_calls(found.context, rows, found.kind.platform, memory))
    options = {"memory": memory, "samplings": [SamplingParams()]}
    arguments, temporaries = 0, {}
    with contextlib.ExitStack() as stack:
        # What is in the user's cache cannot be read without the device, and nothing is to be added.
        stack.enter_context(
            compile_archive.kept_in(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        )
        stack.enter_context(aot.in_place_of_ours(devices[0]))
        mesh = make_mesh(**found.mesh, devices=devices) if count > 1 else None
        model = outline(config, mesh=mesh, dtype=dtype, expert_form=found.expert_form)
        remark(f"compiling for {found.kind.name}, up to two minutes a program of the whole model")
        start = time.perf_counter()
        for program in _largest(model, rows, slots, chunk, options):
            remark(f"{program.what}: {time.perf_counter() - start:.1f} s")
            start = time.perf_counter()
            memory = program.compiled.memory_analysis()
            # What a program does not use stays where it is.
            arguments = max(arguments, memory.argument_size_in_bytes)
            temporaries[program.name] = memory.temp_size_in_bytes
            if program.name == "grown":
                # Beside weights and the new cache, which are arguments of the others.
                temporaries[program.name] += memory.argument_size_in_bytes
    total = arguments + max(temporaries.values())
    estimate = found.weights + found.cache + found.workspace
    parts = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in temporaries.items() if size)
    write(
        f"\nThe compiler: {total / GIB:.2f} GiB, of these {arguments / GIB:.2f} weights and cache; "
        f"beside them {parts}.\nEstimated were {estimate / GIB:.2f} GiB, "
        f"{100 * (estimate / total - 1):+.1f}%.\n"
    )


def _largest(model, rows, slots, chunk, options) -> Iterator[ahead.Program]:
    """The programs with a cache of this size, and before them the one that makes it so large."""
    # Whatever goes past the least one begins with twice that.
    if slots > 2 * MIN_SLOTS:
        smaller = options | {"samplings": []}
        state = yield from ahead.of_cache(model, rows, slots // 2, [], **smaller)
        yield from ahead.growth(model, state)
    yield from ahead.of_cache(model, rows, slots, [chunk], **options)
