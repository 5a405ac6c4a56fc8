"""The implementations of attention that run on a CPU, by name, against the dense oracle.

Those for Hopper have their own tests, in test_hopper_attention.py.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from as_tpu import as_on_a_tpu

from gpt_oss_jax.kernels.attention import api, mosaic_tpu, xla

attention = jax.jit(api.attention, static_argnames=("window", "implementation"))
dense_attention = jax.jit(oracle.attention, static_argnames="window")
B, K, G, H = 2, 3, 5, 14
implementations = pytest.mark.parametrize("implementation", ["mosaic_tpu", "xla"])


@pytest.fixture(autouse=True)
def where_it_runs(request):
    """A test of an implementation for TPU runs as on one."""
    callspec = getattr(request.node, "callspec", None)
    tpu = callspec is not None and callspec.params.get("implementation") == "mosaic_tpu"
    with as_on_a_tpu() if tpu else contextlib.nullcontext():
        yield


def inputs(T, S, dtype=jnp.float32, heads=(K, G, H)):
    random = np.random.default_rng(0)
    shapes = (B, T, *heads), *((B, S, heads[0], heads[2]),) * 2, heads[:2]
    return tuple(jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)


def positions(T, S):
    """A ragged batch: keys shuffled, one row shorter, the last query padding."""
    k_pos = np.stack([np.random.RandomState(b).permutation(S) for b in range(B)])
    k_pos[1][k_pos[1] >= S - 3] = -1
    q_pos = np.stack([np.arange(S - T, S), np.arange(S - T, S) - 3])
    q_pos[:, -1] = -1
    return {"q_pos_BT": jnp.asarray(q_pos, jnp.int32), "k_pos_BS": jnp.asarray(k_pos, jnp.int32)}


@implementations
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize(("T", "S"), [(2, 5), (13, 29)])
def test_equals_the_oracle(implementation, window, T, S):
    args, where = inputs(T, S), positions(T, S)
    got = attention(*args, **where, window=window, implementation=implementation)
    want = dense_attention(*args, **where, window=window)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("T", "S", "heads"), [(1, 640, (8, 2, 64)), (1, 700, (K, G, H)), (150, 1200, (K, G, H))]
)
def test_several_blocks_on_a_tpu(window, T, S, heads):
    """More keys than one block, in an order that no block bounds, and in that of a full cache.

    Heads of 64 fill the lanes two by two: one query has all four groups in one step.
    """
    args = inputs(T, S, heads=heads)
    shuffled = positions(T, S)
    in_order = shuffled | {"k_pos_BS": jnp.sort(shuffled["k_pos_BS"], axis=1)}
    for where in (shuffled, in_order):
        # The last query is padding, and with T = 1 the only one.
        where = where | {"q_pos_BT": where["q_pos_BT"].at[0, -1].set(S // 2)}
        with as_on_a_tpu():
            got = attention(*args, **where, window=window, implementation="mosaic_tpu")
        want = dense_attention(*args, **where, window=window)
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_a_tpu_copies_only_the_keys_that_a_block_of_queries_sees():
    k_pos_BS = jnp.where(jnp.arange(64) < 40, jnp.arange(64), -1)[None]
    for q_pos, window, blocks in (
        ([32, 33], None, [0, 1, 2, 3, 4]),
        ([32, 33], 7, [3, 4]),
        ([31, 32], 2, [3, 4]),
        ([-1, 8], 7, [0, 1]),
        ([-1, 5], 7, [0]),
        ([-1, -1], None, []),
    ):
        q_pos_BT = jnp.asarray([q_pos])
        steps, count = mosaic_tpu._steps(q_pos_BT, k_pos_BS, 2, 8, window)
        assert count[0, 0] == len(blocks)
        assert steps[0, 0, : len(blocks)].tolist() == blocks
        assert set(steps[0, 0].tolist()) == set(blocks or [0])


@implementations
def test_bf16_keeps_its_dtype(implementation):
    args, where = inputs(9, 9, jnp.bfloat16), positions(9, 9)
    got = attention(*args, **where, window=4, implementation=implementation)
    assert got.dtype == jnp.bfloat16
    want = dense_attention(*args, **where, window=4)
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=2e-2)


@implementations
def test_a_query_that_sees_nothing_gives_zeros(implementation):
    args, where = inputs(3, 5), positions(3, 5)
    got = attention(*args, **where, window=None, implementation=implementation)
    assert not got[:, -1].any()


@implementations
def test_gradients_equal_the_oracle(implementation):
    args, where = inputs(5, 11), positions(5, 11)

    def loss(function, *args):
        return (function(*args, **where, window=4) ** 2).sum()

    every = tuple(range(4))
    named = functools.partial(api.attention, implementation=implementation)
    got = jax.jit(jax.grad(functools.partial(loss, named), argnums=every))(*args)
    want = jax.jit(jax.grad(functools.partial(loss, oracle.attention), argnums=every))(*args)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=2e-5)


def test_blocks_of_queries_give_the_same(monkeypatch):
    args, where = inputs(13, 29), positions(13, 29)
    want = attention(*args, **where, window=7)
    monkeypatch.setattr(xla, "_SCORE_BYTES", 4 * B * K * G * 29 * 4)

    def run(*args):
        return api.attention(*args, **where, window=7)

    np.testing.assert_allclose(jax.jit(run)(*args), want, atol=2e-6)
    assert "scan" in str(jax.make_jaxpr(run)(*args))


def test_scores_of_a_long_context_are_bounded():
    T = S = 8192
    q = jax.ShapeDtypeStruct((1, T, 8, 8, 64), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((1, S, 8, 64), jnp.bfloat16)
    sinks = jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)
    pos = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def run(q, k, v, sinks, q_pos, k_pos):
        return attention(q, k, v, sinks, q_pos_BT=q_pos, k_pos_BS=k_pos, window=None)

    memory = jax.jit(run).lower(q, kv, kv, sinks, pos, pos).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * xla._SCORE_BYTES  # The whole matrix would be 17 GB.


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="got 'magic'"):
        attention(*inputs(2, 3), **positions(2, 3), window=None, implementation="magic")


def test_wrong_shapes_are_refused():
    q, k, v, sinks = inputs(2, 3)
    with pytest.raises(ValueError, match="must be"):
        attention(q, k, v[:, :-1], sinks, **positions(2, 3), window=None)
