"""The key/value cache: every slot for full attention, a ring for the windowed layers.

Positions are the mask: a slot holds the key of the position written beside it, -1 if empty, and
attention sees what the positions allow. In a full cache slot s holds position s. In a ring of R
slots position p lies in slot p % R.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from gpt_oss_jax.config import Config
from gpt_oss_jax.kernels.attention.xla import write as write
from gpt_oss_jax.sharding import named_sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of all layers. Returned by `forward`, never changed in place: donate it.

    Attributes:
      k: Rotated keys of each layer, [B, S, K H] or, in windowed layers, [B, R, K H]. Heads lie side
        by side because a TPU would pad a last axis of 64 to 128, or copy the cache to read it.
      v: Values, likewise.
      full_positions: int32 [B, S], shared by the layers with full attention.
      ring_positions: int32 [B, R], shared by the windowed layers.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    full_positions: jax.Array
    ring_positions: jax.Array

    @property
    def max_len(self) -> int:
        """Positions it can hold (S)."""
        return self.full_positions.shape[1]


MIN_SLOTS = 512  # A cache that grows begins with so many.


def bucket(size: int, least: int = 1) -> int:
    """The power of two that holds `size`: rows and slots come in few sizes, each compiled once."""
    return max(least, 1 << (size - 1).bit_length())


def init_cache(
    config: Config, batch: int, max_len: int, dtype, *, ring: int | None = None
) -> Cache:
    """An empty cache.

    Args:
      config: Sizes.
      batch: Rows (B).
      max_len: Positions of the full-attention layers (S).
      dtype: Of keys and values; the activations'.
      ring: Slots of the windowed layers (R), the window if None.

    Raises:
      ValueError: If the ring is smaller than the window.
    """
    ring = config.sliding_window if ring is None else ring
    if ring < config.sliding_window:
        raise ValueError(
            f"ring must be at least the window, {config.sliding_window} slots, got {ring}."
        )

    def zeros():
        return tuple(
            jnp.zeros(
                (
                    batch,
                    max_len if config.layer_window(i) is None else ring,
                    config.num_key_value_heads * config.head_dim,
                ),
                dtype,
            )
            for i in range(config.num_hidden_layers)
        )

    return Cache(
        k=zeros(),
        v=zeros(),
        full_positions=jnp.full((batch, max_len), -1, jnp.int32),
        ring_positions=jnp.full((batch, ring), -1, jnp.int32),
    )


def cache_sharding(mesh: Mesh | AbstractMesh, x: Any, kv_heads: int) -> NamedSharding:
    """Of keys or values of the cache, positions, or anything else with a row for each row.

    Positions, small and for all, are whole on every device that has their row.
    """
    # Heads lie side by side, and none is cut.
    shape = (*x.shape[:2], kv_heads)[: x.ndim]
    axes = ("batch", "slots" if x.ndim == 3 else None, "kv_heads")
    return named_sharding(mesh, axes[: x.ndim], shape)


def full_slots(positions_BT: jax.Array, size: int) -> jax.Array:
    """Slot of each position in a full cache; padding gets `size`, which writes drop."""
    return jnp.where(positions_BT < 0, size, positions_BT)


def ring_slots(positions_BT: jax.Array, size: int) -> jax.Array:
    """Slot of each position in a ring; padding and all but a row's last `size` are dropped."""
    last_B1 = positions_BT.max(axis=1, keepdims=True)
    kept = (positions_BT >= 0) & (positions_BT > last_B1 - size)
    return jnp.where(kept, positions_BT % size, size)
