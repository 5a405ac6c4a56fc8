"""The expert layer on Hopper, MXFP4 with shuffled bits, through Pallas' Mosaic GPU back end.

Which kernel, and whether one can; `few_rows` and `many_rows` know how. Gradients come from the XLA
version.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss_jax.kernels.dispatch import say_once
from gpt_oss_jax.kernels.expert_matmul import xla
from gpt_oss_jax.kernels.expert_matmul.few_rows import few_rows, words_of_room
from gpt_oss_jax.kernels.expert_matmul.many_rows import many_rows, why_not_many
from gpt_oss_jax.kernels.expert_matmul.tuning import expert_tile
from gpt_oss_jax.kernels.expert_matmul.weights import ExpertWeights
from gpt_oss_jax.kernels.target import multiprocessors, why_not_hopper
from gpt_oss_jax.quant import MXArray


def expert_mlp(
    x_MD: jax.Array,
    experts_MX: jax.Array,
    weights_MX: jax.Array,
    w: ExpertWeights,
    *,
    limit: float,
    some_elsewhere: bool = False,
    room: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """See `api.expert_mlp`. With `some_elsewhere`, ids past the experts add nothing.

    Raises:
      NotImplementedError: On other devices and versions of JAX, and for what it does not cover.
    """
    if reason := why_not_hopper():
        raise NotImplementedError(reason)
    arrays = x_MD, experts_MX, weights_MX, w, room, residual
    return _differentiable(*arrays, limit, some_elsewhere)


def room_of(rows: int, choices: int, w: ExpertWeights) -> int:
    """Words of `room` that so many bf16 rows take; 0 where they take none."""
    E, F, _, D = w.up.shape
    many = expert_tile(rows, (E, D, F), choices, multiprocessors())
    none = many or _why_not(jnp.dtype(jnp.bfloat16), w)
    return 0 if none else words_of_room(rows, choices, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _differentiable(
    x_MD, experts_MX, weights_MX, w: ExpertWeights, room, residual, limit, some_elsewhere
):
    more = {"limit": limit, "some_elsewhere": some_elsewhere, "room": room, "residual": residual}
    return on_hopper(x_MD, experts_MX, weights_MX, w, **more)


def _forward(x_MD, experts_MX, weights_MX, w, room, residual, limit, some_elsewhere):
    arrays = x_MD, experts_MX, weights_MX, w, room
    y_MD = _differentiable(*arrays, residual, limit, some_elsewhere)
    return y_MD, (*arrays, None if residual is None else ())


def _backward(limit, some_elsewhere, kept, dy_MD):
    x_MD, experts_MX, weights_MX, w, room, residual = kept
    more = {"limit": limit, "some_elsewhere": some_elsewhere}
    _, pull = jax.vjp(
        lambda x, weights, w: xla.expert_mlp(x, experts_MX, weights, w, **more),
        x_MD,
        weights_MX,
        w,
    )
    dx_MD, dweights_MX, dw = pull(dy_MD)
    of_integers = lambda x: np.zeros(x.shape, jax.dtypes.float0)
    dexperts_MX, droom = jax.tree.map(of_integers, (experts_MX, room))
    return dx_MD, dexperts_MX, dweights_MX, dw, droom, None if residual is None else dy_MD


_differentiable.defvjp(_forward, _backward)


# One function of a program: in line, each layer's kernels would be different ones to the compiler,
# since they know from where they were called, and be compiled again.
@functools.partial(jax.jit, static_argnames=("limit", "some_elsewhere"))
def on_hopper(
    x_MD: jax.Array,
    experts_MX: jax.Array,
    weights_MX: jax.Array,
    w: ExpertWeights,
    *,
    limit: float,
    some_elsewhere: bool = False,
    room: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """The expert layer for bf16 rows; compiles for Hopper on any machine.

    Raises:
      NotImplementedError: For sizes and types that it does not cover.
    """
    if reason := _why_not(x_MD.dtype, w):
        raise NotImplementedError(reason)
    (M, X), (E, F, _, D) = experts_MX.shape, w.up.shape
    tile = expert_tile(M, (E, D, F), X, multiprocessors())
    arrays = x_MD, experts_MX, weights_MX, w
    more = {"limit": limit, "some_elsewhere": some_elsewhere, "residual_MD": residual}
    if tile is not None and (reason := why_not_many(w)):
        say_once(f"many rows go through the experts as few at a time, more slowly ({reason})")
        tile = None
    if tile is None:
        return few_rows(*arrays, **more, room=room)
    return many_rows(*arrays, **more, tile=tile)


def _why_not(dtype, w: ExpertWeights) -> str:
    """What of rows and weights is not covered; "" if they are."""
    if not isinstance(w.up, MXArray) or not isinstance(w.down, MXArray):
        return "experts are not MXFP4"
    if w.up.words_of is not None or w.down.words_of is not None:
        return "experts are in TPU words"
    if dtype != jnp.bfloat16:
        return f"rows are {dtype}, not bfloat16"
    if not (w.up.shuffled and w.down.shuffled):
        return "experts are in checkpoint order, where `load` shuffles them"
    biases = {w.up_bias.dtype, w.down_bias.dtype}
    if biases not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float32)}):
        names = " and ".join(sorted(map(str, biases)))
        return f"biases are {names}, not all bfloat16 or all float32"
    return ""
