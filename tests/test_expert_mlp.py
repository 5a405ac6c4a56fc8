"""Every implementation of the expert layer, by name, against the dense oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from gpt_oss_jax.kernels.expert_matmul import api, xla
from gpt_oss_jax.kernels.expert_matmul.weights import ExpertWeights
from gpt_oss_jax.quant import MXArray, quantize

dense_mlp = jax.jit(oracle.expert_mlp, static_argnames="limit")
E, X, D, F = 11, 2, 96, 160
_jitted = jax.jit(api.expert_mlp, static_argnames=("limit", "implementation"))
implementations = pytest.mark.parametrize("implementation", list(api.IMPLEMENTATIONS))
# One row, the last count that is gathered, the first that is grouped, several tiles an expert.
ROWS = [1, xla._FEW_PAIRS // X, xla._FEW_PAIRS // X + 1, 300]


def expert_mlp(*args, implementation=None, **kwargs):
    """Skips what a kernel refuses here, saying why; XLA must never refuse."""
    try:
        return _jitted(*args, implementation=implementation, **kwargs)
    except NotImplementedError as error:
        if implementation == "xla":
            raise
        pytest.skip(f"{implementation}: {error}")


@functools.cache
def weights(packed=True, dtype=jnp.float32):
    random = np.random.default_rng(0)
    up, up_bias, down, down_bias = (
        jnp.asarray(random.normal(size=shape), dtype)
        for shape in ((E, F, 2, D), (E, F, 2), (E, D, F), (E, D))
    )
    if packed:
        up, down = (MXArray(*jax.jit(quantize)(matrix)) for matrix in (up, down))
    return ExpertWeights(up, up_bias, down, down_bias)


def rows(M, dtype=jnp.float32, experts=E):
    random = np.random.default_rng(M)
    x = jnp.asarray(random.normal(size=(M, D)) / 10, dtype)
    chosen = np.stack([random.permutation(experts)[:X] for _ in range(M)])
    weight = random.random((M, X))
    return (
        x,
        jnp.asarray(chosen, jnp.int32),
        jnp.asarray(weight / weight.sum(1, keepdims=True), jnp.float32),
    )


def dense(w):
    decoded = [m.dequantize(jnp.float32) if isinstance(m, MXArray) else m for m in (w.up, w.down)]
    return decoded[0], w.up_bias, decoded[1], w.down_bias


@implementations
@pytest.mark.parametrize("packed", [True, False], ids=["mxfp4", "dense"])
@pytest.mark.parametrize("M", ROWS)
def test_equals_the_oracle(implementation, M, packed):
    w, args = weights(packed=packed), rows(M)
    got = expert_mlp(*args, w, limit=7.0, implementation=implementation)
    want = dense_mlp(*args, *dense(w), limit=7.0)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


@implementations
@pytest.mark.parametrize("M", ROWS)
def test_bf16(implementation, M):
    w, args = weights(dtype=jnp.bfloat16), rows(M, jnp.bfloat16)
    got = expert_mlp(*args, w, limit=7.0, implementation=implementation)
    assert got.dtype == jnp.bfloat16
    want = dense_mlp(*args, *dense(w), limit=7.0)
    error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
    assert error < 1e-2


@implementations
@pytest.mark.parametrize("M", [3, 200])
def test_every_row_may_choose_the_same_experts(implementation, M):
    w, args = weights(), rows(M, jnp.float32, X)
    got = expert_mlp(*args, w, limit=7.0, implementation=implementation)
    want = dense_mlp(*args, *dense(w), limit=7.0)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


@implementations
@pytest.mark.parametrize("M", [3, 40])
def test_gradients_equal_the_oracle(implementation, M):
    w, (x, chosen, weight) = weights(packed=False), rows(M)

    def got(x, weight, w):
        y = expert_mlp(x, chosen, weight, w, limit=7.0, implementation=implementation)
        return (y**2).sum()

    def want(x, weight, w):
        return (oracle.expert_mlp(x, chosen, weight, *dense(w), limit=7.0) ** 2).sum()

    for a, b in zip(
        jax.tree.leaves(jax.jit(jax.grad(got, argnums=(0, 1, 2)))(x, weight, w)),
        jax.tree.leaves(jax.jit(jax.grad(want, argnums=(0, 1, 2)))(x, weight, w)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


def test_many_rows_decode_one_expert_at_a_time():
    """The compiler's temporaries hold a decoded expert, not all of them."""
    w = weights(dtype=jnp.bfloat16)
    one_expert = (2 * F * D + D * F) * 2
    args = rows(64, jnp.bfloat16)
    memory = (
        jax.jit(lambda *a: api.expert_mlp(*a, limit=7.0))
        .lower(*args, w)
        .compile()
        .memory_analysis()
    )
    rows_bytes = (64 * X + E * xla._MIN_TILE) * D * 4 * 2
    assert memory.temp_size_in_bytes < 4 * one_expert + rows_bytes < E * one_expert


def test_few_rows_keep_nothing_decoded_for_the_backward_pass():
    """What is kept is what came in; kept, the decoded values would be several times that."""
    w, (x, chosen, weight) = weights(), rows(8)
    _, pull = jax.vjp(lambda x: api.expert_mlp(x, chosen, weight, w, limit=7.0), x)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pull))
    assert kept < 1.5 * sum(leaf.nbytes for leaf in jax.tree.leaves((w, x, chosen, weight)))


def test_few_rows_never_contract_decoded_copies():
    jaxpr = str(jax.make_jaxpr(lambda *a: api.expert_mlp(*a, limit=7.0))(*rows(2), weights()))
    assert "dot_general" not in jaxpr


def test_wrong_shapes_are_refused():
    x, chosen, weight = rows(3)
    with pytest.raises(ValueError, match="must be"):
        expert_mlp(x[:, 1:], chosen, weight, weights(), limit=7.0)
