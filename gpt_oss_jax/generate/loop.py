"""The host's side of generation: pads, sizes caches, and reads one call while the next one runs."""

from __future__ import annotations

import contextlib
import itertools
import secrets
from collections.abc import Iterator

import jax
import numpy as np

from gpt_oss_jax import distributed
from gpt_oss_jax.generate import device
from gpt_oss_jax.kernels.target import platform
from gpt_oss_jax.model import Transformer
from gpt_oss_jax.model.cache import MIN_SLOTS as _MIN_SLOTS, bucket
from gpt_oss_jax.sampling import SamplingParams

# Prompt tokens a row and call. GPUs have memory for more, and fewer calls are faster there.
_CALLS, _GPU_CALLS, _LARGE_GPU_CALLS = (128, 1024), (4096,), (8192,)
_LARGE_GPU = 20 * 2**30  # Bytes that JAX can have.
_MAX_CALL = 16 * 1024  # Prompt tokens a call, all rows: bounds the memory of activations.
_ROOM = 512  # Slots beyond the prompt to begin with; more are added when they are needed.


def run(
    model: Transformer,
    prompts: list[np.ndarray],
    lasts: list[int],
    n: int,
    sampling: SamplingParams,
    stops: frozenset[int],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields new tokens [rows, STEPS], -1 after a row's last, and their log-probabilities.

    Args:
      model: The model.
      prompts: int32 ids.
      lasts: Last position that the rows of each prompt may fill.
      n: Rows of each prompt.
      sampling: How tokens are drawn.
      stops: Tokens that end a row.
    """
    calls = _dispatched(model, prompts, lasts, n, sampling, stops)
    call = next(calls, None)
    while call is not None:
        # The next call starts before this one is read. If it is one too many it costs nothing: it
        # finds all rows done.
        following = next(calls, None)
        tokens_BC, logprobs_BC, running = jax.device_get(call)
        rows = n * len(prompts)
        yield tokens_BC[:rows], logprobs_BC[:rows]
        call = following if running else None


def score(model: Transformer, ids: np.ndarray, chunk: int) -> np.ndarray:
    """Log-probabilities of all ids but the first, `chunk` of them a call."""
    skeleton, leaves = device.split(model)
    cache = device.empty_cache(leaves[0], skeleton, 1, bucket(len(ids), _MIN_SLOTS))
    logprobs = [np.zeros((1, 0), np.float32)]
    calls = itertools.repeat(chunk, -(-(len(ids) - 1) // chunk))
    for tokens_BT, positions_BT, next_BT in _chunks([ids[:-1]], [ids[1:]], calls):
        logprobs_BT, cache = device.score_chunk(
            leaves, cache, tokens_BT, positions_BT, next_BT, skeleton
        )
        logprobs.append(logprobs_BT)
    return np.concatenate(logprobs, axis=1)[0, : len(ids) - 1]


def _dispatched(model, prompts, lasts, n, sampling, stops):
    """Starts a call of the device loop for every block of results that it yields."""
    longest, furthest = max(map(len, prompts), default=0), max(lasts, default=0)
    budget = max((last + 1 - len(p) for p, last in zip(prompts, lasts, strict=True)), default=0)
    if budget == 0:
        return
    skeleton, leaves = device.split(model)
    slots = first_slots(longest, furthest)
    state = _prefilled(leaves, skeleton, slots, prompts, lasts, n, sampling.seed)
    padding = stop_slots(len(stops)) - len(stops)
    stops_K = np.array([*stops, *[-1] * padding], np.int32)
    spare = device.spare_bytes(leaves, device.memory(leaves))

    taken, steps, block = 0, 1, ()
    try:
        while taken < budget:
            needed = min(longest - 1 + taken + steps, furthest)
            if needed > slots:
                slots = bucket(needed)
                state = device.grown(state, skeleton, slots)
            state, block = device.decode(
                leaves, state, sampling, stops_K, np.int32(steps), skeleton, spare=spare
            )
            for x in block:
                x.copy_to_host_async()
            yield block
            taken, steps = taken + steps, min(4 * steps, device.STEPS)
    finally:
        # JAX 0.11 aborts a program that ends while its CPU still computes. What fails is an error
        # where it is read; here it would be printed beside that one.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.block_until_ready(block)


def _prefilled(leaves, skeleton, slots, prompts, lasts, n, seed) -> device.DecodeState:
    """Reads all but the last token of every prompt, once, and sets up `n` rows for each."""
    before = [prompt[:-1] for prompt in prompts]
    longest, size = max(map(len, before)), bucket(len(prompts))
    calls = prompt_calls(longest, size, platform(), device.memory(leaves))
    cache = device.empty_cache(leaves[0], skeleton, size, slots)
    for tokens_BT, positions_BT, _ in _chunks(before, before, calls):
        cache = device.prefill(leaves, cache, tokens_BT, positions_BT, skeleton)

    rows, size = n * len(prompts), bucket(n * len(prompts))

    def of_rows(values, fill, dtype=np.int32):
        return np.array([*values, *[fill] * (size - rows)], dtype)

    if n > 1:
        cache = device.copied(cache, of_rows(np.arange(rows) // n, 0), skeleton)
    seeds = [secrets.randbits(32) if seed is None else seed for _ in range(rows)]
    if seed is None and skeleton.mesh is not None and skeleton.mesh.is_multi_process:
        seeds = distributed.broadcast(seeds)
    return device.begin(
        cache,
        of_rows(seeds, 0, np.uint32),
        of_rows(np.arange(rows) % n, 0),
        of_rows((prompts[row // n][-1] for row in range(rows)), 0),
        of_rows((len(prompts[row // n]) - 1 for row in range(rows)), -1),
        of_rows((lasts[row // n] for row in range(rows)), -1),
        skeleton,
    )


def first_slots(longest: int, furthest: int) -> int:
    """Slots of the cache to begin with, for prompts and a last position of these; it grows."""
    return bucket(min(furthest, longest + _ROOM), _MIN_SLOTS)


def stop_slots(stops: int) -> int:
    """Length of the array in which so many stop tokens come."""
    return bucket(stops, 4)


def prompt_calls(longest: int, rows: int, kind: str, memory: float) -> list[int]:
    """Prompt tokens that each row gives to one call after the other: few calls, few sizes.

    Args:
      longest: Tokens of the longest prompt.
      rows: Of a call.
      kind: "cpu", "gpu" or "tpu".
      memory: Bytes of a device.
    """
    sizes, calls = call_sizes(rows, kind, memory), []
    while longest > 0:
        calls.append(first_call(longest, sizes))
        longest -= calls[-1]
    return calls


def call_sizes(rows: int, kind: str, memory: float) -> list[int]:
    """All that `prompt_calls`, of the same arguments, can consist of."""
    sizes = _CALLS
    if kind == "gpu":
        sizes += _GPU_CALLS + (_LARGE_GPU_CALLS if memory >= _LARGE_GPU else ())
    return [min(size, max(1, _MAX_CALL // rows)) for size in sizes]


def first_call(longest: int, sizes: list[int]) -> int:
    """Tokens of the first call, for so many.

    It has up to three eighths of its places empty where that is faster than smaller calls.
    """
    return max((size for size in sizes if 8 * longest > 5 * size), default=sizes[0])


def _chunks(prompts, targets, calls):
    """Cuts padded prompts into calls: int32 [B, call] of tokens, positions (-1 pads), targets."""
    calls = list(calls)
    shape = (bucket(len(prompts)), sum(calls))
    tokens, wanted = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    positions = np.full(shape, -1, np.int32)
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        tokens[row, : len(prompt)] = prompt
        positions[row, : len(prompt)] = np.arange(len(prompt))
        wanted[row, : len(prompt)] = target
    for end, size in zip(itertools.accumulate(calls), calls, strict=True):
        part = np.s_[:, end - size : end]
        yield tokens[part], positions[part], wanted[part]
