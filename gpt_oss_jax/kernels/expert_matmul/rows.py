"""Rows for the tiles of `many_rows`, and what comes of them added up; in one launch each.

XLA gathers value by value: for 4,096 rows of four experts 220 us in the place of 40.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gpt_oss_jax.kernels.expert_matmul.rows_ptx import Gather, Sum
from gpt_oss_jax.kernels.expert_matmul.tiles import Tiles
from gpt_oss_jax.kernels.launch import launch


def gather(x_MD: jax.Array, tiles: Tiles, choices: int) -> jax.Array:
    """Rows of all places of tiles, bf16 [R, D], each 64 values `many_rows.in_order`.

    Args:
      x_MD: bf16 rows, D a multiple of 64.
      tiles: Where pairs of row and expert lie; past `tiles.count` nothing is written.
      choices: Pairs of a row.
    """
    R, D = tiles.pairs.size, x_MD.shape[1]
    run = Gather(R, D, choices, tiles.pairs.shape[1])
    places = tiles.pairs.reshape(-1).astype(jnp.int32), tiles.count.astype(jnp.int32).reshape(1)
    return _launch("gather_rows", run, (R, D), (x_MD, *places))


def add_up(
    y_RD: jax.Array, place_of_pair: jax.Array, experts_MX: jax.Array, num_experts: int | None
) -> jax.Array:
    """The sum over X of the rows of each pair, bf16 [M, D], added in float32.

    Args:
      y_RD: bf16 rows, D a multiple of 8.
      place_of_pair: int32 [M X], which row.
      experts_MX: int32 expert of each pair.
      num_experts: Pairs of experts past these are left out; None: there are none.
    """
    (M, X), D = experts_MX.shape, y_RD.shape[1]
    inputs = y_RD, place_of_pair.astype(jnp.int32), experts_MX.astype(jnp.int32)
    return _launch("add_rows", Sum(M, D, X, num_experts), (M, D), inputs)


def _launch(name: str, run: Gather | Sum, shape: tuple[int, int], inputs: tuple) -> jax.Array:
    out = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return launch(name, run.ptx(), out, inputs, grid=run.grid, warpgroups=1)
