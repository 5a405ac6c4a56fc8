"""MXFP4 folded into float8_e5m2: a bijection beside the scales, and the values to the bit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from as_tpu import as_on_a_tpu
from jax.experimental import pallas as pl

from gpt_oss_jax.kernels.expert_matmul import tpu_decode
from gpt_oss_jax.quant import MXArray, mxfp4, tpu_folded

SPAN = tpu_folded.SPAN
fold = jax.jit(MXArray.folded)
unfold = jax.jit(MXArray.in_checkpoint_order)
folds = jax.jit(MXArray.folds)


def random(shape, top, seed=0):
    """Scales from top - SPAN to top, both there; each expert one higher than the one before."""
    bits = np.random.default_rng(seed)
    blocks = bits.integers(0, 256, (*shape[:-1], shape[-1] // 32, 16), np.uint8)
    scales = bits.integers(top - SPAN, top + 1, blocks.shape[:-1])
    scales.reshape(shape[0], -1)[:, :2] = top - SPAN, top
    scales += np.arange(shape[0]).reshape(-1, *[1] * (scales.ndim - 1))
    return MXArray(jnp.asarray(blocks), jnp.asarray(scales.astype(np.uint8)))


@pytest.mark.parametrize("shape", [(2, 3, 32), (3, 5, 2, 320), (1, 3, 1088)])
def test_every_byte_comes_back(shape):
    m = random(shape, 120)
    assert folds(m)
    folded = fold(m)
    assert folded.shape == m.shape == shape
    back = unfold(folded)
    np.testing.assert_array_equal(back.blocks, m.blocks)
    np.testing.assert_array_equal(back.scales, m.scales)


@pytest.fixture(scope="module")
def every():
    """An expert for each top scale from 0 to 254: all bytes, under every scale it can have."""
    tops = np.arange(255)
    scales = np.maximum(tops[:, None] - np.arange(SPAN + 1), 0).astype(np.uint8)
    bytes_ = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    return MXArray(
        jnp.broadcast_to(jnp.asarray(bytes_), (255, SPAN + 1, 16, 16)),
        jnp.broadcast_to(jnp.asarray(scales)[..., None], (255, SPAN + 1, 16)),
    )


def test_every_byte_and_scale_is_folded_to_the_bit(every):
    """In normal numbers of e5m2 only, and a factor that is a normal number of float32."""
    assert folds(every)
    folded = fold(every)
    numbers = np.asarray(folded.blocks[:, 0, :, : SPAN + 1]).view(ml_dtypes.float8_e5m2)
    numbers = numbers.astype(np.float64)
    factors = np.asarray(folded.factors, np.float64)
    assert (2.0**-126 <= factors).all() and np.isfinite(factors).all()
    assert (2.0**-14 <= np.abs(numbers[numbers != 0])).all() and np.isfinite(numbers).all()
    got = numbers * factors[:, None, None]
    codes = np.asarray(mxfp4.unpack(every.blocks)).reshape(255, SPAN + 1, -1)
    scales = np.repeat(np.asarray(every.scales, np.float64), 32, axis=-1)
    want = (mxfp4.FP4_VALUES[codes].astype(np.float64) * 2.0 ** (scales - 127)).swapaxes(1, 2)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(want))
    back = unfold(folded)
    np.testing.assert_array_equal(back.blocks, every.blocks)
    np.testing.assert_array_equal(back.scales, every.scales)


def test_kernels_read_every_number_as_it_is(every):
    folded = fold(MXArray(every.blocks[:1], every.scales[:1]))
    _, _, K, N = folded.blocks.shape

    def body(stored, out):
        out[...] = tpu_decode.numbers(stored, 0, pl.ds(0, N)).astype(jnp.float32)

    with as_on_a_tpu():
        got = pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct((K, N), jnp.float32))(
            folded.blocks
        )
    want = np.asarray(folded.blocks[0, 0]).view(ml_dtypes.float8_e5m2).astype(np.float32)
    np.testing.assert_array_equal(got, want)


def test_where_scales_span_more_it_does_not_fold():
    m = random((3, 4, 2, 96), 120)
    scales = np.array(m.scales)
    assert folds(m)
    scales[1, 2, 0, 1] = scales[1].max() - SPAN - 1
    assert not folds(MXArray(m.blocks, jnp.asarray(scales)))
    # A block of zeros may have any scale but that of NaN.
    blocks = np.array(m.blocks)
    blocks[1, 2, 0, 1] = 0x80
    zeros = MXArray(jnp.asarray(blocks), jnp.asarray(scales))
    assert folds(zeros)
    back = unfold(fold(zeros))
    np.testing.assert_array_equal(back.blocks, blocks)
    np.testing.assert_array_equal(back.scales, scales)
    scales[1, 2, 0, 1] = 255
    assert not folds(MXArray(jnp.asarray(blocks), jnp.asarray(scales)))
