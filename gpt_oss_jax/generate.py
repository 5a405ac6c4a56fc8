"""Generation: prompts of token ids in, sampled tokens and their log-probabilities out.

It knows models and sampling, and neither text nor tokenizers: ids come in, ids go out.

All of a prompt but its last token goes into the cache in chunks of fixed size. From there a loop on
the device feeds each row its newest token and draws the next one, up to `_STEPS` a call; the host
reads the tokens of one call while the next runs. What is compiled depends on the structure of the
model, on which sampling options are on and on sizes rounded up to powers of two; never on weights,
values of options, seeds, stop tokens or lengths of prompts.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import secrets
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding

from gpt_oss_jax.config import Config
from gpt_oss_jax.model import Cache, Transformer, init_cache
from gpt_oss_jax.sampling import SamplingParams, sample
from gpt_oss_jax.sharding import named_sharding

STOP_TOKENS = (200002, 200012, 199999)  # <|return|>, <|call|>, <|endoftext|>

_STEPS = 16  # Tokens a row and call at most; the first two calls take 1 and 4, to show them soon.
_CHUNKS = (128, 1024)  # Prompt tokens a call, for short and for long prompts.
_MIN_SLOTS = 512
_ROOM = 512  # Cache slots beyond the prompt to begin with; more are added when they are needed.


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """All that the decode loop changes. Donated to every call, which returns the next one.

    Attributes:
      cache: Holds each row's tokens before its newest.
      keys_B: Typed PRNG key of each row; the position of the token to draw is folded into it.
      token_B: int32 newest token of each row, not in the cache yet.
      position_B: int32 position of that token.
      last_B: int32 last position that the row may fill.
      done_B: bool, true where the row has ended or pads the batch: it changes no more.
    """

    cache: Cache
    keys_B: jax.Array
    token_B: jax.Array
    position_B: jax.Array
    last_B: jax.Array
    done_B: jax.Array


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
    prompts, lasts = _checked_prompts(model.config, [prompt], max_tokens, context)
    stops = _checked_stops(model.config, stop_tokens)
    budget = lasts[0] + 1 - len(prompts[0])

    def steps():
        count = 0
        for tokens_RC, logprobs_RC in _run(model, prompts, lasts, 1, sampling, stops):
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
    listed twice is answered twice alike; without a seed every row draws its own.

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
    checked, lasts = _checked_prompts(model.config, prompts, max_tokens, context)
    stops = _checked_stops(model.config, stop_tokens)
    blocks = list(_run(model, checked, lasts, n, sampling, stops))
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
    (ids,), _ = _checked_prompts(model.config, [tokens], 0, None)
    skeleton, leaves = _split(model)
    cache = _empty_cache(leaves, skeleton, 1, _bucket(len(ids), _MIN_SLOTS))
    logprobs = [np.zeros((1, 0), np.float32)]
    for tokens_BT, positions_BT, next_BT in _chunks([ids[:-1]], [ids[1:]], chunk):
        logprobs_BT, cache = _score(leaves, cache, tokens_BT, positions_BT, next_BT, skeleton)
        logprobs.append(logprobs_BT)
    return np.concatenate(logprobs, axis=1)[0, : len(ids) - 1]


def _checked_prompts(config: Config, prompts, max_tokens, context):
    """The prompts as int32 arrays, and the last position that each may fill."""
    longest = config.max_context
    context = longest if context is None else context
    if not (isinstance(context, numbers.Integral) and 1 <= context <= longest):
        raise ValueError(f"context must be 1 to {longest} tokens, got {context!r}.")
    whole = isinstance(max_tokens, numbers.Integral) and max_tokens >= 0
    if not (whole or max_tokens is None):
        raise ValueError(f"max_tokens must be None or a number of at least 0, got {max_tokens!r}.")
    checked, lasts = [], []
    for i, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"prompt {i} must be a sequence of at least one token id, got {ids.dtype} of "
                f"shape {ids.shape}."
            )
        strange = (ids < 0) | (ids >= config.vocab_size)
        if strange.any():
            at = int(strange.argmax())
            raise ValueError(
                f"prompt {i} must have token ids from 0 to {config.vocab_size - 1}, got {ids[at]} "
                f"at index {at}."
            )
        wanted = 1 if max_tokens is None else int(max_tokens)
        if len(ids) + wanted > context:
            raise ValueError(
                f"prompt {i} and its answer must fit into a context of {context} tokens, got "
                f"{len(ids)} and {max_tokens=}: shorten the prompt, lower max_tokens, or raise "
                f"context (up to {longest})."
            )
        checked.append(ids.astype(np.int32))
        lasts.append(int(context if max_tokens is None else len(ids) + wanted) - 1)
    return checked, lasts


def _checked_stops(config: Config, stop_tokens) -> frozenset[int]:
    return frozenset(int(stop) for stop in stop_tokens if 0 <= stop < config.vocab_size)


def _bucket(size: int, least: int = 1) -> int:
    """The power of two that holds `size`."""
    return max(least, 1 << (size - 1).bit_length())


def _chunks(prompts, targets, chunk):
    """Cuts padded prompts into calls: int32 [B, chunk] of tokens, positions (-1 pads), targets."""
    longest = max(map(len, prompts))
    shape = (_bucket(len(prompts)), -(-longest // chunk) * chunk)
    tokens, wanted = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    positions = np.full(shape, -1, np.int32)
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        tokens[row, : len(prompt)] = prompt
        positions[row, : len(prompt)] = np.arange(len(prompt))
        wanted[row, : len(prompt)] = target
    for start in range(0, longest, chunk):
        part = np.s_[:, start : start + chunk]
        yield tokens[part], positions[part], wanted[part]


def _run(model, prompts, lasts, n, sampling, stops) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields new tokens [rows, _STEPS], -1 after a row's last, and their log-probabilities."""
    longest, furthest = max(map(len, prompts), default=0), max(lasts, default=0)
    budget = max((last + 1 - len(p) for p, last in zip(prompts, lasts, strict=True)), default=0)
    if budget == 0:
        return
    sampling = SamplingParams() if sampling is None else sampling
    skeleton, leaves = _split(model)
    slots = _bucket(min(furthest, longest + _ROOM), _MIN_SLOTS)
    state = _prefilled(leaves, skeleton, slots, prompts, lasts, n, sampling.seed)
    padding = _bucket(len(stops), 4) - len(stops)
    stops_K = np.array([*stops, *[-1] * padding], np.int32)

    taken, steps, pending = 0, 1, None
    while taken < budget:
        needed = min(longest - 1 + taken + steps, furthest)
        if needed > slots:
            slots = _bucket(needed)
            state = _grown(state, skeleton, slots)
        state, block = _decode(leaves, state, sampling, stops_K, np.int32(steps), skeleton)
        for x in block:
            x.copy_to_host_async()
        taken, steps = taken + steps, min(4 * steps, _STEPS)
        # A call too many costs nothing: it finds every row done.
        pending, ready = block, pending
        if ready is not None:
            tokens_BC, logprobs_BC, running = jax.device_get(ready)
            yield tokens_BC[: n * len(prompts)], logprobs_BC[: n * len(prompts)]
            if not running:
                return
    tokens_BC, logprobs_BC, _ = jax.device_get(pending)
    yield tokens_BC[: n * len(prompts)], logprobs_BC[: n * len(prompts)]


def _prefilled(leaves, skeleton, slots, prompts, lasts, n, seed) -> DecodeState:
    """Reads all but the last token of every prompt, once, and sets up `n` rows for each."""
    cache = _empty_cache(leaves, skeleton, _bucket(len(prompts)), slots)
    before = [prompt[:-1] for prompt in prompts]
    chunk = _CHUNKS[max(map(len, before)) > 4 * _CHUNKS[0]]
    for tokens_BT, positions_BT, _ in _chunks(before, before, chunk):
        cache = _prefill(leaves, cache, tokens_BT, positions_BT, skeleton)

    rows, size = n * len(prompts), _bucket(n * len(prompts))

    def of_rows(values, fill, dtype=np.int32):
        return np.array([*values, *[fill] * (size - rows)], dtype)

    if n > 1:
        cache = _copied(cache, of_rows(np.arange(rows) // n, 0), skeleton)
    seeds = [secrets.randbits(32) if seed is None else seed for _ in range(rows)]
    return _begin(
        cache,
        of_rows(seeds, 0, np.uint32),
        of_rows(np.arange(rows) % n, 0),
        of_rows((prompts[row // n][-1] for row in range(rows)), 0),
        of_rows((len(prompts[row // n]) - 1 for row in range(rows)), -1),
        of_rows((lasts[row // n] for row in range(rows)), -1),
        skeleton,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Skeleton:
    """A model without its weights.

    Goes into every call as a static argument, so it is compared by identity, and `_skeleton` makes
    one for each structure: to hash the GraphDef of 24 layers takes a millisecond.
    """

    graphdef: nnx.GraphDef
    treedef: jax.tree_util.PyTreeDef
    config: Config
    mesh: Mesh | None

    def model(self, leaves) -> Transformer:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))

    def placed(self, tree):
        """Pins state on the mesh, so that it returns as it came and no call compiles twice."""
        if self.mesh is None:
            return tree

        def place(x):
            axes = ("batch", None, "kv_heads", "head_dim")[: x.ndim]
            return lax.with_sharding_constraint(x, named_sharding(self.mesh, axes, x.shape))

        return jax.tree.map(place, tree)


_skeleton = functools.cache(_Skeleton)


def _split(model: Transformer) -> tuple[_Skeleton, tuple[jax.Array, ...]]:
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree.flatten(state)
    sharding = leaves[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return _skeleton(graphdef, treedef, model.config, mesh), tuple(leaves)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _empty_cache(leaves, skeleton, rows, slots):
    dtype = skeleton.model(leaves).dtype
    return skeleton.placed(init_cache(skeleton.config, rows, slots, dtype))


@functools.partial(jax.jit, static_argnums=4, donate_argnums=1)
def _prefill(leaves, cache, tokens_BT, positions_BT, skeleton):
    # Nobody uses the logits, so none are computed.
    _, cache = skeleton.model(leaves).forward(tokens_BT, positions_BT, cache)
    return skeleton.placed(cache)


@functools.partial(jax.jit, static_argnums=5, donate_argnums=1)
def _score(leaves, cache, tokens_BT, positions_BT, next_BT, skeleton):
    logits_BTV, cache = skeleton.model(leaves).forward(tokens_BT, positions_BT, cache)
    chosen_BT = jnp.take_along_axis(logits_BTV, next_BT[..., None], axis=-1)[..., 0]
    return chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1), skeleton.placed(cache)


@functools.partial(jax.jit, static_argnums=2)
def _copied(cache, rows_B, skeleton):
    return skeleton.placed(jax.tree.map(lambda x: x[rows_B], cache))


@functools.partial(jax.jit, static_argnums=6, donate_argnums=0)
def _begin(cache, seeds_B, samples_B, token_B, position_B, last_B, skeleton):
    def row_key(seed, i):
        # Threefry whatever the user's default is: rbg numbers would depend on the other rows.
        return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), i)

    keys_B, done_B = jax.vmap(row_key)(seeds_B, samples_B), position_B >= last_B
    return skeleton.placed(DecodeState(cache, keys_B, token_B, position_B, last_B, done_B))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _grown(state, skeleton, slots):
    """The state with more slots for the full-attention layers; rings stay as they are."""
    old = state.cache
    rows, ring = old.ring_positions.shape
    new = init_cache(skeleton.config, rows, slots, old.k[0].dtype, ring=ring)
    into = lambda new, old: lax.dynamic_update_slice(new, old, (0,) * old.ndim)
    return skeleton.placed(dataclasses.replace(state, cache=jax.tree.map(into, new, old)))


@functools.partial(jax.jit, static_argnums=5, donate_argnums=1)
def _decode(leaves, state, sampling, stops_K, steps, skeleton):
    """Up to `steps` tokens for every row that is not done, fewer when all are.

    Returns:
      The new state, and a block: tokens int32 [B, _STEPS], -1 where there is none, their
      log-probabilities, and whether any row still runs.
    """
    model = skeleton.model(leaves)
    B = state.token_B.shape[0]

    def unfinished(carry):
        step, state, _, _ = carry
        return (step < steps) & ~jnp.all(state.done_B)

    def advance(carry):
        step, state, tokens_BC, logprobs_BC = carry
        done_B, next_B = state.done_B, state.position_B + 1
        logits_BV, cache = model.forward(
            state.token_B[:, None],
            jnp.where(done_B, -1, state.position_B)[:, None],
            state.cache,
            logits_at=jnp.zeros((B,), jnp.int32),
        )
        keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, next_B)
        token_B, logprob_B = sample(logits_BV, keys_B, sampling)
        tokens_BC = tokens_BC.at[:, step].set(jnp.where(done_B, -1, token_B))
        logprobs_BC = logprobs_BC.at[:, step].set(logprob_B)
        stopped_B = (token_B[:, None] == stops_K).any(axis=-1) | (next_B >= state.last_B)
        state = dataclasses.replace(
            state,
            cache=cache,
            token_B=jnp.where(done_B, state.token_B, token_B),
            position_B=jnp.where(done_B, state.position_B, next_B),
            done_B=done_B | stopped_B,
        )
        return step + 1, state, tokens_BC, logprobs_BC

    tokens_BC = jnp.full((B, _STEPS), -1, jnp.int32)
    carry = jnp.int32(0), state, tokens_BC, jnp.zeros((B, _STEPS), jnp.float32)
    _, state, tokens_BC, logprobs_BC = lax.while_loop(unfinished, advance, carry)
    return skeleton.placed(state), (tokens_BC, logprobs_BC, ~jnp.all(state.done_B))
