"""The order in which Hopper's kernels want MXFP4: the bits of eight codes shuffled in their word.

A code in bf16 has its sign at bit 15 and the rest at bits 8, 7 and 6. Codes k and k + 4 of a word
are halves of a pair, whose bits lie there after a rotation by 3 k to the right; those of pair 3, to
which the others leave no such places, after a product with `LAST_FACTOR`. Bytes stay in their
blocks, so that an array can be cut wherever one in checkpoint order can.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

PAIR = 0x81C081C0  # Bits of a pair, as two bf16.
TURN = 3
LAST_PAIR, LAST_FACTOR = 0x001B001B, 1 << 14 | 1 << 8 | 1 << 3
_CODE = (6, 7, 8, 15)  # Places of the bits of a code, the lowest first.
_LAST_CODE = (3, 4, 0, 1)


def shuffle(blocks: jax.Array) -> jax.Array:
    """Checkpoint order -> shuffled: uint8 [..., 16], the same shape."""
    return _moved(blocks, _PLACES)


def in_order(blocks: jax.Array) -> jax.Array:
    """The inverse of `shuffle`."""
    return _moved(blocks, {place: bit for bit, place in _PLACES.items()})


def _place(code: int, bit: int) -> int:
    half, pair = divmod(code, 4)
    if pair == 3:
        return 16 * half + _LAST_CODE[bit]
    return (16 * half + _CODE[bit] + TURN * pair) % 32


_PLACES = {4 * code + bit: _place(code, bit) for code in range(8) for bit in range(4)}


def _moved(blocks: jax.Array, places: dict[int, int]) -> jax.Array:
    words = jax.lax.bitcast_convert_type(blocks.reshape(*blocks.shape[:-1], -1, 4), jnp.uint32)
    masks: dict[int, int] = {}
    for bit, place in places.items():
        turn = (place - bit) % 32
        masks[turn] = masks.get(turn, 0) | 1 << bit
    moved = jnp.zeros_like(words)
    for turn, mask in masks.items():
        own = words & jnp.uint32(mask)
        moved |= (own << turn) | (own >> (32 - turn)) if turn else own
    return jax.lax.bitcast_convert_type(moved, jnp.uint8).reshape(blocks.shape)
