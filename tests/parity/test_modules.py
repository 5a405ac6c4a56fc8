"""Every intermediate of the forward pass, by its `capture=` name, against both references.

One text of 150 tokens, past both windows. Every block is given the reference's input (`patch=`), so
that a difference shows in the block that makes it and not in those after it. Shapes are flattened
to [T, features]: the order of heads is part of what is compared.
"""

import jax
import numpy as np
import pytest

LENGTH = 150
LAYER_OPS = {
    "original": (
        *("attention_norm", "attention.q", "attention.k", "attention.v"),
        *("attention.q_rope", "attention.k_rope", "attention.out", "middle"),
        *("mlp_norm", "mlp.router_logits", "output"),
    ),
    "hf": (
        *("attention_norm", "attention.q", "attention.k", "attention.v", "attention.out"),
        *("middle", "mlp_norm", "mlp.router_logits", "mlp.expert_weights", "mlp.out", "output"),
    ),
}


@pytest.fixture(scope="module")
def captured(models):
    """Ours and, by layout, the reference's: name -> [T, features]."""
    tokens_T = models.tokens(LENGTH)
    theirs = {x: model.captured(tokens_T) for x, model in models.references.items()}
    inputs = {name: x[None] for name, x in theirs["hf"].items() if name.endswith(".input")}
    run = jax.jit(lambda model, tokens, patch: model.forward(tokens, capture="*", patch=patch)[-1])
    ours = run(models.ours["hf"], tokens_T[None], inputs)
    return {name: np.asarray(x[0]).reshape(LENGTH, -1) for name, x in ours.items()}, theirs


@pytest.mark.parametrize("layout, op", [(x, op) for x, ops in LAYER_OPS.items() for op in ops])
def test_layers(models, captured, check, layout, op):
    ours, theirs = captured
    for i in range(models.config.num_hidden_layers):
        name = f"layers.{i}.{op}"
        check(ours[name], theirs[layout][name])


@pytest.mark.parametrize("layout", LAYER_OPS)
@pytest.mark.parametrize("name", ("embedding", "final_norm", "logits"))
def test_ends(captured, check, layout, name):
    ours, theirs = captured
    check(ours[name], theirs[layout][name])


def test_chosen_experts(models, captured):
    ours, theirs = captured
    for i in range(models.config.num_hidden_layers):
        name = f"layers.{i}.mlp.experts"
        np.testing.assert_array_equal(ours[name], theirs["hf"][name])


def test_attention_scores(models, captured, check):
    """Scores are captured before the softmax; the reference has them after it, without the sink."""
    ours, theirs = captured
    for i, layer in enumerate(models.ours["hf"].layers):
        scores_NTT = ours[f"layers.{i}.attention.scores"].reshape(-1, LENGTH, LENGTH)
        sinks_N11 = np.reshape(layer.attention.sinks, (-1, 1, 1))
        sinks_NT1 = np.broadcast_to(sinks_N11, (len(scores_NTT), LENGTH, 1))
        weights = jax.nn.softmax(np.concatenate([scores_NTT, sinks_NT1], -1))[..., :-1]
        check(weights.reshape(len(weights), -1), theirs["hf"][f"layers.{i}.attention.weights"])
