"""The loop over blocks: like `lax.map`, but for when its memory is taken."""

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss_jax.kernels.blocks import map_blocks


def test_values_and_gradients_are_those_of_map():
    x_NM = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    numbers_N, w = jnp.arange(5.0), jnp.float32(0.7)

    def run(loop):
        def loss(w, x_NM):
            out = loop(lambda block: jnp.tanh(block[0] * w) * block[1], (x_NM, numbers_N))
            return (out**2).sum(), out

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(w, x_NM)

    got = run(lambda f, xs: map_blocks(f, xs, after=x_NM))
    want = run(jax.lax.map)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


def test_the_empty_result_is_no_constant():
    """Or XLA would make those of all layers first, and keep them."""

    def constants(loop):
        text = jax.jit(lambda x: loop(lambda row: row * 2, x)).lower(jnp.ones((6, 3))).as_text()
        return [x for x in text.splitlines() if "broadcast_in_dim %cst" in x and "6x3xf32" in x]

    assert constants(jax.lax.map)
    assert not constants(lambda f, x: map_blocks(f, x, after=x))
