"""Sampling: from logits to one token a row, and the log-probability of that token.

Pure functions of logits and keys. Knows nothing of the model, its cache, stop tokens or positions.

The options apply in the order of Hugging Face: temperature, top-k, top-p, min-p, each to what the
one before it left. All are exact and none sorts the vocabulary: top-k and top-p find their
threshold bit by bit, in 30 sums over a row. An option that is off is absent from what is compiled.
"""

import dataclasses
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_OFF = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
_BLOCK = 512
_COLDEST = 1e-6


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn.

    A pytree whose leaves are the options that are on: a jitted function compiles anew when one is
    switched on or off, and not when its value changes. The seed is for whoever makes the keys; it
    is not part of the pytree.

    Attributes:
      temperature: Divides the logits; 0 takes the most probable token, of equal ones the lowest id,
        whatever the other options say.
      top_k: Keep the k most probable tokens, of equal ones the lower ids; 0 is off.
      top_p: Keep the smallest set of most probable tokens whose mass reaches this, of equal ones
        the lower ids; 1 is off.
      min_p: Keep the tokens that are at least this many times as probable as the most probable one;
        0 is off.
      seed: Where the random keys start, 0 to 2**32 - 1; None: a different place every time.

    Raises:
      ValueError: If a value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self):
        warm = _is_real(self.temperature) and _COLDEST <= self.temperature < math.inf
        if not (warm or self.temperature == 0):
            raise ValueError(
                f"temperature must be 0 (greedy) or at least {_COLDEST}, got {self.temperature!r}."
            )
        if not (isinstance(self.top_k, numbers.Integral) and 0 <= self.top_k < 2**31):
            raise ValueError(f"top_k must be a whole number, 0 (off) or more, got {self.top_k!r}.")
        if not (_is_real(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must be over 0 and at most 1 (off), got {self.top_p!r}.")
        if not (_is_real(self.min_p) and 0 <= self.min_p <= 1):
            raise ValueError(f"min_p must be from 0 (off) to 1, got {self.min_p!r}.")
        whole = isinstance(self.seed, numbers.Integral) and 0 <= self.seed < 2**32
        if not (whole or self.seed is None):
            raise ValueError(f"seed must be None or from 0 to {2**32 - 1}, got {self.seed!r}.")

    def tree_flatten(self):
        """The options that are on, and their names."""
        options = {name: getattr(self, name) for name in _OFF}
        # Whatever is no number is a traced value, and only options that are on are traced.
        on = tuple(n for n, x in options.items() if not _is_real(x) or x != _OFF[n])
        on = on if "temperature" in on else ()
        # All floats: a temperature of 1 and one of 1.0 are one compiled program.
        values = [float(options[n]) if _is_real(options[n]) else options[n] for n in on]
        return values, on

    @classmethod
    def tree_unflatten(cls, on: tuple[str, ...], values: list[Any]) -> "SamplingParams":
        """The inverse of `tree_flatten`; unchecked, since the values may be traced."""
        params = object.__new__(cls)
        for name, value in (_OFF | {"seed": None} | dict(zip(on, values, strict=True))).items():
            object.__setattr__(params, name, value)
        return params


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, params: SamplingParams
) -> tuple[jax.Array, jax.Array]:
    """Draws one token a row.

    Args:
      logits_BV: float32.
      keys_B: A typed PRNG key for each row, fresh at each position; not used at temperature 0.
      params: The options; under jit an argument, not a closure.

    Returns:
      int32 tokens [B], and their float32 log-probabilities [B] under the raw distribution: of the
      logits as they came, at temperature 1 and unfiltered. No row depends on another.
    """
    (_, on), logits_BV = params.tree_flatten(), logits_BV.astype(jnp.float32)
    if on:
        tokens_B = jax.vmap(_draw)(keys_B, _weights(logits_BV, params, on))
    else:
        tokens_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    return tokens_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def _weights(logits_BV, params, on):
    """Weight of each token in the draw, float32 [B, V]: 1 if most probable, 0 if filtered out."""
    temperature, top_k, top_p, min_p = (
        jnp.asarray(getattr(params, name), jnp.float32) for name in _OFF
    )
    # The maximum goes first: a division by a small temperature cannot overflow then.
    cooled_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature
    weights_BV = jnp.exp(cooled_BV)
    if "top_k" in on:
        weights_BV = _keep_top(weights_BV, jnp.ones_like(weights_BV), top_k)
    if "top_p" in on:
        total_B1 = jnp.sum(weights_BV, axis=-1, keepdims=True)
        weights_BV = _keep_top(weights_BV, weights_BV, top_p * total_B1)
    if "min_p" in on:
        weights_BV = jnp.where(weights_BV >= min_p, weights_BV, 0.0)
    return weights_BV


def _keep_top(weights_BV, sizes_BV, target):
    """Zeroes all but the fewest heaviest tokens whose sizes sum to `target`; equal ones go by id.

    Weights are not negative, so their bits are ordered as they are, and the highest threshold that
    still reaches the target is found bit by bit. A float sum of non-negative numbers never shrinks
    when one of them grows, so rounding cannot mislead the search. Equal weights have equal sizes.
    """
    order_BV = lax.bitcast_convert_type(weights_BV, jnp.int32)

    def size_above(threshold_B1):
        kept_BV = jnp.where(order_BV >= threshold_B1, sizes_BV, 0.0)
        return jnp.sum(kept_BV, axis=-1, keepdims=True)

    def set_bit(i, threshold_B1):
        raised_B1 = threshold_B1 | lax.shift_left(jnp.int32(1), jnp.int32(29) - i)
        return jnp.where(size_above(raised_B1) >= target, raised_B1, threshold_B1)

    nothing_B1 = jnp.zeros((weights_BV.shape[0], 1), jnp.int32)
    threshold_B1 = lax.fori_loop(jnp.int32(0), jnp.int32(30), set_bit, nothing_B1)

    tied_BV = order_BV == threshold_B1
    rank_BV = jnp.cumsum(tied_BV, axis=-1, dtype=jnp.int32) - 1
    before_BV = size_above(threshold_B1 + 1) + rank_BV.astype(jnp.float32) * sizes_BV
    kept_BV = (order_BV > threshold_B1) | (tied_BV & (before_BV < target))
    return jnp.where(kept_BV, weights_BV, 0.0)


def _draw(key, weights_V):
    """Draws an index with probability proportional to its weight.

    First a block, by its mass, then a token in it. That takes a thousand random numbers; one for
    each token would take a CPU longer than all else here. `mode="high"`, because Gumbel numbers of
    23 bits never choose what is a hundred million times less probable than the rest.
    """
    in_block, in_row = jax.random.split(key)
    blocks = jnp.pad(weights_V, (0, -len(weights_V) % _BLOCK)).reshape(-1, _BLOCK)
    block = jax.random.categorical(in_block, jnp.log(jnp.sum(blocks, axis=-1)), mode="high")
    index = jax.random.categorical(in_row, jnp.log(blocks[block]), mode="high")
    return block.astype(jnp.int32) * _BLOCK + index.astype(jnp.int32)


def _is_real(value):
    return isinstance(value, numbers.Real)
