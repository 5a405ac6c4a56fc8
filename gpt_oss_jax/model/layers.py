"""The plain layers: embedding, normalisation, linear maps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, Sharding

from gpt_oss_jax.kernels import einsum
from gpt_oss_jax.sharding import named_sharding


class Packed(nnx.Variable):
    """Quantised bytes: part of the weights, never trained. `nnx.Param` is a trainable float."""


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float, dtype) -> jax.Array:
    """Random weights with a standard deviation of `scale`."""
    return _normal(rngs.params(), shape, scale, jnp.dtype(dtype))


# Jitted, as layers are alike: the shapes of a model, all that loading asks for, are there sooner.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key, shape, scale, dtype):
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def placed(module: nnx.Module, mesh: Mesh | None, *, in_use: bool) -> nnx.Module:
    """The module with its weights where they rest or, gathered, are used; so are their gradients.

    Those of gathered weights go back to where the weights rest.
    """

    def place(x: nnx.Variable) -> nnx.Variable:
        at_rest = named_sharding(mesh, x.axes, x.shape)
        used = named_sharding(mesh, x.axes, x.shape, in_use=True)
        if used == at_rest:
            return x
        for where in (at_rest, used) if in_use else (at_rest,):
            x = x.replace(jax.lax.with_sharding_constraint(x[...], where))
        return x

    is_variable = lambda x: isinstance(x, nnx.Variable)
    return module if mesh is None else jax.tree.map(place, module, is_leaf=is_variable)


def rows_whole(sharding: Sharding) -> Format:
    """Where a TPU should have a table.

    By itself it takes columns if their length is a multiple of 128 and that of rows is not; then
    every program that looks up several tokens copies the whole table first.
    """
    return Format(Layout(major_to_minor=(0, 1)), sharding)


@functools.cache
def in_rows(sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    """What `Embedding.use_rows` runs, jitted."""

    def rows(table):
        return table

    return jax.jit(rows, out_shardings=rows_whole(sharding))


class Embedding(nnx.Module):
    """A table of one row a token."""

    def __init__(self, num_rows: int, width: int, *, rngs: nnx.Rngs, dtype):
        self.weight = nnx.Param(
            normal(rngs, (num_rows, width), 1.0, dtype), axes=("vocab", "embed")
        )

    def use_rows(self) -> None:
        """Puts the table into the order that a TPU reads rows from, once."""
        table = self.weight[...]
        # Not an assignment to its elements, which could put them back into the old order.
        self.weight = self.weight.replace(in_rows(table.sharding)(table))

    def __call__(self, tokens_BT: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        """Rows of the tokens, [B, T, D]. Ids are clamped: check them where they come in."""
        table_VD = self.weight[...]
        if mesh is None or tokens_BT.size > 1:
            return table_VD[tokens_BT]
        # On GPUs the look-up of a single row becomes a slice, for which XLA gathers all rows first.
        return table_VD[jnp.stack([tokens_BT, tokens_BT])][0]


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (arXiv:1910.07467), in float32, rounded once."""

    def __init__(self, width: int, epsilon: float, *, rngs: nnx.Rngs, dtype):
        self.epsilon = epsilon
        self.scale = nnx.Param(1 + normal(rngs, (width,), 0.1, dtype), axes=("embed",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis; keeps shape and dtype."""
        x32 = x.astype(jnp.float32)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return (x32 * self.scale[...].astype(jnp.float32)).astype(x.dtype)


@jax.custom_jvp
def plus_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds a bias [*B] to y [..., *B], in the dtype of y; gradients are summed in float32."""
    return y + bias.astype(y.dtype)


@plus_bias.defjvp
def _plus_bias(primals, tangents):
    y = plus_bias(*primals)
    # As a sum in float32: what it is transposed to adds up the gradients of all rows.
    return y, sum(x.astype(jnp.float32) for x in tangents).astype(y.dtype)


class Linear(nnx.Module):
    """A matrix between two groups of axes, and a bias.

    Weights are stored [out, in], the order of the checkpoints and the fast one for a single row.
    """

    def __init__(
        self,
        out_shape: tuple[int, ...],
        in_shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        bias: bool = True,
        rngs: nnx.Rngs,
        dtype,
    ):
        """Makes random weights; `axes` name the dimensions of `out_shape`, then `in_shape`."""
        self.out_shape, self.in_shape = out_shape, in_shape
        weight = normal(rngs, out_shape + in_shape, math.prod(in_shape) ** -0.5, dtype)
        self.weight = nnx.Param(weight, axes=axes)
        offset = normal(rngs, out_shape, 0.1, dtype) if bias else None
        self.bias = None if offset is None else nnx.Param(offset, axes=axes[: len(out_shape)])

    @property
    def matrix(self) -> jax.Array:
        """The weight as one matrix, [out, in]."""
        weight = self.weight[...]  # Of which a device may have a part.
        return weight.reshape(math.prod(weight.shape[: len(self.out_shape)]), -1)

    def __call__(self, x: jax.Array, *, dtype=jnp.float32) -> jax.Array:
        """[..., *in_shape] -> [..., *out_shape] in `dtype`.

        Products of several rows come in it, before the bias is added; devices add their parts of
        them, and those of the gradients of x, in it. On a GPU product and bias are one kernel,
        which rounds once; elsewhere only float32, rounded by the caller, is rounded once.
        """
        # As one matrix: a contraction over several axes makes XLA transpose the weight each time.
        rows = x.reshape(*x.shape[: x.ndim - len(self.in_shape)], -1)
        weight_OI = self.matrix
        if rows.size == rows.shape[-1]:
            # One row is a stream of weights; as a dot, XLA's GPU compiler makes it a padded matrix
            # product at a quarter of the bandwidth.
            y = (weight_OI.astype(jnp.float32) * rows.astype(jnp.float32).reshape(-1)).sum(axis=-1)
        else:
            y = einsum("...I,OI->...O", rows, weight_OI, dtype=dtype)
        y = y.reshape(*rows.shape[:-1], *self.out_shape)
        y = y if self.bias is None else plus_bias(y, self.bias[...])
        return y.astype(dtype)
