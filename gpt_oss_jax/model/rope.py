"""Rotary position embedding with YaRN scaling (arXiv:2104.09864, arXiv:2309.00071)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss_jax.config import Config


def concentration(config: Config) -> float:
    """Factor on cos and sin that keeps attention sharp over a scaled context."""
    return 0.1 * math.log(config.rope_scaling_factor) + 1 if config.rope_scaling_factor > 1 else 1.0


def inverse_frequencies(config: Config) -> np.ndarray:
    """Radians a position, float32 [H/2], blended by the YaRN ramp.

    float32 throughout, like the PyTorch references: the rounding is part of the model, since at
    position 131,071 one unit in the last place is 0.008 radians.
    """
    half = config.head_dim // 2
    exponents = np.arange(half, dtype=np.float32) * 2 / np.float32(config.head_dim)
    frequencies = np.power(config.rope_theta, exponents.astype(np.float64)).astype(np.float32)
    if config.rope_scaling_factor <= 1:
        return np.float32(1) / frequencies

    def bound(rotations: float) -> float:
        turns = config.initial_context_length / (rotations * 2 * math.pi)
        return half * math.log(turns) / math.log(config.rope_theta)

    low, high = bound(config.rope_ntk_beta), bound(config.rope_ntk_alpha)
    if config.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0.0), min(high, config.head_dim - 1.0)
    ramp = (np.arange(half, dtype=np.float32) - np.float32(low)) / np.float32(
        max(high - low, 0.001)
    )
    keep = 1 - np.clip(ramp, 0, 1)
    interpolated = np.float32(1) / (np.float32(config.rope_scaling_factor) * frequencies)
    return interpolated * (1 - keep) + (np.float32(1) / frequencies) * keep


def cos_sin(positions_BT: jax.Array, config: Config, dtype) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every rotation, [B, T, H/2] each, in `dtype`.

    Angles are float32: bf16 rounds 257 to 256. The rounding to the activation dtype is what both
    PyTorch references do.
    """
    angles = positions_BT.astype(jnp.float32)[..., None] * inverse_frequencies(config)
    factor = concentration(config)
    return (jnp.cos(angles) * factor).astype(dtype), (jnp.sin(angles) * factor).astype(dtype)


def apply_rope(x: jax.Array, cos_BTh: jax.Array, sin_BTh: jax.Array) -> jax.Array:
    """Rotates [B, T, ..., H]; pair i is the halves' elements i (not neighbours)."""
    between = tuple(range(2, x.ndim - 1))
    cos = jnp.expand_dims(cos_BTh.astype(jnp.float32), between)
    sin = jnp.expand_dims(sin_BTh.astype(jnp.float32), between)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
