"""The Hopper kernels around attention and experts, without the GPU: interpreted, and lowered."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import ptx
import pytest
from flax import nnx
from hopper_layer import kernels_for_cuda
from sizes import TINY

from gpt_oss_jax.generate import device
from gpt_oss_jax.kernels import target
from gpt_oss_jax.kernels.attention import api as attention, few_queries
from gpt_oss_jax.kernels.dense import mosaic_gpu, xla
from gpt_oss_jax.kernels.dense.ptx import MAX_INPUTS, WARPS, Product
from gpt_oss_jax.kernels.dispatch import say_once
from gpt_oss_jax.model import Transformer, init_cache, transformer
from gpt_oss_jax.sharding import make_mesh, named_sharding

EPSILON = 1e-5
OLD = jax.__version_info__ < target.JAX_FOR_HOPPER


@pytest.fixture
def interpreter(monkeypatch):
    """The PTX interpreter in the place of the GPU; a list of what was launched."""
    launched = []

    def run(program, outs, *inputs):
        memory = ptx.Memory()
        places = [memory.put(np.asarray(x)) for x in inputs]
        poison = [np.full(np.prod(o.shape) * o.dtype.itemsize, 0x5A, np.uint8) for o in outs]
        results = [memory.put(array) for array in poison]
        ptx.launch(
            program.ptx(),
            [*places, *results],
            memory,
            grid=program.grid,
            shared_bytes=program.shared_bytes,
            warps=WARPS,
            cluster=program.cluster,
            at_rest=[(places[1], np.asarray(inputs[1]).nbytes)] if program.early else (),
        )
        return tuple(memory.get(at, o.shape, o.dtype) for at, o in zip(results, outs, strict=True))

    def launch(program, outs, inputs):
        launched.append(program.ending)
        # Few blocks, so that each has several tiles.
        program = dataclasses.replace(program, multiprocessors=2)
        return jax.pure_callback(functools.partial(run, program, outs), outs, *inputs)

    monkeypatch.setattr(mosaic_gpu, "_launch", launch)
    return launched


def random(seed, *shapes):
    numbers = np.random.default_rng(seed)
    return [jnp.asarray(numbers.normal(size=s), jnp.bfloat16) for s in shapes]


def close(got, want):
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    assert np.linalg.norm(got - want) < 4e-3 * np.linalg.norm(want)


def qkv_inputs(M, D=288, K=2, G=3, H=16):
    x, scale, weight, bias, cos, sin = random(
        M, (M, D), (D,), (K, G + 2, H, D), (K, G + 2, H), (M, H // 2), (M, H // 2)
    )
    return x, scale, weight.reshape(-1, D), bias.reshape(-1), cos, sin


@pytest.mark.parametrize(
    ("M", "sizes", "room"),
    [(1, {}, 2324), (3, {"D": 64, "H": 32}, 0), (13, {"D": 544}, 0), (20, {}, 4)],
)
def test_queries_keys_and_values(interpreter, M, sizes, room):
    inputs, options = qkv_inputs(M, **sizes), {"epsilon": EPSILON, "group": 3, "room": room}
    *got, empty = mosaic_gpu.queries_keys_values(*inputs, **options)
    *want, empty_too = xla.queries_keys_values(*inputs, **options)
    for ours, wanted in zip(got, want, strict=True):
        close(ours, wanted)
        # But for the order of sums: each is rounded once.
        assert (ours == wanted).mean() > 0.97
    assert (empty is None) == (room == 0)
    np.testing.assert_array_equal(empty, empty_too)


@pytest.mark.parametrize(
    ("M", "inputs", "outputs"), [(1, 256, 40), (8, 96, 8), (16, 320, 72), (33, 96, 24)]
)
@pytest.mark.parametrize("early", [False, True])
def test_a_product_is_added(interpreter, M, inputs, outputs, early):
    arrays = random(M, (M, inputs), (outputs, inputs), (outputs,), (M, outputs))
    close(mosaic_gpu.add_product(*arrays, early=early), xla.add_product(*arrays))


@pytest.mark.parametrize("M", [1, 13])
def test_a_product_is_rounded_with_the_residual_stream(interpreter, M):
    """Once: without itself, what was rounded off is left of it."""
    x, weight, bias, nothing = random(M, (M, 96), (24, 96), (24,), (M, 24))
    alone = mosaic_gpu.add_product(x, weight, bias, 0 * nothing)
    rest = mosaic_gpu.add_product(x, weight, bias, -alone).astype(jnp.float32)
    assert rest.any() and (jnp.abs(rest) <= 2**-8 * jnp.abs(alone.astype(jnp.float32))).all()


@pytest.mark.parametrize("M", [2, 13])
def test_a_part_of_a_product(interpreter, M):
    arrays = random(M, (M, 96), (24, 96))
    got = mosaic_gpu.part_of_product(*arrays, early=True)
    assert got.dtype == jnp.float32
    close(got, xla.part_of_product(*arrays))


def test_early_the_others_read_no_more_than_their_matrix(interpreter):
    """The interpreter refuses everything else until the earlier kernels have ended."""
    inputs, options = qkv_inputs(2), {"epsilon": EPSILON, "group": 3, "room": 64}
    *got, empty = mosaic_gpu.queries_keys_values(*inputs, **options, early=True)
    *want, _ = xla.queries_keys_values(*inputs, **options)
    for ours, wanted in zip(got, want, strict=True):
        close(ours, wanted)
    assert (empty == -1).all()
    inputs, options = random(3, (3, 96), (96,), (8, 96), (8,)), {"choices": 2, "room": 64}
    got = mosaic_gpu.route(*inputs, epsilon=EPSILON, **options, early=True)
    want = xla.route(*inputs, epsilon=EPSILON, **options)
    np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize(
    ("M", "E", "X", "tie"),
    [(1, 32, 4, 0), (3, 128, 4, 1), (2, 96, 4, 0), (11, 8, 2, 1), (35, 16, 4, 0)],
)
def test_experts_are_chosen(interpreter, M, E, X, tie):
    """With `tie`, all experts have a twin: of equal logits the lower id goes first."""
    x, scale, weight, bias = random(M, (M, 96), (96,), (E, 96), (E,))
    if tie:
        weight, bias = (a.at[1::2].set(a[::2]) for a in (weight, bias))
    options = {"epsilon": EPSILON, "choices": X, "room": 2324 * M}
    got = mosaic_gpu.route(x, scale, weight, bias, **options)
    want = xla.route(x, scale, weight, bias, **options)
    close(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[2], want[2], rtol=3e-3)
    np.testing.assert_array_equal(got[3], want[3])


def test_gradients_are_those_of_xla(interpreter):
    """Of every argument; experts have none."""
    inputs = random(0, (1, 64), (64,), (8, 64), (8,))
    options = {"epsilon": EPSILON, "choices": 2, "room": 4}

    def loss(module, *inputs):
        h, _, weights, _ = module.route(*inputs, **options)
        return (weights[:, 0] ** 2).sum() + h.astype(jnp.float32).sum()

    got = jax.grad(functools.partial(loss, mosaic_gpu), argnums=range(4))(*inputs)
    want = jax.grad(functools.partial(loss, xla), argnums=range(4))(*inputs)
    for ours, wanted in zip(got, want, strict=True):
        close(ours, wanted)
    assert interpreter == ["route"]


@pytest.mark.parametrize("room", [0, 4])
def test_gradients_of_queries_keys_and_values(interpreter, room):
    inputs, options = qkv_inputs(1), {"epsilon": EPSILON, "group": 3, "room": room}

    def loss(module, *inputs):
        *heads, _ = module.queries_keys_values(*inputs, **options)
        return sum((x.astype(jnp.float32) ** 2).sum() for x in heads)

    got = jax.grad(functools.partial(loss, mosaic_gpu), argnums=range(6))(*inputs)
    want = jax.grad(functools.partial(loss, xla), argnums=range(6))(*inputs)
    for ours, wanted in zip(got, want, strict=True):
        close(ours, wanted)


if not OLD:

    def test_they_lower_for_cuda():
        for room in (0, 64):
            options = {"epsilon": EPSILON, "group": 3, "room": room}
            run = functools.partial(mosaic_gpu.queries_keys_values, **options)
            assert kernels_for_cuda(run, *qkv_inputs(2)) == 1
        assert (
            kernels_for_cuda(mosaic_gpu.add_product, *random(0, (2, 64), (8, 64), (8,), (2, 8)))
            == 1
        )
        assert kernels_for_cuda(mosaic_gpu.part_of_product, *random(0, (2, 64), (8, 64))) == 1
        run = functools.partial(mosaic_gpu.route, epsilon=EPSILON, choices=2, room=4)
        assert kernels_for_cuda(run, *random(0, (2, 64), (64,), (8, 64), (8,))) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"widths": (2880, 2872)}, "widths"),
        ({"head": 24}, "heads"),
        ({"dtype": jnp.float32}, "bfloat16"),
    ],
)
def test_what_they_do_not_cover_is_refused(change, reason):
    sizes = {"widths": (2880, 4096), "head": 64, "experts": 32, "dtype": jnp.bfloat16}
    assert mosaic_gpu.why_not(**sizes) == ""
    assert reason in mosaic_gpu.why_not(**sizes | change)


def test_shared_memory_is_enough_for_every_width():
    for inputs in range(32, MAX_INPUTS + 1, 32):
        for outputs, ending in ((128, "route"), (8192, "add")):
            size = Product(16, inputs, outputs, ending).shared_bytes
            assert size <= 227 * 1024, (inputs, ending)


SMALL = dataclasses.replace(
    TINY,
    num_hidden_layers=2,
    hidden_size=32,
    head_dim=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=8,
)


def small_model(config):
    """In bfloat16, with random weights."""
    make = lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    return nnx.merge(nnx.graphdef(outline(config)), jax.jit(lambda: nnx.state(make()))())


def outline(config, mesh=None, dtype=jnp.bfloat16):
    """Of shapes."""
    options = {"dtype": dtype, "mesh": mesh}
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), **options))


@pytest.mark.parametrize(
    ("T", "launches", "axes"),
    [
        (2, ["rotate", "add", "route"], {}),
        (9, ["route"], {}),
        (2, ["rotate", "part", "route"], {"expert": 2}),
    ],
)
def test_a_decode_step_is_the_same_in_few_launches(interpreter, monkeypatch, T, launches, axes):
    """The whole model, some tokens for two rows, one padding; unless values are asked for."""
    config, model = SMALL, small_model(SMALL)
    tokens = jnp.asarray(np.random.default_rng(0).integers(config.vocab_size, size=(2, T)))
    positions = jnp.asarray([[*range(T)], [0, -1, *range(1, T - 1)]])

    def step(model, **options):
        cache = init_cache(config, 2, 16, jnp.bfloat16)
        return model.forward(tokens, positions, cache, **options)[:2]

    want, cache_want = jax.jit(step)(model)
    monkeypatch.setattr(transformer, "why_not_hopper", lambda: "")
    monkeypatch.setattr(mosaic_gpu, "MAX_ROWS", 16)
    if axes:
        model.mesh = make_mesh(**axes)
        for x in jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, nnx.Variable)):
            x[...] = jax.device_put(x[...], named_sharding(model.mesh, x.axes, x.shape))
    got, cache_got = jax.jit(lambda model: step(model))(model)
    assert interpreter == 2 * launches
    real = np.asarray(positions) >= 0
    np.testing.assert_allclose(got[real], want[real], atol=0.1)
    for ours, wanted in zip(jax.tree.leaves(cache_got), jax.tree.leaves(cache_want), strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), wanted.astype(jnp.float32), atol=0.1)
    jax.eval_shape(lambda model: step(model, capture=["logits"]), model)
    jax.eval_shape(lambda model: step(model, patch={"embedding": jnp.zeros((2, T, 32))}), model)
    router = model.layers[1].mlp.router
    router.bias = router.bias.replace(router.bias[...].astype(jnp.float32))
    jax.eval_shape(lambda model: step(model), model)
    assert len(interpreter) == 2 * len(launches)


@pytest.fixture
def launched(monkeypatch):
    """What would be launched on Hopper, whose results are zeros here."""
    programs = []

    def launch(program, outs, inputs):
        programs.append(program)
        return tuple(jnp.zeros(x.shape, x.dtype) for x in outs)

    monkeypatch.setattr(mosaic_gpu, "_launch", launch)
    monkeypatch.setattr(transformer, "why_not_hopper", lambda: "")
    return programs


@pytest.mark.parametrize("generates", [False, True])
@pytest.mark.parametrize("on_mesh", [False, True])
def test_weights_are_read_early_where_nothing_writes_them(launched, generates, on_mesh):
    """In the programs of `generate`, on one device: over a mesh weights may be gathered first."""
    model = outline(SMALL, make_mesh(expert=2) if on_mesh else None)
    cache, token = init_cache(SMALL, 1, 16, jnp.bfloat16), jnp.zeros((1, 1), jnp.int32)
    skeleton, leaves = device.split(model)

    def forward(model, leaves, cache):
        own = skeleton.model(leaves) if generates else model
        return own.forward(token, token, cache)[0]

    jax.eval_shape(forward, model, leaves, cache)
    assert len(launched) == 3 * SMALL.num_hidden_layers
    assert {x.early for x in launched} == {generates and not on_mesh}
    assert not model.weights_at_rest


@pytest.mark.parametrize(
    ("tokens", "axes", "endings"),
    [
        (1, {"tensor": 2}, ["rotate", "part", "route"]),
        # Key heads that the mesh does not divide are whole on every device.
        (1, {"expert": 4}, ["rotate", "add", "route"]),
        (33, {"expert": 2}, ["route"]),
        (1, {"data": 2}, []),
        (1, {"fsdp": 2}, []),
        (1, {"context": 2}, []),
    ],
)
def test_what_a_mesh_launches(launched, tokens, axes, endings):
    model = outline(SMALL, make_mesh(**axes))
    cache, token = init_cache(SMALL, 1, 64, jnp.bfloat16), jnp.zeros((1, tokens), jnp.int32)
    jax.eval_shape(lambda model, cache: model.forward(token, token, cache)[0], model, cache)
    assert [x.ending for x in launched] == SMALL.num_hidden_layers * endings


@pytest.mark.parametrize(
    ("rows", "slots", "axes", "words"),
    [
        (1, 32768, {}, 4 * 15 * 1024),
        # A device makes it for its own heads.
        (1, 32768, {"tensor": 2}, 2 * 15 * 1024),
        (5, 32768, {}, 0),
        (1, 4096, {}, 0),
    ],
)
def test_attention_gets_the_room_it_takes(launched, monkeypatch, rows, slots, axes, words):
    """In layers without a window."""
    config = dataclasses.replace(SMALL, head_dim=64, num_key_value_heads=4)
    monkeypatch.setattr(few_queries, "multiprocessors", lambda: 132)
    came = []

    def attend(q, k_new, v_new, k, v, *rest, room, **where):
        came.append(0 if room is None else room.size)
        return q, k, v

    monkeypatch.setattr(attention.mosaic_gpu, "store_and_attend", attend)
    model = outline(config, make_mesh(**axes) if axes else None)
    cache = init_cache(config, rows, slots, jnp.bfloat16)
    token = jnp.zeros((rows, 1), jnp.int32)
    jax.eval_shape(lambda model, cache: model.forward(token, token, cache)[0], model, cache)
    assert [x.room for x in launched if x.ending == "rotate"] == came == [0, words]


@pytest.mark.parametrize(("heads", "launches"), [(2, 0), (4, 6)])
def test_a_device_s_own_heads_must_be_wide_enough(launched, heads, launches):
    """Of 2 key heads on 2 devices; what is multiplied comes in pieces of 32."""
    config = dataclasses.replace(SMALL, num_attention_heads=heads)
    model = outline(config, make_mesh(expert=2))
    cache, token = init_cache(config, 1, 16, jnp.bfloat16), jnp.zeros((1, 1), jnp.int32)
    jax.eval_shape(lambda model, cache: model.forward(token, token, cache)[0], model, cache)
    assert len(launched) == launches


def of_four_experts():
    return outline(dataclasses.replace(SMALL, num_experts=4))


def with_a_float32_bias():
    model = outline(SMALL)
    router = model.layers[1].mlp.router
    router.bias = router.bias.replace(jax.ShapeDtypeStruct(router.bias.shape, jnp.float32))
    return model


def forward(model, tokens=1):
    """Traced with a cache."""
    cache, token = init_cache(model.config, 1, 256, model.dtype), jnp.zeros((1, tokens), jnp.int32)
    return jax.eval_shape(lambda model: model.forward(token, token, cache)[0], model)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (of_four_experts, "multiples of 8 up to 128 experts, got 16 and 4"),
        (with_a_float32_bias, "takes bfloat16, got weights of float32"),
        (lambda: outline(SMALL, dtype=jnp.float32), "takes bfloat16, got float32"),
    ],
)
def test_what_keeps_a_model_from_few_launches_is_said_or_raised(launched, caplog, make, reason):
    say_once.cache_clear()
    model = make()
    for _ in range(2):
        forward(model)
    (message,) = caplog.messages
    assert reason in message and not launched
    model.implementation = "mosaic_gpu"
    with pytest.raises(NotImplementedError, match=reason):
        forward(model)
    # Of more rows, where nothing is launched, it comes to the attention.
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU, this is cpu"):
        forward(model, tokens=mosaic_gpu.MAX_ROUTED + 1)


def test_a_mesh_that_keeps_a_model_from_few_launches_is_said(launched, caplog):
    """No error where kernels are named, as attention and experts run on theirs."""
    say_once.cache_clear()
    model = outline(SMALL, make_mesh(data=2))
    forward(model)
    assert "split over the mesh data=2" in caplog.text and len(caplog.messages) == 1
    model.implementation = "mosaic_gpu"
    assert not model._can_launch() and len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("change", "axes"),
    [({"num_experts": 4}, {"data": 2}), ({"num_attention_heads": 2}, {"expert": 2})],
    ids=["its rows split", "its heads too narrow"],
)
def test_a_model_on_a_mesh_may_name_its_kernels(launched, change, axes):
    """Whatever keeps it from few launches."""
    model = outline(dataclasses.replace(SMALL, **change), make_mesh(**axes))
    model.implementation = "mosaic_gpu"
    assert not model._can_launch()


@pytest.mark.parametrize(
    ("implementation", "tokens", "elsewhere"),
    [("xla", 1, ""), (None, 129, ""), (None, 1, "needs a Hopper GPU")],
    ids=["another implementation", "more rows", "another device"],
)
def test_nothing_is_said_where_few_launches_are_not_expected(
    launched, monkeypatch, caplog, implementation, tokens, elsewhere
):
    say_once.cache_clear()
    monkeypatch.setattr(transformer, "why_not_hopper", lambda: elsewhere)
    model = of_four_experts()
    model.implementation = implementation
    forward(model, tokens)
    assert not caplog.messages and not launched


def test_other_types_are_refused():
    x, weight, bias, residual = random(0, (1, 32), (8, 32), (8,), (1, 8))
    with pytest.raises(ValueError, match="float32"):
        mosaic_gpu.add_product(x, weight, bias.astype(jnp.float32), residual)
