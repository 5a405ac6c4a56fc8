"""A loop over blocks whose results lie one after the other."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def map_blocks(function: Callable, blocks, after: jax.Array) -> jax.Array:
    """`lax.map`, whose result takes no memory before `after` is there.

    To XLA the empty results of `lax.map` are constants: it fills those of all layers of a model in
    one kernel, at the start, and keeps them; 5 GB for 24 layers of 4,096 tokens.

    Args:
      function: Of one block, to one array.
      blocks: Arrays, or a tree of them, with the blocks along their first axis.
      after: Something that the blocks are computed from.
    """
    out = jax.eval_shape(function, jax.tree.map(lambda x: x[0], blocks))
    count = len(jax.tree.leaves(blocks)[0])
    first = lax.stop_gradient(after).reshape(-1)[0].astype(out.dtype)

    def step(results, block):
        i, block = block
        return lax.dynamic_update_index_in_dim(results, function(block), i, 0), None

    empty = jnp.broadcast_to(first, (count, *out.shape))
    return lax.scan(step, empty, (jnp.arange(count), blocks))[0]
