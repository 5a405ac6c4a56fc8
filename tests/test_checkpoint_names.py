"""The name table, against the released checkpoints' own index and against plain slices."""

import hashlib
import json
import math

import numpy as np
import pytest
from checkpoint_oracle import ours_from_hf
from sizes import TINY

from gpt_oss_jax.checkpoint import names, writer
from gpt_oss_jax.config import GPT_OSS_20B, GPT_OSS_120B
from gpt_oss_jax.model import Transformer


def _stored(config, layout, experts="mxfp4"):
    return {
        name: shape
        for variable in names.variables(config, experts)
        for name, shape in names.stored_tensors(variable, layout).items()
    }


def test_names_are_those_of_the_released_index():
    found = "\n".join(sorted(_stored(GPT_OSS_20B, "hf")))
    # SHA-256 of the 459 names in openai/gpt-oss-20b's model.safetensors.index.json, sorted.
    want = "44d356658b1b19b7f101d0d35148bea68c5065601582ab859b90801e7a2c92c4"
    assert hashlib.sha256(found.encode()).hexdigest() == want


def test_original_names_and_dtypes_are_those_of_the_released_file():
    dtypes = json.loads(writer.config_files(GPT_OSS_20B, "original")["dtypes.json"])
    found = "\n".join(f"{name} {dtype}" for name, dtype in sorted(dtypes.items()))
    # Likewise of the 363 entries of openai/gpt-oss-20b's original/dtypes.json.
    want = "2783a397de14394295eb017f93578dcc679a3f38cab73a1d29ef36db5e3b244b"
    assert hashlib.sha256(found.encode()).hexdigest() == want
    assert dtypes.keys() == _stored(GPT_OSS_20B, "original").keys()


@pytest.mark.parametrize(
    "config, hf, original, nbytes",
    [(GPT_OSS_20B, 459, 363, 13_761_264_768), (GPT_OSS_120B, 687, 543, 65_248_815_744)],
)
def test_counts_and_bytes_are_those_of_the_released_models(config, hf, original, nbytes):
    assert len(_stored(config, "hf")) == hf
    assert len(_stored(config, "original")) == original
    assert sum(x.nbytes for x in names.variables(config)) == nbytes
    size = lambda name: 1 if name.endswith(("blocks", "scales")) else 2
    for layout in names.LAYOUTS:
        tensors = _stored(config, layout)
        assert sum(size(name) * math.prod(shape) for name, shape in tensors.items()) == nbytes


def test_shapes_of_a_layer():
    V, D, F, E, N, K, H = 101, 96, 160, 11, 15, 3, 14
    hf, original = _stored(TINY, "hf"), _stored(TINY, "original")
    dense = _stored(TINY, "hf", "dense")
    layer = "model.layers.3."
    assert hf["lm_head.weight"] == original["unembedding.weight"] == (V, D)
    assert hf[layer + "self_attn.q_proj.weight"] == (N * H, D)
    assert hf[layer + "self_attn.v_proj.weight"] == (K * H, D)
    assert hf[layer + "self_attn.k_proj.bias"] == (K * H,)
    assert hf[layer + "self_attn.o_proj.weight"] == (D, N * H)
    assert hf[layer + "self_attn.sinks"] == (N,)
    assert hf[layer + "mlp.router.weight"] == (E, D)
    assert hf[layer + "mlp.experts.gate_up_proj_blocks"] == (E, 2 * F, D // 32, 16)
    assert hf[layer + "mlp.experts.gate_up_proj_bias"] == (E, 2 * F)
    assert hf[layer + "mlp.experts.down_proj_scales"] == (E, D, F // 32)
    assert hf[layer + "mlp.experts.down_proj_bias"] == (E, D)
    assert dense[layer + "mlp.experts.gate_up_proj"] == (E, D, 2 * F)
    assert dense[layer + "mlp.experts.down_proj"] == (E, F, D)
    assert original["block.3.attn.qkv.weight"] == ((N + 2 * K) * H, D)
    assert original["block.3.attn.qkv.bias"] == ((N + 2 * K) * H,)
    assert original["block.3.mlp.mlp2_weight.blocks"] == (E, D, F // 32, 16)


@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
def test_stored_and_back_is_the_identity(experts):
    rng = np.random.default_rng(0)
    tensors, ours = {}, {}
    for variable in names.variables(TINY, experts):
        bits = rng.integers(0, 256, (*variable.shape, variable.dtype.itemsize), np.uint8)
        ours[variable.path] = bits.view(variable.dtype)[..., 0]
        tensors |= names.to_stored(variable, "hf", ours[variable.path])
    found = ours_from_hf(tensors, TINY)
    assert found.keys() == ours.keys()
    for path in ours:
        assert found[path].tobytes() == ours[path].tobytes(), path


def test_original_stacks_queries_keys_and_values():
    for kind in ("weight", "bias"):
        variable = next(
            x for x in names.variables(TINY) if x.path == f"layers/2/attention/qkv/{kind}"
        )
        ours = np.arange(math.prod(variable.shape)).reshape(variable.shape)
        hf = names.to_stored(variable, "hf", ours)
        stacked = np.concatenate(
            [hf[f"model.layers.2.self_attn.{x}_proj.{kind}"] for x in ("q", "k", "v")]
        )
        (qkv,) = names.to_stored(variable, "original", ours).values()
        np.testing.assert_array_equal(qkv, stacked)


@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
def test_table_and_model_hold_the_same_variables(experts):
    import jax.numpy as jnp
    from flax import nnx

    model = nnx.eval_shape(
        lambda: Transformer(TINY, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, experts=experts)
    )
    state = nnx.to_flat_state(nnx.state(model))
    found = {"/".join(map(str, path)): (x.shape, x.dtype) for path, x in state}
    assert found == {x.path: (x.shape, x.dtype) for x in names.variables(TINY, experts)}


def test_refuses_other_experts_and_other_shapes():
    with pytest.raises(ValueError, match="experts must be one of mxfp4, dense"):
        names.variables(TINY, "int8")
    with pytest.raises(ValueError, match=r"embedding/weight must have shape \(101, 96\)"):
        names.to_stored(names.variables(TINY)[0], "hf", np.zeros((96, 101)))
