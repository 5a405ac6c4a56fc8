"""Scores against one full forward, over chunks that do and do not divide the length."""

import dataclasses

import jax
import numpy as np
import pytest
from random_model import random_model
from sizes import TINY

from gpt_oss_jax.generate import device, generate, loop, score
from gpt_oss_jax.sampling import SamplingParams

TOKENS = [(13 * i * i + 5) % 101 for i in range(50)]


@pytest.fixture(scope="module")
def model():
    return random_model(dataclasses.replace(TINY, num_hidden_layers=2))


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setattr(loop, "_CALLS", (16,))
    monkeypatch.setattr(loop, "_MIN_SLOTS", 64)


def test_scores_are_those_of_one_forward(model):
    logits = jax.jit(lambda m, t: m(t))(model, np.array([TOKENS]))
    wanted = np.asarray(jax.nn.log_softmax(logits))[0, np.arange(49), TOKENS[1:]]
    for length in (50, 49, 17, 2):
        scores = score(model, TOKENS[:length], chunk=16)
        assert scores.dtype == np.float32 and scores.shape == (length - 1,)
        np.testing.assert_allclose(scores, wanted[: length - 1], atol=2e-5)
    assert np.ptp(wanted) > 1, "scores that are all alike would show nothing"


def test_scores_are_the_logprobs_of_generation(model):
    sampling = SamplingParams(temperature=0)
    steps = list(generate(model, TOKENS[:20], max_tokens=20, sampling=sampling))
    scores = score(model, TOKENS[:20] + [step.token for step in steps], chunk=16)
    np.testing.assert_allclose(scores[19:], [step.logprob for step in steps], atol=2e-5)


def test_one_chunk_of_logits_at_a_time(model):
    """The program that runs knows a chunk's positions only, whatever the length."""
    skeleton, leaves = device.split(model)
    cache = device.empty_cache(leaves[0], skeleton, 1, 64)
    zeros = np.zeros((1, 16), np.int32)
    text = device.score_chunk.lower(leaves, cache, zeros, zeros, zeros, skeleton).as_text()
    assert "1x16x101x" in text and "x64x101x" not in text


def test_one_token_has_nothing_before_it(model):
    assert score(model, [3]).shape == (0,)


@pytest.mark.parametrize(
    ("tokens", "chunk", "message"),
    [
        ([], 16, "at least one token id"),
        ([1, 101], 16, "got 101 at index 1"),
        (np.zeros(131_073, int), 16, "131072 tokens, got 131073"),
        ([1, 2], 0, "chunk must be"),
    ],
)
def test_errors(model, tokens, chunk, message):
    with pytest.raises(ValueError, match=message):
        score(model, tokens, chunk=chunk)
