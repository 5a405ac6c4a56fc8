"""The choice of experts in plain XLA: what `mosaic_gpu` is held against."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def choose(logits_ME: jax.Array, *, choices: int) -> tuple[jax.Array, jax.Array]:
    """See `api.choose`."""
    logits_MX, experts_MX = jax.lax.top_k(logits_ME, choices)
    return experts_MX.astype(jnp.int32), jax.nn.softmax(logits_MX, axis=-1)
