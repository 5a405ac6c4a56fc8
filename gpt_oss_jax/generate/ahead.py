"""The programs of a generation, made from shapes alone, in the order in which `loop` runs them.

Their arrays are `jax.ShapeDtypeStruct`s: neither weights nor a device are needed, and what is put
into JAX's persistent cache is what a generation looks for there. Knows nothing of devices that are
only named (`aot`), nor of where compiled programs are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gpt_oss_jax.generate import device, loop
from gpt_oss_jax.kernels.target import platform
from gpt_oss_jax.model import Transformer
from gpt_oss_jax.model.cache import bucket
from gpt_oss_jax.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class Program:
    """One that was compiled.

    Attributes:
      name: Of the function in `device`.
      what: Name and sizes, for people.
      compiled: It; `memory_analysis()` and `as_text()` work without the device, calls do not.
    """

    name: str
    what: str
    compiled: jax.stages.Compiled


def _compiled(what: str, program, *args) -> Generator[Program, None, Any]:
    """Yields the compiled program and returns what a call gives, of shapes and shardings."""
    compiled = program.lower(*args).compile()
    yield Program(what.split(":")[0], what, compiled)
    out = program.eval_shape(*args)
    if all(getattr(x, "sharding", None) is None for x in jax.tree.leaves(args)):
        return out  # Nothing says where the arguments are, so neither do the results.
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    return jax.tree.map(place, out, compiled.output_shardings)


def _lowered(what: str, program, *args) -> Generator[jax.stages.Lowered, None, Any]:
    """Yields the lowered program and returns what a call gives, of shapes, on one device."""
    yield program.lower(*args)
    where = {getattr(x, "sharding", None) for x in jax.tree.leaves(args)} - {None}
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=next(iter(where), None))
    return jax.tree.map(place, program.eval_shape(*args))


def programs(
    model: Transformer,
    *,
    context: int,
    batch: int,
    memory: float,
    samplings: Sequence[SamplingParams],
) -> Iterator[Program]:
    """Compiles all that answers of `batch` prompts in a context need, for any lengths of them.

    Args:
      model: Of shapes and shardings, see `checkpoint.outline`.
      context: Most tokens of a prompt and its answer together.
      batch: Prompts at once.
      memory: Bytes that JAX can have of a device; 0: not known.
      samplings: Which options are on decides; their values do not.
    """
    rows = bucket(batch)
    sizes = cache_sizes(context, rows, platform(), memory)
    for slots, chunks in sizes.items():
        options = {"memory": memory, "samplings": samplings}
        state = yield from of_cache(model, rows, slots, chunks, **options)
        if 2 * slots in sizes:
            yield from growth(model, state)


def growth(model: Transformer, state: device.DecodeState) -> Iterator[Program]:
    """Compiles what gives a state, of shapes, twice the slots."""
    skeleton, _ = device.split(model)
    rows, slots = len(state.token_B), state.cache.max_len
    what = f"grown: {rows} x {slots} to {2 * slots} slots"
    yield from _compiled(what, device.grown, state, skeleton, 2 * slots)


def lower_answer(
    model: Transformer, prompt: int, context: int, sampling: SamplingParams, memory: float
) -> None:
    """Lowers what the answer to one prompt begins with, so that only compiling is left to do.

    JAX keeps what it lowers: a call with arrays of these shapes, in this process, finds it.

    Args:
      model: Of shapes, see `checkpoint.outline`, for one device.
      prompt: Its tokens.
      context: Most tokens of it and its answer.
      sampling: How tokens are drawn.
      memory: Bytes that JAX can have of the device; 0: not known.
    """
    slots = loop.first_slots(prompt, context - 1)
    chunks = set(loop.prompt_calls(prompt - 1, 1, platform(), memory))
    options = {"memory": memory, "samplings": [sampling], "make": _lowered}
    for _ in of_cache(model, 1, slots, sorted(chunks), **options):
        pass


def of_cache(
    model: Transformer,
    rows: int,
    slots: int,
    chunks: Sequence[int],
    *,
    memory: float,
    samplings: Sequence[SamplingParams],
    make: Callable = _compiled,
) -> Generator[Program, None, device.DecodeState]:
    """Makes what works on a cache of this size; returns the state, of shapes.

    Args:
      model: Of shapes and shardings.
      rows: Of the cache.
      slots: Of its full-attention layers.
      chunks: Prompt tokens a row and call.
      memory: Bytes that JAX can have of a device; 0: not known.
      samplings: Each has a decode program of its own.
      make: Compiles or lowers, and yields what it has made.
    """
    skeleton, leaves = device.split(model)
    ints = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)
    size = f"{rows} x {slots} slots"
    cache = yield from make(
        f"empty_cache: {size}", device.empty_cache, leaves[0], skeleton, rows, slots
    )
    for chunk in chunks:
        tokens = ints(rows, chunk)
        what = f"prefill: {rows} x {chunk} tokens, {size}"
        yield from make(what, device.prefill, leaves, cache, tokens, tokens, skeleton)
    each = ints(rows)
    seeds = ints(rows, dtype=jnp.uint32)
    state = yield from make(
        f"begin: {size}", device.begin, cache, seeds, each, each, each, each, skeleton
    )
    stops, steps = ints(loop.stop_slots(0)), ints()
    for sampling in samplings:
        _, on = sampling.tree_flatten()
        what = f"decode: {size}, {', '.join(on) or 'greedy'}"
        run = device.decode_program(state, skeleton, device.spare_bytes(leaves, memory))
        yield from make(what, run, leaves, state, sampling, stops, steps, skeleton)
    return state


def cache_sizes(context: int, rows: int, kind: str, memory: float) -> dict[int, tuple[int, ...]]:
    """Slots of every cache that can come up, and the chunks that are read into one of that size.

    Args:
      context: Most tokens of a prompt and its answer together.
      rows: Of the cache.
      kind: "cpu", "gpu" or "tpu".
      memory: Bytes of a device.

    Raises:
      ValueError: If the context leaves no room for a prompt and an answer.
    """
    if context < 2:
        raise ValueError(f"the context must hold a prompt and an answer, got {context} tokens.")
    found: dict[int, set[int]] = {}
    sizes, calls = loop.call_sizes(rows, kind, memory), [frozenset()]
    for prompt in range(1, context):
        if read := prompt - 1:  # All but its last token.
            call = loop.first_call(read, sizes)
            calls.append(calls[max(0, read - call)] | {call})
        for furthest in (prompt, context - 1):
            found.setdefault(loop.first_slots(prompt, furthest), set()).update(calls[read])
    return {slots: tuple(sorted(chunks)) for slots, chunks in sorted(found.items())}
