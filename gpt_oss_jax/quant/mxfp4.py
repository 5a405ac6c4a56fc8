"""MXFP4: 32 values share one power of two; each is a 4-bit e2m1 code, two to a byte.

Follows the OCP Microscaling Formats (MX) v1.0 specification with the byte order of the released
checkpoints. Blocks are uint8 [..., G, 16] and scales uint8 [..., G] for 32 G values along the last
axis. Byte b of a block holds value 2b in its low nibble and 2b+1 in its high one; a scale byte s
stands for 2^(s - 127). Pure functions; knows nothing of layers or kernels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 32
FP4_VALUES = np.array(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0],
    np.float32,
)


def unpack(blocks: jax.Array) -> jax.Array:
    """Splits bytes into codes: uint8 [..., n] -> uint8 [..., 2n], low nibble first."""
    # Broadcast, not stacked: XLA fuses this into whatever decodes the codes.
    pairs = (blocks[..., None] >> jnp.array([0, 4], jnp.uint8)) & 15
    return pairs.reshape(*blocks.shape[:-1], 2 * blocks.shape[-1])


def pack(codes: jax.Array) -> jax.Array:
    """Joins codes into bytes: uint8 [..., 2n] -> uint8 [..., n], the inverse of `unpack`."""
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def decode_codes(codes: jax.Array) -> jax.Array:
    """e2m1 codes, in the low nibbles of an integer type -> their values, float32, exactly."""
    codes = codes.astype(jnp.uint32)
    # Twice each magnitude fits a nibble, so one 32-bit constant holds the whole table, and a shift
    # is cheaper than a gather. Put in the last bits of 2^22, where one bit is worth a half, it is a
    # float without the slow conversion from integer.
    twice = (jnp.uint32(0xC8643210) >> ((codes & 7) << 2)) & 15
    magnitude = _float(twice | jnp.uint32(0x4A800000)) - jnp.float32(2**22)
    return _float(_bits(magnitude) | ((codes & 8) << 28))


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _bits(value: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(value, jnp.uint32)


def decode_scales(scales: jax.Array) -> jax.Array:
    """e8m0 bytes -> float32 powers of two.

    Byte 0 is 2^-127, a float32 subnormal; byte 255 (NaN in the specification, absent from the
    checkpoints) is 2^128, infinity.
    """
    bits = jnp.where(scales == 0, jnp.uint32(1 << 22), scales.astype(jnp.uint32) << 23)
    return _float(bits)


def dequantize(blocks: jax.Array, scales: jax.Array, dtype=jnp.bfloat16) -> jax.Array:
    """Decodes blocks to floating point.

    Args:
      blocks: uint8 [..., G, 16].
      scales: uint8 [..., G].
      dtype: bfloat16 or float32; both hold every value exactly.

    Returns:
      `dtype` [..., 32 G]. Values under the smallest normal number (scale bytes 0 and 1) are exact
      where the back end keeps subnormals, and zero where it flushes them.
    """
    values = decode_codes(unpack(blocks)) * decode_scales(scales)[..., None]
    return values.reshape(*scales.shape[:-1], -1).astype(dtype)


def quantize(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encodes to MXFP4, rounding to nearest, ties to the even code.

    A block's scale is the power of two that puts its largest magnitude in [4, 8), as the
    specification proposes, so anything that already is MXFP4 is represented without loss.

    Args:
      values: float [..., 32 G], finite.

    Returns:
      blocks uint8 [..., G, 16] and scales uint8 [..., G].

    Raises:
      ValueError: If the last axis is not a multiple of 32.
    """
    if values.shape[-1] % BLOCK:
        raise ValueError(f"the last axis must be a multiple of {BLOCK}, got {values.shape}.")
    x = values.astype(jnp.float32).reshape(*values.shape[:-1], -1, BLOCK)
    largest = jnp.max(jnp.abs(x), axis=-1)
    exponent = (_bits(largest) >> 23).astype(jnp.int32) - 127
    scale_exponent = jnp.clip(exponent - 2, -127, 127)
    magnitude = jnp.abs(jnp.ldexp(x, -scale_exponent[..., None]))
    # Midpoints between neighbouring magnitudes; at a tie the even code wins, so odd ones are open.
    midpoints = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
    code = sum(
        (magnitude >= m if i % 2 else magnitude > m).astype(jnp.uint8)
        for i, m in enumerate(midpoints)
    )
    code = code | (jnp.signbit(x).astype(jnp.uint8) << 3)
    return pack(code), (scale_exponent + 127).astype(jnp.uint8)
