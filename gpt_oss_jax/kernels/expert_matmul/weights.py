"""The weights an expert layer works with, as one pytree."""

from __future__ import annotations

import dataclasses

import jax

from gpt_oss_jax.quant import MXArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """Weights of all experts of one layer.

    Attributes:
      up: [E, F, 2, D], gate and linear rows interleaved as in the checkpoints.
      up_bias: [E, F, 2].
      down: [E, D, F].
      down_bias: [E, D].
    """

    up: MXArray | jax.Array
    up_bias: jax.Array
    down: MXArray | jax.Array
    down_bias: jax.Array


def in_checkpoint_order(w: ExpertWeights) -> ExpertWeights:
    """The same weights with MXFP4 as the checkpoints have it; nothing to do where it is so."""
    up, down = (m.in_checkpoint_order() if isinstance(m, MXArray) else m for m in (w.up, w.down))
    return dataclasses.replace(w, up=up, down=down)
