"""A reference's named arrays, from whatever it is, checked and sorted by stage.

Knows nothing of our model's values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from gpt_oss_jax.config import Config
from gpt_oss_jax.parity.golden import Golden
from gpt_oss_jax.parity.ops import INPUT, Op, sizes, stages
from gpt_oss_jax.parity.predictions import TopLogits
from gpt_oss_jax.parity.values import Values

# Whole arrays by name, [T, ...]; or a function that yields them, a stage after the other.
Arrays = Mapping[str, np.ndarray]
Reference = Arrays | Golden | Callable[[np.ndarray], Iterable[Arrays]]
Known = Mapping[str, Values | TopLogits]

_EXPERTS, _WEIGHTS = "mlp.experts", "mlp.expert_weights"
_MASKED = -1e30  # Some write a large negative number for minus infinity.


def by_stage(reference: Reference, tokens_T: np.ndarray, config: Config) -> Iterator[Known]:
    """What is known of the embedding, of each layer and of the end, under names without a layer.

    Raises:
      ValueError: For names that the forward pass does not have, and arrays that do not fit.
    """
    if isinstance(reference, Golden):
        reference.check(tokens_T, config)
        yield from reference.by_stage()
        return
    table = stages(config)
    if isinstance(reference, Mapping):
        _check_names(reference, config)
        given = iter([reference] * len(table))
    elif callable(reference):
        given = iter(reference(tokens_T))
    else:
        raise ValueError(
            "the reference must be arrays by name, a function that yields them, or a golden file "
            f"that was loaded, got {type(reference).__name__}."
        )
    for prefix, ops in table:
        arrays = next(given, None)
        if arrays is None:
            raise ValueError(f"the reference must yield {len(table)} stages, it ended before.")
        known = {}
        for op in (*ops, *((INPUT,) if prefix else ())):
            array = arrays.get(prefix + op.name)
            if array is not None:
                known[op.name] = _checked(prefix + op.name, array, op, config, len(tokens_T))
        del arrays
        yield _heaviest_first(known)


def checked_tokens(tokens, reference: Reference, config: Config) -> np.ndarray:
    """The ids, int32 [T].

    Raises:
      ValueError: If there are none, or they are not ids of the vocabulary.
    """
    if tokens is None:
        if not isinstance(reference, Golden):
            raise ValueError("tokens must be given unless the reference is a golden file.")
        return reference.tokens_T
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be ids [T], got {tokens.dtype} {tokens.shape}.")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(
            f"tokens must lie in the vocabulary of {config.vocab_size} ids, got ids from "
            f"{tokens.min()} to {tokens.max()}."
        )
    return tokens.astype(np.int32)


def _check_names(arrays: Arrays, config: Config) -> None:
    known = {prefix + op.name for prefix, ops in stages(config) for op in ops}
    known |= {f"layers.{i}.input" for i in range(config.num_hidden_layers)}
    if unknown := sorted(set(arrays) - known):
        layer = ", ".join(op.name for op in stages(config)[1][1])
        raise ValueError(
            "the reference's arrays must have the names of capture=, got "
            f"{', '.join(unknown[:5])}; there are embedding, final_norm, logits; after layers.0. "
            f"to layers.{config.num_hidden_layers - 1}., input, {layer}."
        )
    if not arrays:
        raise ValueError("the reference must have at least one array, got none.")


def _checked(name: str, array, op: Op, config: Config, length: int) -> Values:
    try:
        array = np.asarray(array)
    except (TypeError, RuntimeError, ValueError) as error:  # on a device, with a gradient, ragged
        raise ValueError(f"{name} of the reference must be an array: {error}") from error
    if not (jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.kind in "iu"):
        raise ValueError(f"{name} of the reference must hold real numbers, got {array.dtype}.")
    shape = sizes(op, config, length)
    scores = op.axes.endswith("S")
    lead = shape[:-1] if scores else ()
    wanted = length * int(np.prod(shape))
    time = array.shape[array.ndim - 2 : array.ndim - 1] if scores else _leading(array, length)
    if array.size != wanted or time != (length,):
        text = ", ".join(map(str, (*lead, length, shape[-1]) if scores else (length, *shape)))
        raise ValueError(f"{name} of the reference must have shape ({text}), got {array.shape}.")
    if scores:
        array = np.moveaxis(array.reshape(-1, length, shape[-1]), 1, 0)
        array = np.where(array < _MASKED, -np.inf, array)
    array = array.reshape(length, -1)
    if op.name == _EXPERTS:
        return Values.whole(_expert_ids(name, array, config))
    return Values.whole(array.astype(np.float32))


def _expert_ids(name: str, array: np.ndarray, config: Config) -> np.ndarray:
    experts_TX = np.sort(array, axis=-1)
    whole = array.dtype.kind in "iu" and (experts_TX[:, 1:] != experts_TX[:, :-1]).all()
    if not whole or experts_TX[:, 0].min() < 0 or experts_TX[:, -1].max() >= config.num_experts:
        raise ValueError(
            f"{name} of the reference must hold {config.experts_per_token} different ints below "
            f"{config.num_experts} for each token, got {array.dtype} such as {array[0].tolist()}."
        )
    return array.astype(np.int32)


def _heaviest_first(known: dict[str, Values]) -> dict[str, Values]:
    """Experts and their weights in our order, whatever theirs is."""
    if _WEIGHTS not in known:
        return known
    order = np.argsort(-known[_WEIGHTS].values, axis=-1, kind="stable")
    sort = lambda x: Values.whole(np.take_along_axis(x.values, order, -1))
    return known | {name: sort(known[name]) for name in (_EXPERTS, _WEIGHTS) if name in known}


def _leading(array: np.ndarray, length: int) -> tuple[int, ...]:
    return array.shape[1:2] if array.shape[:1] == (1,) and length != 1 else array.shape[:1]
