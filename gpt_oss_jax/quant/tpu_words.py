"""The order in which TPU kernels want MXFP4: 32-bit words whose lanes are output rows.

A TPU register is 8 words by 128 lanes and a byte type four times as tall, so that a word holds four
neighbours of the input axis in its bytes: seen as bytes, a register of words is 32 inputs by 128
outputs, one block of each output. The eight low nibbles and the eight high ones of a chunk are its
two halves. Where a TPU knows float4_e2m1fn, the eight codes of a word are neighbours instead, as
they come: native words are the checkpoint's bytes, only turned around. An input axis is cut into
chunks of 256, the last one shorter; the scales of a chunk are a register too, four chunks to a
word. Everything is a bijection of the checkpoint's bytes.

Word arrays are int32 [E, C, rows, N'], C outputs side by side: gate and linear part of an up
projection, else one. N' is N rounded up to 128, which the tiling of a TPU's memory would add
anyway: of an array that does not fill the tiles XLA may choose another order, and copy all weights
in front of every kernel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gpt_oss_jax.quant import mxfp4

CHUNK = 256
_LANES = 128
_GROUPS = CHUNK // mxfp4.BLOCK


def recode(codes: jax.Array) -> jax.Array:
    """Swaps the codes of 1 and 1.5, 2 and 3, 4 and 6 in both nibbles of each byte; its own inverse.

    So coded, the fields of a float8_e5m2 come out of a nibble with a few operations on whole words,
    and no value needs a subnormal.
    """
    return codes ^ (((codes >> 1) | (codes >> 2)) & jnp.uint8(0x11))


def to_words(
    blocks: jax.Array, scales: jax.Array, native: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Checkpoint order -> words.

    Args:
      blocks: uint8 [E, N, G, 16] or, with C = 2, [E, N, 2, G, 16].
      scales: uint8 [E, N, G] or [E, N, 2, G].
      native: For float4_e2m1fn.

    Returns:
      Words [E, C, 4 G', N'] and scale words [E, C, 8 ceil(G'/32), N'], both int32, G' being G
      rounded up to even.
    """
    blocks, scales = outputs_padded(blocks, scales)
    # One expert at a time: the nibbles of all of them would take eight times the bytes.
    to_words = _blocks_to_native if native else _blocks_to_words
    return jax.lax.map(to_words, blocks), scales_to_words(scales)


def outputs_padded(blocks: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Checkpoint order -> [E, N', C, G, 16] and [E, N', C, G], zeros at the end."""
    if scales.ndim == 3:
        blocks, scales = blocks[:, :, None], scales[:, :, None]
    return tuple(
        jnp.pad(x, [(0, -x.shape[1] % _LANES) if i == 1 else (0, 0) for i in range(x.ndim)])
        for x in (blocks, scales)
    )


def _blocks_to_words(blocks_NCGb):
    N, C, G, _ = blocks_NCGb.shape
    codes = mxfp4.unpack(recode(blocks_NCGb)).reshape(N, C, -1).transpose(1, 2, 0)
    codes = jnp.pad(codes, ((0, 0), (0, mxfp4.BLOCK * (G % 2)), (0, 0))).astype(jnp.uint32)
    shifts = (jnp.arange(4) * 8 + jnp.arange(2)[:, None, None] * 4).astype(jnp.uint32)[..., None]
    words = [
        (codes[:, start:stop].reshape(C, 2, -1, 4, N) << shifts).sum(axis=(1, 3), dtype=jnp.uint32)
        for start, stop in _chunks(G + G % 2)
    ]
    return _signed(jnp.concatenate(words, axis=1))


def _blocks_to_native(blocks_NCGb):
    N, C, G, _ = blocks_NCGb.shape
    blocks = jnp.pad(blocks_NCGb, ((0, 0), (0, 0), (0, G % 2), (0, 0)))
    words = jax.lax.bitcast_convert_type(blocks.reshape(N, C, -1, 4), jnp.int32)
    return words.transpose(1, 2, 0)


def scales_to_words(scales_ENCG: jax.Array) -> jax.Array:
    """The scale words of `to_words`, of padded outputs."""
    E, N, C, G = scales_ENCG.shape
    scales = scales_ENCG.transpose(0, 2, 3, 1).astype(jnp.uint32)
    scales = jnp.pad(scales, ((0, 0), (0, 0), (0, -G % (4 * _GROUPS)), (0, 0)))
    bytes_ = scales.reshape(E, C, -1, 4, _GROUPS, N) << _byte_shifts()
    return _signed(bytes_.sum(axis=3, dtype=jnp.uint32).reshape(E, C, -1, N))


def from_words(
    words: jax.Array, scales: jax.Array, N: int, G: int, native: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The inverse of `to_words`; with C = 1 the blocks are [E, N, G, 16]."""
    from_words = _blocks_from_native if native else _blocks_from_words
    blocks = jax.lax.map(lambda one: from_words(one, G), words)[:, :N]
    return (blocks[:, :, 0] if words.shape[1] == 1 else blocks), scales_from_words(scales, N, G)


def _blocks_from_words(words_CRN, G):
    C, rows, N = words_CRN.shape
    words = _unsigned(words_CRN)
    shifts = (jnp.arange(4) * 8 + jnp.arange(2)[:, None, None] * 4).astype(jnp.uint32)[..., None]
    codes = []
    for start, stop in _chunks(rows // 4):
        chunk = words[:, start // 8 : stop // 8].reshape(C, 1, -1, 1, N)
        codes.append(((chunk >> shifts) & 15).reshape(C, -1, N))
    codes = jnp.concatenate(codes, axis=1).astype(jnp.uint8)[:, : mxfp4.BLOCK * G]
    return recode(mxfp4.pack(codes.transpose(2, 0, 1))).reshape(N, C, G, mxfp4.BLOCK // 2)


def _blocks_from_native(words_CRN, G):
    C, _, N = words_CRN.shape
    blocks = jax.lax.bitcast_convert_type(words_CRN.transpose(2, 0, 1), jnp.uint8)
    return blocks.reshape(N, C, -1, mxfp4.BLOCK // 2)[:, :, :G]


def scales_from_words(scales: jax.Array, N: int, G: int) -> jax.Array:
    """The scales that `to_words` was given; with C = 1 they are [E, N, G]."""
    E, C, _, lanes = scales.shape
    bytes_ = (_unsigned(scales).reshape(E, C, -1, 1, _GROUPS, lanes) >> _byte_shifts()) & 255
    found = bytes_.astype(jnp.uint8).reshape(E, C, -1, lanes)
    found = found[:, :, :G, :N].transpose(0, 3, 1, 2)
    return found[:, :, 0] if C == 1 else found


def _byte_shifts() -> jax.Array:
    return (8 * jnp.arange(4)).astype(jnp.uint32)[:, None, None]


def _chunks(groups: int) -> list[tuple[int, int]]:
    """Bounds of each chunk of an input axis."""
    K = mxfp4.BLOCK * groups
    return [(start, min(start + CHUNK, K)) for start in range(0, K, CHUNK)]


def _signed(words: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def _unsigned(words: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(words, jnp.uint32)
