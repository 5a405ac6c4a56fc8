"""What the words of MXFP4 experts are worth, for kernels on TPU: integer operations on registers.

It knows the orders of `quant.tpu_words` and `quant.tpu_folded`, no rows and no grids.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from gpt_oss_jax.quant.tpu_words import CHUNK

# What a value of `decode` lacks: the exponent of a half is coded as 4 and should be as 14.
LACKS = 2.0**10


def numbers(folded, c, at):
    """Folded bytes of some outputs, a reference of [1, C, K, n], as float8_e5m2 [K, lanes]."""
    return pltpu.bitcast(folded[0, c, :, at], jnp.float8_e5m2)


def chunks(words):
    """Number and bounds of each chunk of the input axis, of a reference of [1, C, rows, n]."""
    K = 8 * words.shape[2]
    return [(i, start, min(start + CHUNK, K)) for i, start in enumerate(range(0, K, CHUNK))]


def decode(words, native=False):
    """Words int32 [r, n] -> float8_e5m2 [8 r, n], 2^-10 times the values of their codes.

    Native ones -> float4_e2m1fn [8 r, n], which are the values.
    """
    if native:
        return pltpu.bitcast(words, jnp.float4_e2m1fn)
    magnitudes = words & _int(0x77777777)
    # Adding 7 carries into the fourth bit unless the magnitude is 0: the highest bit of the
    # exponent. The bit of the mantissa is stored inverted, except in the codes of 0 and 0.5.
    some = (magnitudes + _int(0x77777777)) & _int(0x88888888)
    fields = (magnitudes ^ jax.lax.shift_right_logical(some, _int(3))) | some
    signs = _int(0x80808080)
    low = ((fields << 1) & _int(0x1E1E1E1E)) | ((words << 4) & signs)
    high = (jax.lax.shift_right_logical(fields, _int(3)) & _int(0x1E1E1E1E)) | (words & signs)
    halves = [pltpu.bitcast(half, jnp.float8_e5m2) for half in (low, high)]
    return jnp.concatenate(halves, axis=0)


def decode_scales(scales, c, chunk, at):
    """Scales of one chunk, float32 [8, lanes]; byte 0, less than TPUs can tell from 0, is 0."""
    word = scales[0, c, chunk // 4 * 8 : chunk // 4 * 8 + 8, at]
    byte = chunk % 4
    word = word << (23 - 8 * byte) if byte < 3 else jax.lax.shift_right_logical(word, _int(1))
    return jax.lax.bitcast_convert_type(word & _int(0x7F800000), jnp.float32)


def _int(bits: int) -> jax.Array:
    return jnp.int32(bits - (1 << 32) if bits >> 31 else bits)
