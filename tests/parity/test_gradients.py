"""Gradients in float32 against Hugging Face's autograd: embedding, sinks, router, qkv and the rest.

The loss is the cross-entropy of two texts. The packed experts are not trainable and have none.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

TOLERANCE = 1e-4  # of a gradient's largest element


def loss(model, tokens_BT):
    logprobs = jax.nn.log_softmax(model(tokens_BT[:, :-1]))
    return -jnp.take_along_axis(logprobs, tokens_BT[:, 1:, None], -1).mean()


@pytest.fixture(scope="module")
def gradients(models):
    """Ours, by path, and Hugging Face's, by name."""
    tokens_BT = models.tokens(2, 60)
    ours = jax.jit(nnx.grad(loss))(models.ours["hf"], tokens_BT)
    ours = {"/".join(map(str, path)): np.asarray(x[...]) for path, x in nnx.to_flat_state(ours)}
    model = models.references["hf"].model
    tokens = torch.from_numpy(tokens_BT).long()
    logits = model(tokens[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    theirs = {name: x.grad.numpy().copy() for name, x in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return ours, theirs


@pytest.fixture
def compare(record):
    def compare(ours, theirs):
        difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        record("difference", difference)
        assert difference < TOLERANCE

    return compare


@pytest.mark.parametrize(
    "path, name",
    {
        "embedding/weight": "model.embed_tokens.weight",
        "layers/*/attention_norm/scale": "model.layers.*.input_layernorm.weight",
        "layers/*/attention/sinks": "model.layers.*.self_attn.sinks",
        "layers/*/attention/out/weight": "model.layers.*.self_attn.o_proj.weight",
        "layers/*/attention/out/bias": "model.layers.*.self_attn.o_proj.bias",
        "layers/*/mlp_norm/scale": "model.layers.*.post_attention_layernorm.weight",
        "layers/*/mlp/router/weight": "model.layers.*.mlp.router.weight",
        "layers/*/mlp/router/bias": "model.layers.*.mlp.router.bias",
        "layers/*/mlp/up/bias": "model.layers.*.mlp.experts.gate_up_proj_bias",
        "layers/*/mlp/down/bias": "model.layers.*.mlp.experts.down_proj_bias",
        "norm/scale": "model.norm.weight",
        "unembedding/weight": "lm_head.weight",
    }.items(),
)
def test_gradient(models, gradients, compare, path, name):
    ours, theirs = gradients
    for i in range(models.config.num_hidden_layers if "*" in path else 1):
        reference = theirs[name.replace("*", str(i))]
        compare(ours[path.replace("*", str(i))].reshape(reference.shape), reference)


@pytest.mark.parametrize("leaf", ("weight", "bias"))
def test_gradient_of_qkv(models, gradients, compare, leaf):
    """Ours holds, for each kv head, its query heads, its key and its value one after another."""
    ours, theirs = gradients
    config = models.config
    for i in range(config.num_hidden_layers):
        grouped = ours[f"layers/{i}/attention/qkv/{leaf}"]
        for name, heads in {"q": slice(0, -2), "k": slice(-2, -1), "v": slice(-1, None)}.items():
            reference = theirs[f"model.layers.{i}.self_attn.{name}_proj.{leaf}"]
            compare(grouped[:, heads].reshape(reference.shape), reference)
