"""Tiles for Hopper's kernels, their rows, and what comes of these added up; in one launch each.

XLA gathers value by value: for 4,096 rows of four experts 220 us in the place of 40.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gpt_oss_jax.kernels.expert_matmul.rows_ptx import MAX_SORTED, Add, Count, Gather, Sort, Sum
from gpt_oss_jax.kernels.expert_matmul.sort_ptx import MAX_TILES
from gpt_oss_jax.kernels.expert_matmul.tiles import Tiles
from gpt_oss_jax.kernels.launch import launch


def can_sort(num_experts: int) -> bool:
    """Whether `sort` takes so many."""
    return num_experts <= MAX_SORTED


def most_tiles(pairs: int, num_experts: int, size: int) -> int:
    """Tiles that pairs can take: an expert may leave one part empty, none all of it."""
    return min(pairs, pairs // size + num_experts)


def sort(chosen: jax.Array, num_experts: int, size: int, *, halves_last: bool = False) -> Tiles:
    """`tiles.sort_into_tiles`, of no more tiles than pairs; pairs of no expert have place -1.

    Tiles past `count` have no expert, and anything for pairs. With `halves_last`, tiles that are at
    most half full come after all others.
    """
    (pairs,) = chosen.shape
    tiles = most_tiles(pairs, num_experts, size)
    run = Sort(pairs, num_experts, size, halves_last and tiles < MAX_TILES)
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.int32)
    inputs = (chosen.astype(jnp.int32),)
    if run.grid > 1:
        inputs += (_launch("count_pairs", Count(run), shape(run.grid, num_experts), inputs),)
    outs = shape(tiles), shape(tiles, size), shape(pairs), shape(1)
    of_tile, pairs_of, places, count = _launch("sort_pairs", run, outs, inputs)
    return Tiles(of_tile, pairs_of, places, count[0])


def gather(x_MD: jax.Array, weights_MX: jax.Array, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """Rows and routing weights of all places of tiles; of those of no pair neither is written.

    Args:
      x_MD: bf16 rows, D a multiple of 64.
      weights_MX: Routing weights.
      tiles: Where pairs of row and expert lie.

    Returns:
      Rows, bf16 [R, D], each 64 values `many_rows.in_order`, and weights, float32 [R].
    """
    R, D = tiles.pairs.size, x_MD.shape[1]
    run = Gather(R, D, weights_MX.shape[1], tiles.pairs.shape[1])
    outs = _rows(R, D), jax.ShapeDtypeStruct((R,), jnp.float32)
    places = tiles.pairs.reshape(-1).astype(jnp.int32), tiles.count.astype(jnp.int32).reshape(1)
    inputs = x_MD, weights_MX.astype(jnp.float32), *places
    return _launch("gather_rows", run, outs, inputs)


def add_up(
    y_RD: jax.Array,
    place_of_pair: jax.Array,
    experts_MX: jax.Array,
    num_experts: int | None,
    residual_MD: jax.Array | None = None,
) -> jax.Array:
    """The sum over X of the rows of each pair, bf16 [M, D], added in float32.

    Args:
      y_RD: bf16 rows, D a multiple of 8.
      place_of_pair: int32 [M X], which row.
      experts_MX: int32 expert of each pair.
      num_experts: Pairs of experts past these are left out; None: there are none.
      residual_MD: bf16 rows that the sum is added to before it is rounded.
    """
    (M, X), D = experts_MX.shape, y_RD.shape[1]
    run = Sum(M, D, X, num_experts, adds=residual_MD is not None)
    inputs = y_RD, place_of_pair.astype(jnp.int32), experts_MX.astype(jnp.int32)
    inputs += () if residual_MD is None else (residual_MD,)
    return _launch("add_rows", run, _rows(M, D), inputs)


def add_parts(residual_MD: jax.Array, y_MXD: jax.Array) -> jax.Array:
    """The residual stream, bf16, plus the sum over X of float32 parts, rounded once.

    D is a multiple of 4.
    """
    M, X, D = y_MXD.shape
    return _launch("add_parts", Add(M, D, X), _rows(M, D), (residual_MD, y_MXD))


def _rows(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def _launch(name: str, run: Add | Count | Gather | Sort | Sum, outs, inputs: tuple):
    size = {"warpgroups": run.warps // 4, "shared_bytes": run.shared_bytes}
    return launch(name, run.ptx(), outs, inputs, grid=run.grid, **size)
