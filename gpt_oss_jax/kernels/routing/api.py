"""The choice of experts: the signature, and which implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt_oss_jax.kernels import sharded
from gpt_oss_jax.kernels.routing import mosaic_gpu, xla
from gpt_oss_jax.kernels.target import why_not_hopper


def choose(
    logits: jax.Array,
    choices: int,
    *,
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Picks the experts of each row, then weighs them: a softmax over the chosen logits only.

    Args:
      logits: float32 [..., E], rows along any number of axes, on a mesh one or two.
      choices: Experts of a row (X), up to E.
      implementation: Kernels to use; where these have none of their own, it is XLA. What keeps them
        from running at all, experts and attention say.
      mesh: Devices to split rows over; None: one device.

    Returns:
      int32 experts [..., X], highest logit first and lower id first on a tie, and float32 weights
      [..., X] that sum to one.

    Raises:
      ValueError: If there are fewer experts than choices.
    """
    if choices > logits.shape[-1]:
        raise ValueError(f"wanted {choices} of at least as many experts, got {logits.shape[-1]}.")
    can = implementation in (None, "mosaic_gpu") and not why_not_hopper()
    if not can or logits.dtype != jnp.float32 or choices > mosaic_gpu.MAX_CHOICES:
        return xla.choose(logits, choices=choices)

    def kernel(logits):
        found = mosaic_gpu.choose(logits.reshape(-1, logits.shape[-1]), choices)
        return tuple(x.reshape(*logits.shape[:-1], choices) for x in found)

    return kernel(logits) if mesh is None else sharded.by_rows(mesh, kernel, logits)
