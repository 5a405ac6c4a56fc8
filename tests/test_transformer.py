"""The transformer by itself: caches, captures, patches, exactness. Parity is in tests/parity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_model import random_model
from sizes import TINY

from gpt_oss_jax.kernels import IMPLEMENTATIONS, einsum
from gpt_oss_jax.kernels.attention.xla import write, write_some
from gpt_oss_jax.model import Packed, Transformer, init_cache
from gpt_oss_jax.model.cache import ring_slots
from gpt_oss_jax.model.layers import Linear, plus_bias
from gpt_oss_jax.quant import dequantize

B, T = 2, 40


@pytest.fixture
def tiny(tiny):
    """A windowed layer and a full one: half the time to compile of four."""
    return dataclasses.replace(tiny, num_hidden_layers=2)


model = functools.cache(random_model)


def tokens(config, seed=1):
    return jax.random.randint(jax.random.key(seed), (B, T), 0, config.vocab_size)


@jax.jit
def whole(model, tokens):
    return model(tokens)


@jax.jit
def step(model, tokens, positions, cache):
    return model.forward(tokens, positions, cache)


def spread(logits):
    return float(logits.max() - logits.min())


# A ring of the window is read before it is written by any chunk over one token; one of 64 slots by
# none of these.
@pytest.mark.parametrize(
    ("ring", "chunks"), [(7, [1] * 40), (7, [3, 11, 2, 24]), (64, [17, 23])], ids=str
)
def test_chunks_of_any_length_equal_one_pass(tiny, chunks, ring):
    m, t = model(tiny), tokens(tiny)
    cache = init_cache(tiny, B, 48, jnp.float32, ring=ring)
    out, start = [], 0
    for n in chunks:
        positions = jnp.broadcast_to(jnp.arange(start, start + n, dtype=jnp.int32), (B, n))
        logits, cache = step(m, t[:, start : start + n], positions, cache)
        out.append(logits)
        start += n
    want = whole(m, t)
    np.testing.assert_allclose(jnp.concatenate(out, 1), want, atol=2e-6 * spread(want))


@pytest.mark.parametrize("T", [5, 12, 40])
def test_slots_that_look_for_their_tokens_are_those_written(T):
    """Into a ring of 7; padding before, between and behind them, or nothing else."""
    starts, random = jnp.asarray([[0], [3], [11], [5]]), np.random.default_rng(T)
    real = random.random((4, T)) < np.array([[0.7], [0.7], [0.7], [0]])
    positions = jnp.where(real, starts + jnp.cumsum(real, axis=1) - 1, -1)
    old, new = (jnp.asarray(random.normal(size=(4, n, 6)), jnp.float32) for n in (7, T))
    arrays = old.astype(jnp.bfloat16), ring_slots(positions, 7), new
    got, want = write_some(*arrays), write(*arrays)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_a_matrix_gives_is_rounded_last(rows, dtype):
    """Of bfloat16 weights; in bfloat16, of several rows, product and sum are both rounded."""
    linear = Linear((6, 2), (64,), (None,) * 3, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (rows, 64), jnp.bfloat16)
    got = linear(x, dtype=dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(linear.matrix, np.float64).T
    product = exact if rows == 1 else exact.astype(dtype).astype(np.float64)
    want = (product + np.asarray(linear.bias[...], np.float64).reshape(-1)).astype(dtype)
    assert got.dtype == dtype and got.shape == (rows, 6, 2)
    rounding = 1e-5 if dtype == jnp.float32 else 0
    np.testing.assert_allclose(got.reshape(rows, -1), want, rtol=rounding, atol=rounding)


def test_gradients_of_a_bias_are_summed_in_float32():
    """Of many rows, each as much as the others; in bfloat16 it would come to a half."""
    bias, rows = jnp.zeros(3, jnp.bfloat16), jnp.full((1 << 14, 3), 0.3, jnp.bfloat16)
    y, pull = jax.vjp(lambda bias: plus_bias(rows, bias), bias)
    assert y.dtype == jnp.bfloat16
    (gradient,) = pull(rows)
    np.testing.assert_allclose(gradient.astype(jnp.float32), (1 << 14) * 0.3, rtol=0.01)
    y, change = jax.jvp(plus_bias, (rows, bias), (rows, bias + 1))
    np.testing.assert_allclose(change.astype(jnp.float32), 1.3, rtol=0.01)


def test_rows_of_different_length(tiny):
    """Padding before, between and after a row's tokens changes nothing."""
    m, t = model(tiny), tokens(tiny)
    want = whole(m, t)
    cache = init_cache(tiny, B, 48, jnp.float32)
    lengths, start = [[10, 4], [1, 9], [0, 13], [20, 5]], np.zeros(B, int)
    for row_lengths in lengths:
        width = 22
        chunk, positions = np.zeros((B, width), np.int32), np.full((B, width), -1, np.int32)
        for b, n in enumerate(row_lengths):
            left = 1 if b else 0  # One row padded on both sides.
            chunk[b, left : left + n] = t[b, start[b] : start[b] + n]
            positions[b, left : left + n] = np.arange(start[b], start[b] + n)
        logits, cache = step(m, jnp.asarray(chunk), jnp.asarray(positions), cache)
        for b, n in enumerate(row_lengths):
            left = 1 if b else 0
            np.testing.assert_allclose(
                logits[b, left : left + n],
                want[b, start[b] : start[b] + n],
                atol=2e-6 * spread(want),
            )
            start[b] += n


def test_logits_only_where_asked(tiny):
    m, t = model(tiny), tokens(tiny)
    at = jnp.array([3, 39])
    got, cache = jax.jit(lambda m, t, at: m.forward(t, logits_at=at))(m, t, at)
    assert cache is None and got.shape == (B, tiny.vocab_size) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, whole(m, t)[jnp.arange(B), at], atol=1e-5)


def test_rings_are_written_before_attention(tiny):
    """What is written after all layers needs the memory of all layers."""
    L, positions = tiny.num_hidden_layers, jnp.broadcast_to(jnp.arange(T), (B, T))
    run = lambda m, t, cache: m.forward(t, positions, cache)[1]
    jaxpr = jax.make_jaxpr(run)(model(tiny), tokens(tiny), init_cache(tiny, B, 48, jnp.float32))
    barriers = [e for e in jaxpr.eqns if e.primitive.name == "optimization_barrier"]
    windowed = [i for i in range(L) if tiny.layer_window(i)]
    rings = [(jaxpr.jaxpr.outvars[i], jaxpr.jaxpr.outvars[L + i]) for i in windowed]
    assert [tuple(e.outvars[1:]) for e in barriers] == rings
    assert all(any(e.outvars[0] is x for f in jaxpr.eqns for x in f.invars) for e in barriers)


def test_windowed_layers_hold_a_ring(tiny):
    cache = init_cache(tiny, B, 48, jnp.float32)
    assert [k.shape[1] for k in cache.k] == [7, 48]
    with pytest.raises(ValueError, match="at least the window, 7 slots, got 6"):
        init_cache(tiny, B, 48, jnp.float32, ring=6)


def test_bf16_stays_bf16(tiny):
    m = nnx.eval_shape(lambda: Transformer(tiny, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    logits, cache, seen = jax.eval_shape(
        lambda m, t: m.forward(
            t,
            jnp.zeros(t.shape, jnp.int32),
            init_cache(tiny, B, 16, m.dtype),
            capture=("layers.*.output", "layers.*.mlp.router_logits"),
        ),
        m,
        tokens(tiny),
    )
    assert logits.dtype == jnp.float32
    assert {k.dtype for k in cache.k} == {jnp.dtype(jnp.bfloat16)}
    assert seen["layers.0.output"].dtype == jnp.bfloat16
    assert seen["layers.0.mlp.router_logits"].dtype == jnp.float32


def test_packed_experts_equal_their_dense_twins(tiny):
    packed = model(tiny)
    values = {path: x[...] for path, x in nnx.to_flat_state(nnx.state(packed))}
    for path in [path for path in values if path[-1] == "blocks"]:
        pair = values.pop(path), values.pop((*path[:-1], "scales"))
        values[*path[:-1], "weight"] = jax.jit(dequantize, static_argnums=2)(*pair, jnp.float32)
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: Transformer(tiny, rngs=nnx.Rngs(0), experts="dense"))
    )
    flat = [(path, x.replace(values.pop(path))) for path, x in nnx.to_flat_state(state)]
    dense = nnx.merge(graphdef, nnx.from_flat_state(flat))
    assert not values
    t = tokens(tiny)
    np.testing.assert_allclose(whole(dense, t), whole(packed, t), atol=1e-5)


def contractions(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "ragged_dot", "conv_general_dilated"):
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from contractions(inner)


def test_one_float32_operand_makes_it_float32_arithmetic():
    jaxpr = jax.make_jaxpr(lambda a, b: einsum("ij,kj->ik", a, b))(
        jnp.ones((2, 3), jnp.bfloat16), jnp.ones((4, 3))
    )
    (contraction,) = contractions(jaxpr.jaxpr)
    assert set(contraction.params["precision"]) == {jax.lax.Precision.HIGHEST}


@pytest.mark.parametrize("length", [1, T])
def test_float32_means_float32_arithmetic(tiny, length):
    """Without a precision JAX multiplies in TF32 on NVIDIA GPUs and in bf16 on TPU."""
    m = model(tiny)
    cache = init_cache(tiny, B, 48, jnp.float32)

    def loss(m, t, cache):
        return m.forward(t, jnp.zeros(t.shape, jnp.int32), cache)[0].sum()

    grad = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Param))
    for function in (loss, grad):
        jaxpr = jax.make_jaxpr(function)(m, tokens(tiny)[:, :length], cache)
        found = list(contractions(jaxpr.jaxpr))
        assert len(found) > 4 * tiny.num_hidden_layers
        for equation in found:
            precision = equation.params["precision"]
            assert precision is not None and set(precision) == {jax.lax.Precision.HIGHEST}


def test_packed_bytes_are_not_trainable(tiny):
    m = model(tiny)
    grad = nnx.grad(lambda m, t: m(t).sum(), argnums=nnx.DiffState(0, nnx.Param))
    grads = nnx.eval_shape(grad, m, tokens(tiny))
    paths = {path[-1] for path, _ in nnx.to_flat_state(grads)}
    assert paths == {"weight", "bias", "scale", "sinks"}
    assert len(nnx.to_flat_state(nnx.state(m, Packed))) == 4 * tiny.num_hidden_layers


def test_capture_returns_every_intermediate(tiny):
    run = jax.jit(lambda m, t: m.forward(t, capture=("*",)))
    logits, _, seen = run(model(tiny), tokens(tiny))
    N, H, X = tiny.num_attention_heads, tiny.head_dim, tiny.experts_per_token
    K, D = tiny.num_key_value_heads, tiny.hidden_size
    shapes = {name: value.shape for name, value in seen.items()}
    layer = {
        name.removeprefix("layers.1."): shape
        for name, shape in shapes.items()
        if name.startswith("layers.1.")
    }
    wide = (B, T, D)
    assert layer == {
        "input": wide,
        "attention_norm": wide,
        "attention.q": (B, T, K, N // K, H),
        "attention.k": (B, T, K, H),
        "attention.v": (B, T, K, H),
        "attention.q_rope": (B, T, K, N // K, H),
        "attention.k_rope": (B, T, K, H),
        "attention.scores": (B, K, N // K, T, T),
        "attention.heads": (B, T, K, N // K, H),
        "attention.out": wide,
        "middle": wide,
        "mlp_norm": wide,
        "mlp.router_logits": (B, T, tiny.num_experts),
        "mlp.experts": (B, T, X),
        "mlp.expert_weights": (B, T, X),
        "mlp.out": wide,
        "output": wide,
    }
    assert shapes["embedding"] == shapes["final_norm"] == wide
    np.testing.assert_array_equal(seen["logits"], logits)
    parts = seen["layers.1.middle"], seen["layers.1.mlp.out"]
    np.testing.assert_array_equal(seen["layers.1.output"], sum(parts))


def test_patching_a_captured_value_back_changes_nothing_and_another_does(tiny):
    m, t, other = model(tiny), tokens(tiny), tokens(tiny, seed=2)
    names = ("layers.1.input", "layers.0.attention.k_rope", "layers.1.mlp.experts")

    @jax.jit
    def patched(m, t, patch):
        return m.forward(t, patch=patch)[0]

    captured = jax.jit(lambda m, t: m.forward(t, capture=names)[2])
    own, others = captured(m, t), captured(m, other)
    want = whole(m, t)
    for name in names:
        np.testing.assert_allclose(patched(m, t, {name: own[name]}), want, atol=1e-5)
        assert jnp.abs(patched(m, t, {name: others[name]}) - want).max() > 1e-2
    # All that comes after a layer's input follows from it.
    name = "layers.1.input"
    np.testing.assert_allclose(patched(m, t, {name: others[name]}), whole(m, other), atol=1e-5)


def test_a_patched_value_is_captured_as_it_was_computed(tiny):
    m, t = model(tiny), tokens(tiny)
    names = ("layers.1.input", "layers.1.output")
    run = jax.jit(lambda m, t, patch: m.forward(t, capture=names, patch=patch)[2])
    own = run(m, t, {})
    seen = run(m, t, {"layers.1.input": jnp.zeros_like(own["layers.1.input"])})
    np.testing.assert_array_equal(seen["layers.1.input"], own["layers.1.input"])
    assert jnp.abs(seen["layers.1.output"] - own["layers.1.output"]).max() > 1e-2


def test_gradients_flow_through_patches(tiny):
    m, t = model(tiny), tokens(tiny)[:, :9]
    own = {"layers.0.output": jnp.ones((B, 9, tiny.hidden_size))}
    grad = jax.jit(jax.grad(lambda patch, m: m.forward(t, patch=patch)[0].sum()))(own, m)
    assert jnp.abs(grad["layers.0.output"]).max() > 0


def cache(rows, dtype=jnp.float32):
    return init_cache(dataclasses.replace(TINY, num_hidden_layers=2), rows, 48, dtype)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capture": ("layers.9.output",)}, "layers.9.output"),
        ({"patch": {"layer.0": jnp.zeros(())}}, "layer.0"),
        ({"patch": {"embedding": jnp.zeros((1, 2, 3))}}, "must have shape"),
        ({"positions_BT": jnp.zeros((1, 3), jnp.int32)}, "positions must have shape"),
        ({"logits_at": jnp.zeros(1, jnp.int32)}, "logits_at must have shape"),
        ({"cache": cache(B)}, "positions must be given with a cache"),
        ({"cache": cache(B + 1), "positions_BT": jnp.zeros((B, T), jnp.int32)}, "must have 2 rows"),
        (
            {"cache": cache(B, jnp.bfloat16), "positions_BT": jnp.zeros((B, T), jnp.int32)},
            "2 rows of float32, got 2 of bfloat16",
        ),
    ],
)
def test_refused(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda m, t: m.forward(t, **arguments), model(tiny), tokens(tiny))


def test_an_unknown_implementation_is_refused_before_anything_is_loaded(tiny):
    assert IMPLEMENTATIONS == ("mosaic_gpu", "mosaic_tpu", "xla")
    with pytest.raises(ValueError, match="got 'magic'"):
        nnx.eval_shape(lambda: Transformer(tiny, rngs=nnx.Rngs(0), implementation="magic"))
