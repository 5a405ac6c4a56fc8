"""The one way this package contracts: accumulate in float32, and mean float32 when given it."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def einsum(spec: str, *operands: jax.Array, dtype=jnp.float32) -> jax.Array:
    """`jnp.einsum`, accumulated in float32.

    Without an explicit precision JAX multiplies float32 in TF32 on NVIDIA GPUs and in bf16 on TPU;
    float32 operands here always get the highest precision. bf16 products are exact in float32.

    Args:
      spec: An einsum string, such as "BTD,ED->BTE".
      *operands: Floating arrays; one in float32 makes it a float32 contraction.
      dtype: Of the result, and of what devices add up where they share a contraction.
    """
    exact = any(operand.dtype == jnp.float32 for operand in operands)
    return jnp.einsum(
        spec,
        *operands,
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=dtype,
    )
