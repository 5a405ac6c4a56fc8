"""MXFP4 against a slow twin in numpy: every byte, every scale, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_oss_jax.quant import MXArray, mxfp4

dequantize = jax.jit(mxfp4.dequantize, static_argnums=2)
quantize = jax.jit(mxfp4.quantize)

SMALLEST_NORMAL_SCALE = 3  # Half of 2^(2 - 127) is a float32 subnormal, which CPUs flush.


def slow_dequantize(blocks, scales):
    """One value at a time, as the specification says it, in float64."""
    values = np.empty((*scales.shape, 32))
    for index in np.ndindex(scales.shape):
        for b, byte in enumerate(blocks[index]):
            for half, code in enumerate((byte & 15, byte >> 4)):
                values[index][2 * b + half] = mxfp4.FP4_VALUES[code] * 2.0 ** (
                    int(scales[index]) - 127
                )
    return values.reshape(*scales.shape[:-1], -1)


def test_every_byte():
    blocks = np.arange(256, dtype=np.uint8).reshape(16, 16)
    scales = np.full(16, 127, np.uint8)
    got = np.asarray(dequantize(blocks, scales, jnp.float32))
    want = slow_dequantize(blocks, scales).astype(np.float32)
    # Bits, so that -0 is not taken for 0.
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_scale(dtype):
    scales = np.arange(SMALLEST_NORMAL_SCALE, 255, dtype=np.uint8)[:, None]
    codes = np.tile(np.array([0x10, 0x32, 0x54, 0x98, 0xBA, 0xDC], np.uint8), 3)[:16]
    blocks = np.broadcast_to(codes, (len(scales), 1, 16))
    got = np.asarray(dequantize(jnp.asarray(blocks), jnp.asarray(scales), dtype))
    with np.errstate(over="ignore"):
        want = slow_dequantize(blocks, scales).astype(np.float32)
    np.testing.assert_array_equal(got.astype(np.float32), want)


def test_scale_bytes_are_exact_powers_of_two():
    scales = np.arange(255, dtype=np.uint8)
    want = np.ldexp(1.0, np.arange(255) - 127).astype(np.float32)
    got = np.asarray(mxfp4.decode_scales(jnp.asarray(scales)))
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def test_pack_inverts_unpack():
    blocks = jnp.arange(256, dtype=jnp.uint8).reshape(16, 16)
    np.testing.assert_array_equal(mxfp4.pack(mxfp4.unpack(blocks)), blocks)


def test_nothing_is_lost_when_values_already_are_mxfp4():
    key = jax.random.key(0)
    blocks = jax.random.bits(key, (5, 7, 16), jnp.uint8)
    scales = jax.random.randint(key, (5, 7), 100, 150).astype(jnp.uint8)
    values = dequantize(blocks, scales, jnp.float32)
    again = dequantize(*quantize(values), jnp.float32)
    np.testing.assert_array_equal(again, values)


def test_zeros_quantize():
    blocks, scales = quantize(jnp.zeros((2, 32)))
    assert not dequantize(blocks, scales, jnp.float32).any()


def test_rounds_to_nearest_with_ties_to_even():
    # The largest value fixes the scale at 1.
    x = (
        jnp.zeros(32)
        .at[:10]
        .set(jnp.array([6.0, 0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.01]))
    )
    want = [6, 0, 0.5, 1, 1, 2, 2, 4, 4, -6]
    np.testing.assert_array_equal(dequantize(*quantize(x), jnp.float32)[:10], want)


def test_error_is_within_half_a_step():
    x = jax.random.normal(jax.random.key(0), (64, 96))
    back = dequantize(*quantize(x), jnp.float32).reshape(64, 3, 32)
    largest = jnp.abs(x.reshape(64, 3, 32)).max(axis=-1, keepdims=True)
    # Codes are at most 2 apart under 6, and 6 is the last for values under 8; the largest is >= 4.
    assert (jnp.abs(back - x.reshape(64, 3, 32)) <= largest / 4 + 1e-7).all()


def test_last_axis_must_be_whole_blocks():
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize(jnp.zeros((2, 33)))


def test_mxarray_is_a_pytree_that_knows_its_shape():
    array = MXArray(*quantize(jnp.ones((3, 5, 64))))
    assert array.shape == (3, 5, 64)
    assert array[1].shape == (5, 64)
    assert jax.tree.leaves(array)[0].dtype == jnp.uint8
    np.testing.assert_array_equal(array.dequantize(jnp.float32), jnp.ones((3, 5, 64)))


def test_shuffled_it_is_the_same_array():
    """Every bit has a place of its own, for all bytes; and an index cuts it as it does others."""
    blocks = np.random.default_rng(0).permutation(np.arange(2 * 4 * 2 * 16))
    blocks = jnp.asarray(blocks.reshape(2, 4, 2, 16), jnp.uint8)
    array = MXArray(blocks, jnp.full((2, 4, 2), 127, jnp.uint8))
    shuffled = jax.jit(MXArray.shuffle)(array)
    assert shuffled.shape == array.shape and not (shuffled.blocks == blocks).all()
    back = jax.jit(MXArray.in_checkpoint_order)(shuffled)
    np.testing.assert_array_equal(back.blocks, blocks)
    want = array.dequantize(jnp.float32)
    np.testing.assert_array_equal(shuffled.dequantize(jnp.float32), want)
    np.testing.assert_array_equal(shuffled[1].dequantize(jnp.float32), want[1])
    np.testing.assert_array_equal(
        shuffled.in_words().dequantize(jnp.float32), array.in_words().dequantize(jnp.float32)
    )
