"""MXFP4 as float8_e5m2 with the scales inside, 8 bits a value: the matrix unit of a TPU takes it.

A code has one bit of mantissa, so code and scale together are a float8_e5m2 wherever the exponent
is in range. Subnormals are left out, as only a TPU could show that its matrix unit keeps them:
normal numbers hold the codes of 27 scales in a row. An expert is folded relative to its highest
scale and has one factor, a power of two, for the float32 sums. Where scales span more, folding
would not be exact; nothing is rounded here.

Folded arrays are uint8 [E, C, K, N'], the bytes of the numbers, inputs before outputs and outputs
padded as those of `tpu_words` are. With the scale bytes beside them they are a bijection of the
checkpoint's bytes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gpt_oss_jax.quant import mxfp4
from gpt_oss_jax.quant.tpu_words import outputs_padded, scales_from_words, scales_to_words

SPAN = 26  # Highest scale byte less lowest, of what can be folded.
_NAN = 255


def folds(blocks: jax.Array, scales: jax.Array) -> jax.Array:
    """Whether every expert can be folded exactly; the scales of blocks of zeros do not count.

    Args:
      blocks: uint8 [E, ..., G, 16].
      scales: uint8 [E, ..., G].

    Returns:
      bool [].
    """
    own = tuple(range(1, scales.ndim))
    some = _has_values(blocks)
    lowest = jnp.where(some, scales, _NAN).min(axis=own).astype(jnp.int32)
    highest = jnp.where(some, scales, 0).max(axis=own).astype(jnp.int32)
    return (highest - lowest <= SPAN).all() & (scales < _NAN).all()


def fold(blocks: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Checkpoint order -> folded.

    Args:
      blocks: uint8 [E, N, G, 16] or, with C = 2, [E, N, 2, G, 16], of which `folds` is true.
      scales: uint8 [E, N, G] or [E, N, 2, G].

    Returns:
      uint8 [E, C, 32 G, N'], the scale words of `tpu_words.to_words`, and float32 [E], what the
      values of each expert are to be multiplied by, powers of two.
    """
    blocks, scales = outputs_padded(blocks, scales)
    folded, factors = jax.lax.map(lambda one: _fold_expert(*one), (blocks, scales))
    return folded, scales_to_words(scales), factors


def _fold_expert(blocks_NCGb, scales_NCG):
    N, C, _ = scales_NCG.shape
    highest = jnp.where(_has_values(blocks_NCGb), scales_NCG, 0).max().astype(jnp.int32)
    top = jnp.maximum(highest, SPAN)  # Else the factor would be no normal number.
    codes = mxfp4.unpack(blocks_NCGb)
    magnitudes = codes & 7
    # Each magnitude from 2 on is half an exponent above the one before it.
    above = jnp.where(magnitudes > 1, magnitudes << 1, 0)
    fields = jnp.where(magnitudes > 0, _field_of_half(scales_NCG, top) + above, 0)
    found_NCK = (fields | ((codes & 8) << 4)).reshape(N, C, -1)
    return found_NCK.transpose(1, 2, 0), jnp.ldexp(jnp.float32(1), top - 140)


def unfold(
    folded: jax.Array, scales: jax.Array, factors: jax.Array, N: int
) -> tuple[jax.Array, jax.Array]:
    """The inverse of `fold`; with C = 1 the blocks are [E, N, G, 16]."""
    found = scales_from_words(scales, N, folded.shape[2] // mxfp4.BLOCK)
    parts = found[:, :, None] if found.ndim == 3 else found
    blocks = jax.lax.map(lambda one: _unfold_expert(*one), (folded, parts, factors))
    return blocks.reshape(*found.shape, -1), found


def _unfold_expert(folded_CKN, scales_NCG, factor):
    N, C, G = scales_NCG.shape
    found = folded_CKN[..., :N].transpose(2, 0, 1).reshape(N, C, G, mxfp4.BLOCK)
    top = (jax.lax.bitcast_convert_type(factor, jnp.int32) >> 23) + 13
    fields = found & 127
    above = fields - _field_of_half(scales_NCG, top)
    magnitudes = jnp.where(fields > 0, jnp.where(above > 0, above >> 1, 1), 0)
    return mxfp4.pack(magnitudes.astype(jnp.uint8) | ((found & 128) >> 4))


def _has_values(blocks: jax.Array) -> jax.Array:
    return (blocks & jnp.uint8(0x77)).any(axis=-1)


def _field_of_half(scales: jax.Array, top: jax.Array) -> jax.Array:
    """Of code 1, a half: its exponent, 1 to 27, where e5m2 has it; uint8 [..., G, 1].

    Blocks of zeros may have any scale, and need none.
    """
    exponents = jnp.clip(scales.astype(jnp.int32) - top + SPAN + 1, 1, SPAN + 1)
    return (exponents << 2).astype(jnp.uint8)[..., None]
