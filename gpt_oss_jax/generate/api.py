"""What users call: `generate`, `generate_batch` and `score`, and the checks at their edge."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from gpt_oss_jax.config import Config
from gpt_oss_jax.generate import loop
from gpt_oss_jax.model import Transformer
from gpt_oss_jax.sampling import SamplingParams

STOP_TOKENS = (200002, 200012, 199999)  # <|return|>, <|call|>, <|endoftext|>


@dataclasses.dataclass(frozen=True)
class Step:
    """One generated token.

    Attributes:
      token: Its id.
      logprob: Its log-probability under the raw distribution: temperature 1, nothing filtered.
      stop_reason: None, or on the last step "stop" (this is a stop token) or "length".
    """

    token: int
    logprob: float
    stop_reason: str | None


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed a prompt: tokens with the stop token, if any, and the rest as in `Step`."""

    tokens: list[int]
    logprobs: list[float]
    stop_reason: str


def generate(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_tokens: int | None = None,
    sampling: SamplingParams | None = None,
    stop_tokens: Iterable[int] = STOP_TOKENS,
    context: int | None = None,
) -> Iterator[Step]:
    """Generates from one prompt, token by token.

    Args:
      model: The model.
      prompt: Token ids, at least one.
      max_tokens: Tokens to generate at most; None goes on to the end of the context.
      sampling: How tokens are drawn, `SamplingParams()` if None.
      stop_tokens: Ids that end generation and are yielded as its last step. One outside the
        vocabulary never matches.
      context: Most tokens that prompt and answer have together, the model's maximum if None.

    Returns:
      An iterator over the steps. The device works a little ahead of it.

    Raises:
      ValueError: If the prompt is empty, has ids outside the vocabulary or does not fit the context
        with its `max_tokens`, or if an argument is out of range. The call raises, not the iterator.
    """
    prompts, lasts = _checked_prompts(model.config, {"prompt": prompt}, max_tokens, context)
    stops, sampling = _checked_stops(model.config, stop_tokens), _checked_sampling(sampling)
    budget = lasts[0] + 1 - len(prompts[0])

    def steps():
        count = 0
        for tokens_RC, logprobs_RC in loop.run(model, prompts, lasts, 1, sampling, stops):
            for token, logprob in zip(tokens_RC[0].tolist(), logprobs_RC[0].tolist(), strict=True):
                if token < 0:
                    break
                count += 1
                length = "length" if count == budget else None
                yield Step(token, logprob, "stop" if token in stops else length)

    return steps()


def generate_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    n: int = 1,
    max_tokens: int | None = None,
    sampling: SamplingParams | None = None,
    stop_tokens: Iterable[int] = STOP_TOKENS,
    context: int | None = None,
) -> list[Completion]:
    """Generates from prompts of any lengths together, `n` times from each.

    All rows are in memory at once: split what does not fit. With a seed, sample i of a prompt
    depends on prompt, seed and i alone, so sample 0 is what `generate` gives, and a prompt that is
    listed twice is answered twice alike; without a seed every row draws its own. In bfloat16 a
    batch of another size rounds otherwise, and a near tie may turn.

    Args:
      model: The model.
      prompts: Token ids of each prompt, at least one.
      n: Samples of each prompt, which is read once for all of them.
      max_tokens: See `generate`.
      sampling: See `generate`.
      stop_tokens: See `generate`.
      context: See `generate`.

    Returns:
      The `n` completions of the first prompt, then those of the second, and so on.

    Raises:
      ValueError: See `generate`.
    """
    if not (isinstance(n, numbers.Integral) and n >= 1):
        raise ValueError(f"n must be a whole number of at least 1, got {n!r}.")
    named = {f"prompt {i}": prompt for i, prompt in enumerate(prompts)}
    checked, lasts = _checked_prompts(model.config, named, max_tokens, context)
    stops, sampling = _checked_stops(model.config, stop_tokens), _checked_sampling(sampling)
    blocks = list(loop.run(model, checked, lasts, n, sampling, stops))
    completions = []
    for row in range(n * len(checked)):
        tokens = [token for new, _ in blocks for token in new[row].tolist() if token >= 0]
        logprobs = [x for new, of_new in blocks for x in of_new[row][new[row] >= 0].tolist()]
        reason = "stop" if tokens and tokens[-1] in stops else "length"
        completions.append(Completion(tokens, logprobs, reason))
    return completions


def score(model: Transformer, tokens: Sequence[int], *, chunk: int = 256) -> np.ndarray:
    """Log-probability of every token given those before it.

    Args:
      model: The model.
      tokens: Token ids, at least one.
      chunk: Tokens a call. The logits of one chunk are in memory at once: 206 MB for 256 tokens of
        the released vocabulary.

    Returns:
      float32 [len(tokens) - 1], the log-probability of `tokens[i + 1]` at i.

    Raises:
      ValueError: If there are no tokens, more than the model's context, or any outside the
        vocabulary.
    """
    if not (isinstance(chunk, numbers.Integral) and chunk >= 1):
        raise ValueError(f"chunk must be a whole number of at least 1, got {chunk!r}.")
    ids = _checked_ids(model.config, tokens, "tokens")
    if len(ids) > model.config.max_context:
        raise ValueError(
            f"tokens must fit into a context of {model.config.max_context} tokens, got {len(ids)}."
        )
    return loop.score(model, ids, int(chunk))


def _checked_prompts(config: Config, prompts: dict, max_tokens, context):
    """The prompts, given by name, as int32 arrays, and the last position that each may fill."""
    longest = config.max_context
    context = longest if context is None else context
    if not (isinstance(context, numbers.Integral) and 1 <= context <= longest):
        raise ValueError(f"context must be 1 to {longest} tokens, got {context!r}.")
    whole = isinstance(max_tokens, numbers.Integral) and max_tokens >= 0
    if not (whole or max_tokens is None):
        raise ValueError(f"max_tokens must be None or a number of at least 0, got {max_tokens!r}.")
    checked, lasts = [], []
    for name, prompt in prompts.items():
        ids = _checked_ids(config, prompt, name)
        end = context if max_tokens is None else len(ids) + int(max_tokens)
        if end > context or (max_tokens is None and len(ids) == context):
            raise ValueError(
                f"{name} and its answer must fit into a context of {context} tokens, got "
                f"{len(ids)} and {max_tokens=}: shorten the prompt, lower max_tokens, or raise "
                f"context (up to {longest})."
            )
        checked.append(ids)
        lasts.append(end - 1)
    return checked, lasts


def _checked_ids(config: Config, ids, name: str) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.size == 0:
        raise ValueError(f"{name} must have at least one token id, got none.")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(
            f"{name} must be a sequence of token ids, got {ids.dtype} of shape {ids.shape}."
        )
    strange = (ids < 0) | (ids >= config.vocab_size)
    if strange.any():
        at = int(strange.argmax())
        raise ValueError(
            f"{name} must have token ids from 0 to {config.vocab_size - 1}, got {ids[at]} at "
            f"index {at}."
        )
    return ids.astype(np.int32)


def _checked_stops(config: Config, stop_tokens) -> frozenset[int]:
    stops = tuple(stop_tokens) if isinstance(stop_tokens, Iterable) else (None,)
    if not all(isinstance(stop, numbers.Integral) for stop in stops):
        raise ValueError(f"stop_tokens must be a collection of token ids, got {stop_tokens!r}.")
    return frozenset(int(stop) for stop in stops if 0 <= stop < config.vocab_size)


def _checked_sampling(sampling: SamplingParams | None) -> SamplingParams:
    if sampling is not None and not isinstance(sampling, SamplingParams):
        raise ValueError(f"sampling must be None or a SamplingParams, got {sampling!r}.")
    return sampling or SamplingParams()
