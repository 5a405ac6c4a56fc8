"""A whole model as on a TPU: loaded into words, the same logits, and out again byte for byte."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from as_tpu import as_on_a_tpu
from jax.experimental.pallas import tpu as pltpu
from random_model import random_model

from gpt_oss_jax import load, save
from gpt_oss_jax.kernels.attention import mosaic_tpu as attention
from gpt_oss_jax.kernels.expert_matmul import mosaic_tpu as experts
from gpt_oss_jax.model import init_cache
from gpt_oss_jax.parity import compare, values
from gpt_oss_jax.sharding import make_mesh


@pytest.mark.parametrize("form", [None, "folded"])
def test_a_model_in_words_is_the_same_model(tmp_path, caplog, form):
    """One matrix has too many scales to be folded: it is packed, and a line says so."""
    plain = load("tiny")
    scales = plain.layers[1].mlp.up.scales
    scales[...] = scales[...].at[2, 3, 0, 1].set(60)
    save(plain, tmp_path / "plain", format="hf-mxfp4")
    with as_on_a_tpu():
        words = load(tmp_path / "plain", dtype=jnp.float32, expert_form=form)
    matrices = [m for layer in words.layers for m in (layer.mlp.up.matrix, layer.mlp.down.matrix)]
    assert all(m.words_of for m in matrices)
    folded = [m.factors is not None for m in matrices]
    assert folded == [form == "folded" and i != 2 for i in range(len(matrices))]
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in said] == ["layers.1.mlp.up"] * (form == "folded")

    tokens_BT = jnp.asarray([[200006, 1428, 200008, 4827, 382, 220, 17, 659, 220, 17, 30]])
    want = jax.jit(lambda m, t: m(t))(plain, tokens_BT)
    with as_on_a_tpu():
        got = jax.jit(lambda m, t: m(t))(words, tokens_BT)
    np.testing.assert_allclose(got, want, atol=2e-6 * float(jnp.abs(want).max()))

    save(words, tmp_path / "words", format="hf-mxfp4")
    files = sorted(p.name for p in (tmp_path / "plain").iterdir())
    assert any(name.endswith(".safetensors") for name in files)
    for name in files:
        assert (tmp_path / "words" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_form_is_for_the_kernels_that_take_it():
    with pytest.raises(ValueError, match="expert_form='folded' is for the kernels for TPU"):
        load("tiny", expert_form="folded")
    with pytest.raises(ValueError, match="must be None, 'packed' or 'folded', got 'flat'"):
        load("tiny", expert_form="flat")


@pytest.mark.parametrize(("rows", "form"), [(1, "packed"), (3, "folded")])
def test_kernels_run_on_each_device_of_a_mesh(shardable, monkeypatch, rows, form):
    """Few experts are left to a device, to some none of those that were chosen."""
    tokens = jax.random.randint(jax.random.key(rows), (rows, 13), 0, shardable.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(13), tokens.shape)
    run = jax.jit(lambda m, t, p, c: m.forward(t, p, c))
    args = (tokens[:, :12], positions[:, :12]), (tokens[:, 12:], positions[:, 12:])

    def logits(model):
        found, cache = run(model, *args[0], init_cache(shardable, rows, 16, jnp.float32))
        return found, run(model, *args[1], cache)[0]

    def made(mesh=None):
        """Experts of a device have scales, and so factors, of their own."""
        model = random_model(shardable, mesh=mesh)
        for layer in model.layers:
            scales = layer.mlp.down.scales
            scales[...] = scales[...].at[3].add(2)
        return model

    want = logits(made())
    mesh = make_mesh(expert=4)
    model = made(mesh)
    for layer in model.layers:
        assert not layer.mlp.use_words(mesh, form)
        words = layer.mlp.down.blocks[...]
        assert words.sharding.shard_shape(words.shape)[0] == shardable.num_experts // 4
    for module in (attention, experts):
        monkeypatch.setattr(module, "device_kind", lambda: "TPU v5 lite")
    model.implementation = "mosaic_tpu"
    with pltpu.force_tpu_interpret_mode():
        got = logits(model)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))


def test_parity_looks_into_experts_in_words(shardable):
    """One layer of them: half the compiling."""
    config, tokens = dataclasses.replace(shardable, num_hidden_layers=1), np.arange(9)
    arrays = {k: x for stage in values(random_model(config), tokens) for k, x in stage.items()}
    model = random_model(config)
    model.layers[0].mlp.use_words()
    assert compare(model, arrays, tokens).ok
    arrays["layers.0.mlp.out"] = 1.01 * arrays["layers.0.mlp.out"]
    assert compare(model, arrays, tokens).first == "layers.0.mlp.out"
