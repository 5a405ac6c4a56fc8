"""Whole-model logits in float32 against both references, by every road that leads to them.

Full forwards at the lengths where windows and the initial context end, prefill in chunks of any
length, decoding token by token, rows of different length in one batch, and greedy generation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_oss_jax.generate import generate
from gpt_oss_jax.model import init_cache
from gpt_oss_jax.sampling import SamplingParams

LAYOUTS = ("original", "hf")
# Around the window of each, and far past it; the initial context of both ends at 4,096.
LENGTHS = {"window-7": (1, 6, 7, 8, 300), "window-128": (1, 7, 127, 128, 129, 300)}
CHUNKS = {"window-7": (1, 5, 7, 8, 130), "window-128": (1, 7, 130)}
PAST_INITIAL_CONTEXT = 4097


@jax.jit
def forward(model, tokens_BT):
    return model(tokens_BT)


@jax.jit
def extend(model, tokens_BT, positions_BT, cache):
    return model.forward(tokens_BT, positions_BT, cache)


def cached_logits(model, tokens_BS, counts) -> np.ndarray:
    """Logits [B, S, V], computed through a cache.

    Args:
      model: Ours.
      tokens_BS: One text a row.
      counts: For each call, how many tokens each row has in it: int [calls, B]. Rows are padded to
        the longest with positions of -1.
    """
    counts = np.asarray(counts)
    batch, length = tokens_BS.shape
    assert (counts.sum(0) == length).all()
    chunk = np.arange(counts.max())
    cache = init_cache(model.config, batch, length, jnp.float32)
    logits_BSV = np.full((batch, length, model.config.vocab_size), np.nan, np.float32)
    start_B = np.zeros(batch, np.int32)
    for count_B in counts:
        positions_BT = start_B[:, None] + chunk
        positions_BT = np.where(chunk < count_B[:, None], positions_BT, -1).astype(np.int32)
        tokens_BT = np.take_along_axis(tokens_BS, np.maximum(positions_BT, 0), 1)
        logits_BTV, cache = extend(model, tokens_BT, positions_BT, cache)
        row, column = np.nonzero(positions_BT >= 0)
        logits_BSV[row, positions_BT[row, column]] = np.asarray(logits_BTV)[row, column]
        start_B += count_B
    return logits_BSV


def chunks(length: int, chunk: int) -> list[list[int]]:
    return [[min(chunk, length - start)] for start in range(0, length, chunk)]


def pairs(table: dict[str, tuple[int, ...]]) -> list[tuple[str, int]]:
    return [(name, value) for name, values in table.items() for value in values]


def test_references_agree(models, check):
    tokens_T = models.tokens(300)
    original, hf = (models.references[layout](tokens_T) for layout in LAYOUTS)
    check(original, hf, tolerance=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("models, length", pairs(LENGTHS), indirect=["models"])
def test_logits(models, check, layout, length):
    tokens_T = models.tokens(length)
    theirs = models.references[layout](tokens_T)
    check(forward(models.ours[layout], tokens_T[None])[0], theirs)


@pytest.mark.usefixtures("compiles_well")
@pytest.mark.parametrize("models", ["window-128"], indirect=True)
def test_logits_past_the_initial_context(models, check):
    tokens_T = models.tokens(PAST_INITIAL_CONTEXT)
    ours = models.ours["hf"]
    whole = forward(ours, tokens_T[None])[0]
    chunked = cached_logits(ours, tokens_T[None], chunks(len(tokens_T), 1000))[0]
    for reference in models.references.values():
        theirs = reference(tokens_T)
        check(whole, theirs)
        check(chunked, theirs)


@pytest.mark.parametrize("models, chunk", pairs(CHUNKS), indirect=["models"])
def test_chunks(models, check, chunk):
    """A chunk of one is decoding."""
    tokens_T = models.tokens(150)
    theirs = models.references["original"](tokens_T)
    check(cached_logits(models.ours["original"], tokens_T[None], chunks(150, chunk))[0], theirs)


def test_rows_of_different_length(models, check):
    """Each call adds 0 to 16 tokens to each of three texts, a different number to each."""
    rows, length, most = 3, 150, 16
    tokens_BS = models.tokens(rows, length)
    generator = np.random.default_rng(2)
    counts, left_B = [], np.full(rows, length)
    while left_B.any():
        counts.append(np.minimum(generator.integers(0, most + 1, rows), left_B))
        left_B = left_B - counts[-1]
    ours = cached_logits(models.ours["hf"], tokens_BS, counts)
    theirs = np.stack([models.references["hf"](tokens_T) for tokens_T in tokens_BS])
    check(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_tokens(models, layout):
    """From before the end of the longer window to past it."""
    prompt, count = models.tokens(116).tolist(), 24
    greedy = SamplingParams(temperature=0.0)
    steps = generate(models.ours[layout], prompt, max_tokens=count, sampling=greedy, stop_tokens=())
    theirs = list(prompt)
    for _ in range(count):
        logits_TV = models.references[layout](np.asarray(theirs, np.int32))
        theirs.append(int(logits_TV[-1].argmax()))
    assert [step.token for step in steps] == theirs[len(prompt) :]
