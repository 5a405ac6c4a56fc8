"""One device and a mesh of eight give the same logits; what a mesh cannot be is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from random_model import random_model
from sizes import SHARDABLE

from gpt_oss_jax.config import GPT_OSS_20B, GPT_OSS_120B
from gpt_oss_jax.generate import generate_batch
from gpt_oss_jax.kernels import sharded
from gpt_oss_jax.model import Transformer, init_cache
from gpt_oss_jax.model.cache import cache_sharding
from gpt_oss_jax.plan import variables
from gpt_oss_jax.sampling import SamplingParams
from gpt_oss_jax.sharding import make_mesh, named_sharding, preset, preset_of_all, spelled

MESHES = [
    {"data": 8},
    {"expert": 2},
    {"expert": 4},
    {"expert": 8},
    {"data": 2, "expert": 2, "tensor": 2},
    {"data": 2, "expert": 4},
    {"expert": 2, "tensor": 4},
    {"expert": 4, "tensor": 2},
    {"tensor": 8},
    {"tensor": 5},
    {"fsdp": 4, "tensor": 2},
]


run = jax.jit(lambda m, t, c: m.forward(t, jnp.broadcast_to(jnp.arange(13), t.shape), c))
step = jax.jit(lambda m, t, p, c: m.forward(t, p, c)[0])


@pytest.mark.parametrize("axes", MESHES, ids=spelled)
def test_a_mesh_gives_the_logits_of_one_device(shardable, axes):
    mesh = make_mesh(**axes)
    model = random_model(shardable)
    tokens = jax.random.randint(jax.random.key(0), (8, 13), 0, shardable.vocab_size)
    batch = named_sharding(mesh, ("batch", None), tokens.shape)
    want, plain_cache = run(model, tokens, init_cache(shardable, 8, 16, jnp.float32))

    m = random_model(shardable, mesh=mesh)
    up = m.layers[0].mlp.up.blocks[...]
    size = mesh.shape
    parts = (
        size["tensor"] if 10 % size["tensor"] == 0 else 1
    )  # Whole blocks of the down projection.
    experts = 8 // (size["expert"] * size["fsdp"])
    assert up.sharding.shard_shape(up.shape)[:2] == (experts, 320 // parts)
    got, cache = run(m, jax.device_put(tokens, batch), init_cache(shardable, 8, 16, jnp.float32))
    np.testing.assert_allclose(got, want, atol=2e-6 * float(want.max() - want.min()))
    # A decoding step on the sharded cache, the path with few rows.
    position = jnp.full((8, 1), 13, jnp.int32)
    np.testing.assert_allclose(
        step(m, tokens[:, :1], position, cache),
        step(model, tokens[:, :1], position, plain_cache),
        atol=2e-6 * float(want.max() - want.min()),
    )


def chunks(model, place=lambda x: x):
    """Logits of rows of several lengths, in chunks, and of a token after them; and the cache."""
    lengths = np.array([16, 9, 0, 13])
    tokens = np.random.default_rng(0).integers(0, 112, (6, 4, 16), np.int32)
    cache = jax.tree.map(place, init_cache(model.config, 4, 256, jnp.float32, ring=8))
    forward, found = jax.jit(type(model).forward), []
    for i, chunk in enumerate(tokens):
        offsets = np.arange(16 if i < 5 else 1, dtype=np.int32)
        positions = np.where(offsets < lengths[:, None], i * lengths[:, None] + offsets, -1)
        logits, cache = forward(model, chunk[:, : len(offsets)], positions.astype(np.int32), cache)
        found.append(np.where(positions[..., None] < 0, 0, logits))
    return np.concatenate(found, axis=1), cache


def test_a_split_context_gives_the_logits_of_one_device():
    """Of chunks of a prompt and of a decode step, in layers with a ring and with all slots."""
    mesh = make_mesh(context=2, fsdp=2, tensor=2)
    want, _ = chunks(random_model(SHARDABLE))
    place = lambda x: jax.device_put(x, cache_sharding(mesh, x, 4))
    got, cache = chunks(random_model(SHARDABLE, mesh=mesh), place)
    assert [x.sharding.shard_shape(x.shape)[1] for x in cache.k] == [8, 128]
    np.testing.assert_allclose(got, want, atol=2e-6 * float(np.ptp(want)))


def test_generation_with_a_split_context(shardable):
    """Keys are gathered for chunks of 128, and stay where they are for one token."""
    prompts = [list(range(100)) * 2, [5] * 40]
    one, two = (
        generate_batch(
            random_model(shardable, mesh=mesh), prompts, max_tokens=6, sampling=SamplingParams(0.0)
        )
        for mesh in (None, make_mesh(context=4))
    )
    assert [x.tokens for x in one] == [x.tokens for x in two]
    keys = jnp.zeros((2, 512, 4, 10))
    for tokens, moved in (128, False), (1, True):
        queries = jnp.zeros((2, tokens, 4, 3, 10))
        assert sharded.moves_queries(make_mesh(context=4), queries, keys) == moved


def test_a_decode_step_moves_no_keys(shardable):
    mesh = make_mesh(context=4)
    m = random_model(shardable, mesh=mesh)
    cache = jax.tree.map(
        lambda x: jax.device_put(x, cache_sharding(mesh, x, 4)),
        init_cache(shardable, 1, 512, jnp.float32),
    )
    token = np.ones((1, 1), np.int32)
    text = jax.jit(type(m).forward).lower(m, token, token, cache).compile().as_text()
    moved = re.findall(r" = \(?(\S+?)\[([\d,]*)\].* (?:all-|collective-|reduce-s)", text)
    sizes = [np.prod([int(n) for n in shape.split(",")]) for _, shape in moved]
    assert sizes and max(sizes) <= 4 * 3 * 10  # The heads of one query; of keys there are 20,480.


def test_one_token_is_looked_up_as_two(shardable):
    """For one row XLA's compiler for GPUs gathers the table, 1.16 GB a token."""
    m, token = random_model(shardable, mesh=make_mesh(expert=2)), np.full((1, 1), 7, np.int32)
    text = jax.jit(m.embedding, static_argnums=1).lower(token, m.mesh).as_text()
    assert "tensor<2x1x1x192xf32>" in text
    np.testing.assert_array_equal(m.embedding(token, m.mesh), m.embedding.weight[...][7:8][None])


@pytest.mark.parametrize("axes", [{"tensor": 4}, {"expert": 4, "tensor": 2}])
@pytest.mark.parametrize("length", [1, 40])
def test_dense_experts_on_a_mesh(shardable, axes, length):
    """Also where the mesh divides their width, but not its blocks."""
    tokens = jax.random.randint(jax.random.key(0), (2, length), 0, shardable.vocab_size)
    forward = jax.jit(lambda m, t: m(t))
    want, got = (
        forward(random_model(shardable, experts="dense", mesh=mesh), tokens)
        for mesh in (None, make_mesh(**axes))
    )
    np.testing.assert_allclose(got, want, atol=2e-6 * float(jnp.abs(want).max()))


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (2, 40)])
def test_no_packed_byte_leaves_its_device(shardable, rows, length):
    """Rows are given to the experts where these are, few or many."""
    m = random_model(shardable, mesh=make_mesh(expert=4, tensor=2))
    tokens = jnp.zeros((rows, length), jnp.int32)
    text = jax.jit(lambda m, t: m(t)).lower(m, tokens).compile().as_text()
    moves = [x for x in text.splitlines() if re.search(r" = .*(all-|collective-|reduce-s)", x)]
    assert any("all-reduce" in x for x in moves)
    assert not [x for x in moves if re.search(r"[us](8|32)\[\d+,\d{2,}", x)]


@pytest.mark.parametrize(
    ("axes", "experts"),
    [({"expert": 4, "tensor": 2}, "mxfp4"), ({"data": 2, "fsdp": 2, "context": 2}, "dense")],
    ids=str,
)
def test_gradients_on_a_mesh_are_those_of_one_device(shardable, axes, experts):
    """And lie where the weights do."""
    tokens = jax.random.randint(jax.random.key(0), (4, 14), 0, shardable.vocab_size)

    def gradients(model):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params, rest):
            logits = nnx.merge(graphdef, params, rest)(tokens)
            return (jax.nn.log_softmax(logits) ** 2).mean()

        return jax.jit(jax.grad(loss))(params, rest)

    mesh = make_mesh(**axes)
    want, got = (gradients(random_model(shardable, experts=experts, mesh=m)) for m in (None, mesh))
    for (_, x), (_, y) in zip(*map(nnx.to_flat_state, (got, want)), strict=True):
        np.testing.assert_allclose(x[...], y[...], atol=1e-5 * float(jnp.abs(y[...]).max()))
        at_rest = named_sharding(mesh, x.axes, x.shape)
        assert x[...].sharding.is_equivalent_to(at_rest, x.ndim) or mesh.shape["fsdp"] == 1


def test_heads_and_vocabulary_are_split_over_all_that_share_experts():
    mesh = make_mesh(expert=4, tensor=2)
    for axes, shape, spec in [
        (("kv_heads", "embed"), (8, 96), PartitionSpec(("expert", "tensor"), None)),
        (("kv_heads", "embed"), (4, 96), PartitionSpec("expert", None)),
        (("kv_heads", "embed"), (6, 96), PartitionSpec("tensor", None)),
        (("vocab", "embed"), (3, 96), PartitionSpec(None, None)),
    ]:
        assert named_sharding(mesh, axes, shape).spec == spec


def test_a_mesh_axis_splits_one_dimension():
    """Whole experts over fsdp; the width of the model where they are too few, or there are none."""
    mesh = make_mesh(fsdp=8)
    axes = ("experts", "expert_width", None, "embed", None)
    for shape, at_rest in [
        ((32, 320, 2, 90, 16), PartitionSpec("fsdp", None, None, None, None)),
        ((4, 320, 2, 96, 16), PartitionSpec(None, None, None, "fsdp", None)),
    ]:
        assert named_sharding(mesh, axes, shape).spec == at_rest
        in_use = named_sharding(mesh, axes, shape, in_use=True).spec
        assert in_use == PartitionSpec(None, None, None, None, None)
    assert named_sharding(mesh, ("vocab", "embed"), (112, 96)).spec == PartitionSpec(None, "fsdp")


def test_axes_that_do_not_divide_are_replicated():
    mesh = make_mesh(tensor=4)
    sharding = named_sharding(mesh, ("experts", "embed", "expert_width_blocks"), (8, 96, 90))
    assert sharding.spec == PartitionSpec(None, None, None)
    sharding = named_sharding(mesh, ("experts", "embed", "expert_width_blocks"), (8, 96, 12))
    assert sharding.spec == PartitionSpec(None, None, "tensor")


def weights(config):
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return [variable for _, variable in nnx.to_flat_state(nnx.state(abstract))]


def test_every_weight_names_its_axes(shardable):
    for variable in weights(shardable):
        named_sharding(make_mesh(), variable.axes, variable.shape)


def test_presets():
    released = [
        variables(config, jnp.dtype(jnp.bfloat16), "mxfp4").values()
        for config in (GPT_OSS_20B, GPT_OSS_120B)
    ]
    for devices, mesh in [
        (1, "none"),
        (2, "expert=2"),
        (4, "expert=4"),
        (7, "expert=4"),  # Of which three stay idle: 7 divides nothing.
        (8, "expert=8"),
        (16, "data=2,expert=8"),  # As 16 do not divide the heads.
    ]:
        assert [spelled(preset(x, devices)) for x in released] == [mesh] * 2
    # What eight devices or fewer get is among those that are held against one device.
    given = {spelled(preset(x, devices)) for x in released for devices in range(2, 9)}
    assert given <= set(map(spelled, MESHES))


def test_what_takes_all_of_an_odd_number_of_devices(shardable):
    """By the 90 blocks that experts of the released models are wide, the 10 of this one."""
    released = variables(GPT_OSS_20B, jnp.dtype(jnp.bfloat16), "mxfp4").values()
    for weights_, devices, mesh in [
        (released, 3, "tensor=3"),
        (released, 6, "expert=2,tensor=3"),
        (released, 7, "none"),
        (released, 12, "expert=4,tensor=3"),
        (released, 48, "data=2,expert=8,tensor=3"),
        (weights(shardable), 5, "tensor=5"),
    ]:
        assert spelled(preset_of_all(weights_, devices)) == mesh


def test_a_preset_makes_copies_where_heads_do_not_divide(shardable, tiny):
    assert preset(weights(shardable), 8) == {"data": 2, "expert": 4}
    assert preset(weights(tiny), 8) == {"data": 8, "expert": 1}


def test_too_few_devices_are_refused():
    with pytest.raises(ValueError, match="the mesh data=16 needs 16 devices, got 8"):
        make_mesh(data=16)


@pytest.mark.parametrize("size", [0, 2.0, "2", None])
def test_sizes_are_whole_numbers(size):
    with pytest.raises(ValueError, match="whole numbers of at least 1"):
        make_mesh(data=size)


def test_explicit_axes_are_refused():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(ValueError, match="Auto axes"):
        named_sharding(mesh, ("batch",))


def test_a_mesh_of_other_axes_is_refused():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="some of the axes data, fsdp, context, expert"):
        named_sharding(mesh, ("batch",))


def test_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="got 'width'"):
        named_sharding(make_mesh(), ("width",))


def test_rings_over_a_mesh_are_written_as_they_are_split(monkeypatch):
    """Where slots looked for their tokens, all tokens would come to all devices."""
    monkeypatch.setattr("gpt_oss_jax.model.attention.write_some", None)
    model = random_model(SHARDABLE, mesh=make_mesh(context=2))
    tokens = jnp.zeros((2, 64), jnp.int32)
    cache = init_cache(SHARDABLE, 2, 64, jnp.float32)
    at = jnp.broadcast_to(jnp.arange(64), (2, 64))
    jax.eval_shape(lambda model, cache: model.forward(tokens, at, cache), model, cache)
    model = random_model(SHARDABLE)
    with pytest.raises(TypeError, match="not callable"):
        jax.eval_shape(lambda model, cache: model.forward(tokens, at, cache), model, cache)


@pytest.mark.parametrize(("axes", "count"), [({"expert": 2}, 2), ({"data": 2}, 0)])
def test_what_heads_give_is_added_in_bfloat16_where_devices_share_them(axes, count):
    model = random_model(SHARDABLE, dtype=jnp.bfloat16, mesh=make_mesh(**axes))
    tokens = jnp.zeros((2, 8), jnp.int32)
    program = str(jax.make_jaxpr(lambda model, tokens: model(tokens))(model, tokens))
    assert program.count("preferred_element_type=bfloat16") == count


@pytest.mark.parametrize(
    ("kind", "rows", "count"), [("gpu", 17, 2), ("gpu", 16, 0), ("tpu", 17, 0)]
)
def test_what_attention_multiplies_comes_in_bfloat16_on_a_gpu(monkeypatch, kind, rows, count):
    """Of many rows, two products of a layer; the router's, and logits, stay float32."""
    monkeypatch.setattr("gpt_oss_jax.model.attention.platform", lambda: kind)
    model = random_model(SHARDABLE, dtype=jnp.bfloat16)
    program = str(jax.make_jaxpr(model)(jnp.zeros((rows, 8), jnp.int32)))
    count *= SHARDABLE.num_hidden_layers
    assert program.count("preferred_element_type=bfloat16") == count
