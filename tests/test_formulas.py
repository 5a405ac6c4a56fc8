"""Hand-made vectors for the formulas that logits do not show, or show too late.

Written out from the specification or computed once with the PyTorch reference, never with our own
code. Needs neither PyTorch nor a checkpoint.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss_jax.config import GPT_OSS_20B
from gpt_oss_jax.kernels.expert_matmul.xla import swiglu
from gpt_oss_jax.model.rope import concentration, cos_sin, inverse_frequencies
from gpt_oss_jax.quant import mxfp4

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]

# Computed with the reference; a rounded ramp would change those from 9 to 17, the last by 76%.
FREQUENCIES = """
    1 .689044297 .47478205 .327145875 .225418001 .155322984 .107024424 .0737445652
    .0508132726 .0317056961 .0193349998 .0115920492 .00679495931 .00386035908 .00209379266
    .00105260219 .000456483918 .000129318694 3.83088118e-5 2.63964685e-5 1.8188337e-5
    1.25325696e-5 8.63549576e-6 5.95023948e-6 4.09997847e-6 2.82506676e-6 1.94659629e-6
    1.34129095e-6 9.24208962e-7 6.36820914e-7 4.38797855e-7 3.0235114e-7
"""
# Of the frequencies on which every machine's reference agrees: index -> cos, sin.
LAST_POSITION = {
    0: (-1.1014750003814697, -0.7746052742004395),
    1: (0.9582033157348633, -0.9461008310317993),
    2: (0.11006535589694977, 1.342067837715149),
    3: (-1.300553560256958, 0.34902867674827576),
    7: (-0.8294723033905029, 1.0607714653015137),
    8: (1.3459700345993042, -0.04031205549836159),
    12: (-0.02610296569764614, -1.346320629119873),
    17: (-0.43485623598098755, -1.2744255065917969),
    24: (1.1567721366882324, 0.6893031001091003),
    31: (1.345516324043274, 0.05335002765059471),
}


def test_swiglu_clamps():
    """The gate only from above, the linear part on both sides, and one added to it.

    A gate clamped from below too would turn -1.3e-13 into -1.9e-4: 1e-5 of any logit.
    """
    pairs = jnp.array([(9, -9), (-20, 3), (0, 0), (7, 7), (1, -1), (2, -0.5)], jnp.float32)
    expected = [-41.9997188, -1.31736410e-13, 0, 55.9996250, 0, 0.967829312]
    np.testing.assert_allclose(swiglu(*pairs.T, 7.0), expected, rtol=1e-5, atol=0)


def test_e2m1_table():
    np.testing.assert_array_equal(mxfp4.FP4_VALUES, E2M1)
    codes = jnp.arange(16, dtype=jnp.uint8)
    for values in (mxfp4.FP4_VALUES, mxfp4.decode_codes(codes)):
        np.testing.assert_array_equal(np.signbit(values), np.signbit(E2M1))
        np.testing.assert_array_equal(values, E2M1)


def test_nibble_order():
    """The low nibble comes first: these bytes count through the table twice."""
    block = bytes.fromhex("1032547698BADCFE" * 2)
    blocks = jnp.array(np.frombuffer(block, np.uint8))[None]
    for dtype in (jnp.bfloat16, jnp.float32):
        for scale, factor in ((127, 1.0), (126, 0.5), (130, 8.0), (97, 2.0**-30)):
            values = mxfp4.dequantize(blocks, jnp.array([scale], jnp.uint8), dtype)
            assert values.dtype == dtype
            np.testing.assert_array_equal(values.astype(jnp.float32), np.array(E2M1 * 2) * factor)


def test_inverse_frequencies():
    """To two units in the last place: PyTorch's own power differs by one between CPUs."""
    expected = np.array(FREQUENCIES.split(), np.float32)
    frequencies = inverse_frequencies(GPT_OSS_20B)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, expected, rtol=2.4e-7, atol=0)
    rounded = inverse_frequencies(dataclasses.replace(GPT_OSS_20B, rope_truncate=True))
    different = np.abs(rounded / expected - 1) > 1e-3
    np.testing.assert_array_equal(np.nonzero(different)[0], np.arange(9, 18))
    assert concentration(GPT_OSS_20B) == 1.3465735902799727


def test_cos_and_sin_at_the_last_position():
    """Angles are float32 products: exact ones would be 2e-3 off, bf16 ones meaningless."""
    last = jnp.array([[GPT_OSS_20B.max_context - 1]], jnp.int32)
    assert last[0, 0] == 131071
    index = np.array(list(LAST_POSITION))
    tables = jax.jit(cos_sin, static_argnums=(1, 2))(last, GPT_OSS_20B, jnp.float32)
    rounded = jax.jit(cos_sin, static_argnums=(1, 2))(last, GPT_OSS_20B, jnp.bfloat16)
    for i in range(2):
        expected = np.array([pair[i] for pair in LAST_POSITION.values()], np.float32)
        np.testing.assert_allclose(tables[i][0, 0, index], expected, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(rounded[i], tables[i].astype(jnp.bfloat16))
