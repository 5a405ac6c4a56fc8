"""The implementations of the expert layer that run on a CPU, by name, against the dense oracle.

Those for Hopper have their own tests, in test_hopper_experts.py.
"""

import contextlib
import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from as_tpu import as_on_a_tpu

from gpt_oss_jax.kernels.expert_matmul import api, mosaic_tpu, tpu_tiles, xla
from gpt_oss_jax.kernels.expert_matmul.weights import ExpertWeights
from gpt_oss_jax.quant import MXArray, quantize

expert_mlp = jax.jit(api.expert_mlp, static_argnames=("limit", "implementation"))
dense_mlp = jax.jit(oracle.expert_mlp, static_argnames="limit")
E, X, D, F = 11, 2, 96, 160
# One row, the last count that is gathered, the first that is grouped, several tiles an expert.
# The kernels for TPU take weights in two forms, one of them in two orders.
ROWS = {
    "xla": [1, xla._FEW_PAIRS // X, xla._FEW_PAIRS // X + 1, 300],
    "mosaic_tpu": [1, mosaic_tpu.FEW_ROWS, mosaic_tpu.FEW_ROWS + 1, 300],
    "mosaic_tpu, native": [1, mosaic_tpu.FEW_ROWS, 300],
    "mosaic_tpu, folded": [mosaic_tpu.FEW_ROWS, 300],
}
if jax.__version_info__ < (0, 11):
    # An older JAX runs the same kernels; with the newer one they are held up in every form.
    ROWS |= {"mosaic_tpu": [1, mosaic_tpu.FEW_ROWS, 300], "mosaic_tpu, folded": [300]}
    del ROWS["mosaic_tpu, native"]
KERNELS = api.IMPLEMENTATIONS
implementations = pytest.mark.parametrize("implementation", list(ROWS))
at_every_count = pytest.mark.parametrize(
    ("implementation", "M"), [(name, M) for name, counts in ROWS.items() for M in counts]
)


@pytest.fixture(autouse=True)
def where_it_runs(request):
    """A test of an implementation for TPU runs as on one."""
    callspec = getattr(request.node, "callspec", None)
    tpu = callspec is not None and "mosaic_tpu" in callspec.params.get("implementation", "")
    with as_on_a_tpu() if tpu else contextlib.nullcontext():
        yield


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


def laid_out(w, implementation):
    """The weights as the implementation wants them."""
    if implementation == "xla":
        return w
    native = functools.partial(MXArray.in_words, native=True)
    forms = {"native": native, "folded": MXArray.folded}
    form = forms.get(implementation.partition(", ")[2], MXArray.in_words)
    up, down = jax.jit(lambda w: (form(w.up), form(w.down)))(w)
    return dataclasses.replace(w, up=up, down=down)


def run(args, w, implementation):
    name = implementation.split(",")[0]
    return expert_mlp(*args, laid_out(w, implementation), limit=7.0, implementation=name)


def dense(w):
    decoded = [m.dequantize(jnp.float32) if isinstance(m, MXArray) else m for m in (w.up, w.down)]
    return decoded[0], w.up_bias, decoded[1], w.down_bias


@at_every_count
def test_equals_the_oracle(implementation, M):
    w, args = weights(), rows(M)
    got = run(args, w, implementation)
    want = dense_mlp(*args, *dense(w), limit=7.0)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("M", [2, 20])
@pytest.mark.parametrize("form", ["mosaic_tpu", "mosaic_tpu, folded"])
def test_outputs_of_several_steps_and_a_last_small_group(monkeypatch, form, M):
    monkeypatch.setitem(tpu_tiles.TILES, "TPU v5 lite", tpu_tiles.Tiles(256, 1024, 512, 16))
    random = np.random.default_rng(0)
    shapes = (E, 576, 2, 64), (E, 576, 2), (E, 64, 576), (E, 64)
    up, up_bias, down, down_bias = (jnp.asarray(random.normal(size=s), jnp.float32) for s in shapes)
    up, down = (MXArray(*jax.jit(quantize)(matrix)) for matrix in (up, down))
    w, (x, *routed) = ExpertWeights(up, up_bias, down, down_bias), rows(M)
    with as_on_a_tpu():
        got = run((x[:, :64], *routed), w, form)
    want = dense_mlp(x[:, :64], *routed, *dense(w), limit=7.0)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("M", ROWS["xla"])
def test_dense_weights(M):
    w, args = weights(packed=False), rows(M)
    got = expert_mlp(*args, w, limit=7.0, implementation="xla")
    want = dense_mlp(*args, *dense(w), limit=7.0)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize(
    ("implementation", "M", "own"),
    [(name, M, E - 3) for name, counts in ROWS.items() for M in counts]
    + [(name, M, 1) for name in ("xla", "mosaic_tpu") for M in (ROWS[name][0], 300)],
)
def test_ids_past_the_experts_add_nothing(implementation, M, own):
    """As on a device of a mesh, which has `own` of E experts and the rows of all."""
    w, (x, experts, weight) = weights(), rows(M)
    some = jax.tree.map(lambda a: a[:own], w)
    ours = laid_out(some, implementation)
    kernel = KERNELS[implementation.split(",")[0]]
    on_a_device = jax.jit(functools.partial(kernel, limit=7.0, some_elsewhere=True))
    got = on_a_device(x, jnp.minimum(experts, own), weight, ours)
    want = dense_mlp(x, experts, jnp.where(experts < own, weight, 0), *dense(w), limit=7.0)
    scale = float(jnp.abs(dense_mlp(x, experts, weight, *dense(w), limit=7.0)).max())
    np.testing.assert_allclose(got, want, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("form", "parts", "rounds"),
    [("mosaic_tpu", 3, [1, 2, 1]), ("mosaic_tpu, folded", 9, [1, 1, 1, 3, 3, 1, 1, 1, 1])],
)
def test_more_than_twice_a_share_goes_in_rounds(form, parts, rounds):
    """All rows go to one or two of the devices that share nine experts; the others have none.

    One device after the other: in the interpreter they wait for each other at every kernel, and so
    have to have the same number of rounds.
    """
    w = jax.tree.map(lambda a: a[:9], weights())
    x, experts, weight = rows(270, experts=3 if parts == 3 else 2)
    experts += 3
    own, size = 9 // parts, mosaic_tpu.tile_size(experts.size, 9)
    tiles_E = -(-np.bincount(experts.reshape(-1), minlength=9) // size)
    at_once = mosaic_tpu.tiles_of_round(experts.size, own, 9)
    needed = tiles_E.reshape(parts, own).sum(axis=1)
    assert np.maximum(1, -(-needed // at_once)).tolist() == rounds

    options = {"limit": 7.0, "some_elsewhere": True, "num_experts": 9}
    on_a_device = jax.jit(functools.partial(mosaic_tpu.expert_mlp, **options))
    got = []
    for first in range(0, 9, own):
        part = operator.itemgetter(np.s_[first : first + own])
        some = laid_out(jax.tree.map(part, w), form)
        is_own = (experts >= first) & (experts < first + own)
        with as_on_a_tpu():
            got.append(on_a_device(x, jnp.where(is_own, experts - first, own), weight, some))
    assert [bool((y != 0).any()) for y in got] == [n > 0 for n in needed]
    want = dense_mlp(x, experts, weight, *dense(w), limit=7.0)
    np.testing.assert_allclose(sum(got), want, atol=1e-5 * float(jnp.abs(want).max()))


@at_every_count
def test_bf16(implementation, M):
    w, args = weights(dtype=jnp.bfloat16), rows(M, jnp.bfloat16)
    got = run(args, w, implementation)
    assert got.dtype == jnp.bfloat16
    want = dense_mlp(*args, *dense(w), limit=7.0)
    error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
    assert error < 1e-2


@implementations
@pytest.mark.parametrize("M", [3, 200])
def test_every_row_may_choose_the_same_experts(implementation, M):
    w, args = weights(), rows(M, jnp.float32, X)
    got = run(args, w, implementation)
    want = dense_mlp(*args, *dense(w), limit=7.0)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("M", [3, 40])
def test_gradients_equal_the_oracle(M):
    w, (x, chosen, weight) = weights(packed=False), rows(M)

    def got(x, weight, w):
        y = api.expert_mlp(x, chosen, weight, w, limit=7.0, implementation="xla")
        return (y**2).sum()

    def want(x, weight, w):
        return (oracle.expert_mlp(x, chosen, weight, *dense(w), limit=7.0) ** 2).sum()

    for a, b in zip(
        jax.tree.leaves(jax.jit(jax.grad(got, argnums=(0, 1, 2)))(x, weight, w)),
        jax.tree.leaves(jax.jit(jax.grad(want, argnums=(0, 1, 2)))(x, weight, w)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


@implementations
def test_gradients_through_packed_weights_equal_the_oracle(implementation):
    w, (x, chosen, weight) = weights(), rows(3)

    def got(x, weight, biases):
        ours = dataclasses.replace(laid_out(w, implementation), **biases)
        name = implementation.split(",")[0]
        return (api.expert_mlp(x, chosen, weight, ours, limit=7.0, implementation=name) ** 2).sum()

    def want(x, weight, biases):
        ours = dataclasses.replace(w, **biases)
        return (oracle.expert_mlp(x, chosen, weight, *dense(ours), limit=7.0) ** 2).sum()

    args = x, weight, {"up_bias": w.up_bias, "down_bias": w.down_bias}
    for a, b in zip(
        jax.tree.leaves(jax.jit(jax.grad(got, argnums=(0, 1, 2)))(*args)),
        jax.tree.leaves(jax.jit(jax.grad(want, argnums=(0, 1, 2)))(*args)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("form", ["mosaic_tpu", "mosaic_tpu, folded"])
def test_tpu_words_serve_the_xla_version_too(form):
    w, args = weights(), rows(3)
    got = expert_mlp(*args, laid_out(w, form), limit=7.0, implementation="xla")
    np.testing.assert_array_equal(got, expert_mlp(*args, w, limit=7.0, implementation="xla"))


def test_a_tpu_takes_its_own_implementation(caplog):
    with as_on_a_tpu():
        jaxpr = jax.make_jaxpr(lambda *a: api.expert_mlp(*a, limit=7.0))(
            *rows(2), laid_out(weights(), "mosaic_tpu")
        )
    assert "expert_up_few" in str(jaxpr)
    assert not caplog.records


@pytest.mark.parametrize(
    ("w", "kind", "reason"),
    [
        (lambda: laid_out(weights(), "mosaic_tpu"), None, "needs a TPU, this is cpu"),
        (lambda: weights(packed=False), "TPU v5 lite", "not MXFP4"),
        (weights, "TPU v5 lite", "not in TPU words"),
    ],
)
def test_what_the_tpu_version_does_not_take(w, kind, reason):
    with as_on_a_tpu(kind) if kind else contextlib.nullcontext():
        with pytest.raises(NotImplementedError, match=reason):
            api.expert_mlp(*rows(2), w(), limit=7.0, implementation="mosaic_tpu")


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


@pytest.mark.parametrize(("less", "dtype"), [(1, jnp.int32), (0, jnp.float32)])
def test_room_of_another_size_or_type_is_refused(less, dtype):
    x, chosen, weight = rows(3)
    w = weights()
    room = jnp.full(chosen.size * w.up.shape[1] // 2 - less, -1, dtype)
    with pytest.raises(ValueError, match="room must be int32"):
        api.expert_mlp(x, chosen, weight, w, limit=7.0, room=room)
