"""Pairs of row and expert sorted by expert and cut into tiles, each of one expert."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Where each pair went. Pairs are numbered as `experts_MX.reshape(-1)`.

    Attributes:
      expert_of_tile: int32 [tiles].
      pairs: int32 [tiles, size], the pair of each place; those without one come last: -1.
      place_of_pair: int32 [pairs], into the places of all tiles.
      count: int32, the tiles that have a pair; they come first.
    """

    expert_of_tile: jax.Array
    pairs: jax.Array
    place_of_pair: jax.Array
    count: jax.Array


# Pairs that are compared with each other, all with all: a few small programs instead of a sort's.
_FEW = 1024


def sort_into_tiles(chosen: jax.Array, num_experts: int, size: int) -> Tiles:
    """Sorts pairs by expert.

    Args:
      chosen: int32 [pairs], the expert of each.
      num_experts: Experts there are.
      size: Pairs to a tile.
    """
    pairs, E = chosen.shape[0], num_experts
    num_tiles = pairs // size + E  # Every expert may leave one tile part empty.
    if pairs <= _FEW:
        return _compared(chosen, E, size, num_tiles)
    order = jnp.argsort(chosen, stable=True)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(pairs, dtype=order.dtype))
    size_E = jnp.bincount(chosen, length=E)
    start_E = jnp.cumsum(size_E) - size_E
    tiles_E = -(-size_E // size)
    last_tile_E = jnp.cumsum(tiles_E)
    first_tile_E = last_tile_E - tiles_E

    tiles = jnp.arange(num_tiles)
    expert_of_tile = jnp.minimum((tiles[:, None] >= last_tile_E).sum(axis=1), E - 1)
    row_of_tile = start_E[expert_of_tile] + (tiles - first_tile_E[expert_of_tile]) * size
    rows = row_of_tile[:, None] + jnp.arange(size)
    there = rows < (start_E + size_E)[expert_of_tile][:, None]
    return Tiles(
        expert_of_tile=expert_of_tile,
        pairs=jnp.where(there, order[jnp.minimum(rows, pairs - 1)], -1),
        place_of_pair=first_tile_E[chosen] * size + rank - start_E[chosen],
        count=last_tile_E[-1],
    )


def _compared(chosen: jax.Array, E: int, size: int, num_tiles: int) -> Tiles:
    pairs, experts = jnp.arange(chosen.shape[0], dtype=jnp.int32), jnp.arange(E)
    rank = ((chosen[:, None] == chosen) & (pairs[:, None] > pairs)).sum(axis=1)
    tiles_E = -(-(chosen[:, None] == experts).sum(axis=0) // size)
    last_tile_E = jnp.where(experts[:, None] >= experts, tiles_E, 0).sum(axis=1)
    first_of_pair = jnp.where(chosen[:, None] > experts, tiles_E, 0).sum(axis=1)
    place = jnp.where(chosen < E, first_of_pair * size + rank, -1)
    there = place == jnp.arange(num_tiles * size)[:, None]
    tiles = jnp.arange(num_tiles)
    return Tiles(
        expert_of_tile=jnp.minimum((tiles[:, None] >= last_tile_E).sum(axis=1), E - 1),
        pairs=jnp.where(there, pairs, -1).max(axis=1).reshape(num_tiles, size),
        place_of_pair=place,
        count=last_tile_E[-1],
    )
