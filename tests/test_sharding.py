"""One device and a mesh of eight give the same logits; what a mesh cannot be is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from random_model import random_model

from gpt_oss_jax.model import Transformer, init_cache
from gpt_oss_jax.sharding import make_mesh, named_sharding

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]


run = jax.jit(lambda m, t, c: m.forward(t, jnp.broadcast_to(jnp.arange(13), t.shape), c))
step = jax.jit(lambda m, t, p, c: m.forward(t, p, c)[0])


@pytest.mark.parametrize(("data", "expert", "tensor"), MESHES)
def test_a_mesh_gives_the_logits_of_one_device(shardable, data, expert, tensor):
    mesh = make_mesh(data=data, expert=expert, tensor=tensor)
    model = random_model(shardable)
    tokens = jax.random.randint(jax.random.key(0), (8, 13), 0, shardable.vocab_size)
    batch = named_sharding(mesh, ("batch", None), tokens.shape)
    want, plain_cache = run(model, tokens, init_cache(shardable, 8, 16, jnp.float32))

    m = random_model(shardable, mesh=mesh)
    up = m.layers[0].mlp.up.blocks[...]
    assert up.sharding.shard_shape(up.shape)[:2] == (8 // expert, 320 // tensor)
    got, cache = run(m, jax.device_put(tokens, batch), init_cache(shardable, 8, 16, jnp.float32))
    np.testing.assert_allclose(got, want, atol=2e-6 * float(want.max() - want.min()))
    # A decoding step on the sharded cache, the path with few rows.
    position = jnp.full((8, 1), 13, jnp.int32)
    np.testing.assert_allclose(
        step(m, tokens[:, :1], position, cache),
        step(model, tokens[:, :1], position, plain_cache),
        atol=2e-6 * float(want.max() - want.min()),
    )


def test_axes_that_do_not_divide_are_replicated():
    mesh = make_mesh(tensor=4)
    sharding = named_sharding(mesh, ("experts", "embed", "expert_width_blocks"), (8, 96, 90))
    assert sharding.spec == PartitionSpec("expert", None, None)
    sharding = named_sharding(mesh, ("experts", "embed", "expert_width_blocks"), (8, 96, 12))
    assert sharding.spec == PartitionSpec("expert", None, "tensor")


def test_every_weight_names_its_axes(shardable):
    abstract = nnx.eval_shape(lambda: Transformer(shardable, rngs=nnx.Rngs(0)))
    mesh = make_mesh()
    for _, variable in nnx.to_flat_state(nnx.state(abstract)):
        named_sharding(mesh, variable.axes, variable.shape)


def test_too_few_devices_are_refused():
    with pytest.raises(ValueError, match="needs 16 devices, got 8"):
        make_mesh(data=16)


def test_explicit_axes_are_refused():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(ValueError, match="Auto axes"):
        named_sharding(mesh, ("batch",))


def test_a_mesh_of_other_axes_is_refused():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="must have some of the axes data, expert, tensor"):
        named_sharding(mesh, ("batch",))


def test_unknown_axis_is_refused():
    with pytest.raises(ValueError, match="got 'width'"):
        named_sharding(make_mesh(), ("width",))
