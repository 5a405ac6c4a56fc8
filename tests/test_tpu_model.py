"""A whole model as on a TPU: loaded into words, the same logits, and out again byte for byte."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import as_on_a_tpu

from gpt_oss_jax import load, save


def test_a_model_in_words_is_the_same_model(tmp_path):
    plain = load("tiny")
    with as_on_a_tpu():
        words = load("tiny", dtype=jnp.float32)
    assert all(layer.mlp.up.words_of and layer.mlp.down.words_of for layer in words.layers)

    tokens_BT = jnp.asarray([[200006, 1428, 200008, 4827, 382, 220, 17, 659, 220, 17, 30]])
    want = jax.jit(lambda m, t: m(t))(plain, tokens_BT)
    with as_on_a_tpu():
        got = jax.jit(lambda m, t: m(t))(words, tokens_BT)
    np.testing.assert_allclose(got, want, atol=2e-6 * float(jnp.abs(want).max()))

    for name, model in (("plain", plain), ("words", words)):
        save(model, tmp_path / name, format="hf-mxfp4")
    files = sorted(p.name for p in (tmp_path / "plain").iterdir())
    assert any(name.endswith(".safetensors") for name in files)
    for name in files:
        assert (tmp_path / "words" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
