"""The plain layers: embedding, normalisation, linear maps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from gpt_oss_jax.kernels import einsum


class Packed(nnx.Variable):
    """Quantised bytes: part of the weights, never trained. `nnx.Param` is a trainable float."""


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float, dtype) -> jax.Array:
    """Random weights with a standard deviation of `scale`."""
    return (scale * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)


class Embedding(nnx.Module):
    """A table of one row a token."""

    def __init__(self, num_rows: int, width: int, *, rngs: nnx.Rngs, dtype):
        self.weight = nnx.Param(
            normal(rngs, (num_rows, width), 1.0, dtype), axes=("vocab", "embed")
        )

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Rows of the tokens, [B, T, D]. Ids are clamped: check them where they come in."""
        return self.weight[...][tokens_BT]


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


class Linear(nnx.Module):
    """`einsum` with a weight, and a bias; the result is float32, rounded by the caller.

    Weights are stored [out, in], the order of the checkpoints and the fast one for a single row.
    """

    def __init__(
        self,
        spec: str,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        bias_dims: int,
        rngs: nnx.Rngs,
        dtype,
    ):
        """Makes random weights of `shape`; its first `bias_dims` dimensions are the outputs."""
        self.spec = spec
        fan_in = 1
        for size in shape[max(1, bias_dims) :]:
            fan_in *= size
        self.weight = nnx.Param(normal(rngs, shape, fan_in**-0.5, dtype), axes=axes)
        bias = normal(rngs, shape[:bias_dims], 0.1, dtype) if bias_dims else None
        self.bias = None if bias is None else nnx.Param(bias, axes=axes[:bias_dims])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies it, accumulating in float32; returns float32."""
        y = einsum(self.spec, x, self.weight[...])
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)
