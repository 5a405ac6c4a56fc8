"""MXFP4 in the order of TPU kernels: a bijection, decoded to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from as_tpu import as_on_a_tpu
from jax.experimental import pallas as pl

from gpt_oss_jax.kernels.expert_matmul import tpu_decode
from gpt_oss_jax.quant import MXArray, mxfp4, tpu_words


def random(shape, scales=(0, 255)):
    bits = np.random.default_rng(0)
    blocks = bits.integers(0, 256, (*shape[:-1], shape[-1] // 32, 16), np.uint8)
    scales = bits.integers(*scales, blocks.shape[:-1], np.uint8)
    return MXArray(jnp.asarray(blocks), jnp.asarray(scales))


@pytest.mark.parametrize(
    "shape", [(2, 3, 32), (3, 5, 2, 96), (2, 7, 256), (2, 5, 2, 320), (1, 3, 1088)]
)
@pytest.mark.parametrize("native", [False, True])
def test_every_byte_comes_back(shape, native):
    m = random(shape)
    words = jax.jit(MXArray.in_words, static_argnums=1)(m, native)
    assert words.shape == m.shape == shape
    assert words.blocks.dtype == words.scales.dtype == jnp.int32
    back = words.in_checkpoint_order()
    np.testing.assert_array_equal(back.blocks, m.blocks)
    np.testing.assert_array_equal(back.scales, m.scales)
    np.testing.assert_array_equal(words.dequantize(), m.dequantize())


def test_recoding_is_its_own_inverse():
    every = jnp.arange(256, dtype=jnp.uint8)
    np.testing.assert_array_equal(tpu_words.recode(tpu_words.recode(every)), every)


def decoded(m: MXArray, native: bool) -> np.ndarray:
    """What the kernels make of words [1, N, K]: float64 [K, N], scales applied."""
    words = m.in_words(native)
    K, N = m.shape[-1], words.blocks.shape[-1]

    def body(words, scales, values, powers):
        every = pl.ds(0, N)
        for chunk, start, stop in tpu_decode.chunks(words):
            decoded = tpu_decode.decode(words[0, 0, start // 8 : stop // 8, every], native)
            values[start:stop, :] = decoded.astype(jnp.float32)
            found = tpu_decode.decode_scales(scales, 0, chunk, every)
            powers[8 * chunk : 8 * chunk + 8, :] = found

    shapes = [(K, N), (8 * -(-K // 256), N)]
    with as_on_a_tpu():
        values, powers = pl.pallas_call(
            body, out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        )(words.blocks, words.scales)
    values = np.asarray(values, np.float64).reshape(K // 32, 32, N)
    values = values * (1 if native else tpu_decode.LACKS)
    return (values * np.asarray(powers, np.float64)[: K // 32, None]).reshape(K, N)[:, : m.shape[1]]


@pytest.mark.parametrize("native", [False, True])
def test_kernels_decode_every_byte_and_scale_to_the_bit(native):
    """All 256 bytes under all scales from 1 to 254; 2^-127, scale 0, is 0 on a TPU."""
    bytes_ = np.arange(256, dtype=np.uint8).reshape(16, 16)
    scales = np.arange(256, dtype=np.uint8)[:255]
    m = MXArray(
        jnp.broadcast_to(jnp.asarray(bytes_), (1, 255, 16, 16)),
        jnp.broadcast_to(jnp.asarray(scales)[None, :, None], (1, 255, 16)),
    )
    codes = np.stack([bytes_ & 15, bytes_ >> 4], axis=-1).reshape(-1, 1)
    want = mxfp4.FP4_VALUES.astype(np.float64)[codes] * 2.0 ** (scales.astype(np.float64) - 127)
    want[:, 0] = 0
    got = decoded(m, native)
    np.testing.assert_array_equal(got, want)
    assert (np.signbit(got) == np.signbit(want))[want != 0].all()
