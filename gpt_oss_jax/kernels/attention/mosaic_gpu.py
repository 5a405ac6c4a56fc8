"""Attention on Hopper, through Pallas' Mosaic GPU back end.

Which kernel, and whether one can; `few_queries` and `many_queries` know how. Gradients come from
the XLA version.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss_jax.kernels.attention import xla
from gpt_oss_jax.kernels.attention.few_queries import (
    MAX_QUERIES,
    few_queries,
    few_queries_stored,
)
from gpt_oss_jax.kernels.attention.many_queries import many_queries
from gpt_oss_jax.kernels.target import why_not_hopper


def attention(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_KG: jax.Array,
    *,
    q_pos_BT: jax.Array,
    k_pos_BS: jax.Array,
    window: int | None,
) -> jax.Array:
    """See `api.attention`.

    Raises:
      NotImplementedError: On other devices and versions of JAX, and for what it does not cover.
    """
    _only_on_hopper()
    floats, where = (q_BTKGH, k_BSKH, v_BSKH, sinks_KG), (q_pos_BT, k_pos_BS)
    return differentiable("attention", floats, where, window)


def store_and_attend(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    k_BSL: jax.Array,
    v_BSL: jax.Array,
    sinks_KG: jax.Array,
    *,
    slots_BT: jax.Array,
    q_pos_BT: jax.Array,
    k_pos_BS: jax.Array,
    window: int | None,
    room: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `api.store_and_attend`.

    Raises:
      NotImplementedError: On other devices and versions of JAX, and for what it does not cover.
    """
    _only_on_hopper()
    # What the cache has, as where XLA writes them.
    new = k_BTKH.astype(k_BSL.dtype), v_BTKH.astype(v_BSL.dtype)
    floats = q_BTKGH, *new, k_BSL, v_BSL, sinks_KG
    where = slots_BT, q_pos_BT, k_pos_BS
    return differentiable("store_and_attend", floats, where, window, room)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def differentiable(
    operation: str,
    floats: tuple,
    where: tuple,
    window: int | None,
    room: jax.Array | None = None,
):
    """An operation on any machine for Hopper, with the gradients of its namesake in `xla`.

    `room` is for `store_and_attend`.

    Raises:
      NotImplementedError: For sizes and types that it does not cover.
    """
    types = {x.dtype for x in floats[:-1]}  # Sinks may be float32.
    if types != {jnp.dtype(jnp.bfloat16)}:
        names = ", ".join(sorted(map(str, types)))
        raise NotImplementedError(f"queries, keys and values are {names}, not bfloat16")
    _, T, _, G, _ = floats[0].shape
    attention = few_queries if T * G <= MAX_QUERIES else many_queries
    kernel = {"attention": attention, "store_and_attend": few_queries_stored}[operation]
    more = {} if room is None else {"room": room}
    return kernel(*floats, **_named(where), window=window, **more)


def _forward(operation, floats, where, window, room):
    return differentiable(operation, floats, where, window, room), (floats, where, room)


def _backward(operation, window, kept, gradient):
    floats, where, room = kept
    plain = functools.partial(getattr(xla, operation), **_named(where), window=window)
    of_integers = lambda x: np.zeros(x.shape, jax.dtypes.float0)
    return jax.vjp(plain, *floats)[1](gradient), *jax.tree.map(of_integers, (where, room))


differentiable.defvjp(_forward, _backward)


def _named(where: tuple) -> dict[str, jax.Array]:
    return dict(zip(("slots_BT", "q_pos_BT", "k_pos_BS")[-len(where) :], where, strict=True))


def _only_on_hopper():
    if reason := why_not_hopper():
        raise NotImplementedError(reason)
