"""Every intermediate of the forward pass, by its `capture=` name, against both references.

One text of 150 tokens, past both windows. Every op is given the reference's inputs, so that a
difference shows in the op that makes it and not in those after it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_oss_jax.checkpoint import open_source
from gpt_oss_jax.parity import assert_parity, pytorch

LENGTH = 150
# What each keeps to itself.
HIDDEN = {
    "official": {"mlp.out"},
    "hf": {"attention.q_rope", "attention.k_rope"},
}
OPS = (
    *("attention_norm", "attention.q", "attention.k", "attention.v", "attention.q_rope"),
    *("attention.k_rope", "attention.heads", "attention.out", "middle", "mlp_norm"),
    *("mlp.router_logits", "mlp.expert_weights", "mlp.out", "output"),
)


@pytest.mark.parametrize("name", HIDDEN)
def test_every_op(models, record, name):
    source = open_source(models.folders["original" if name == "official" else name])
    report = assert_parity(
        models.ours["hf"], pytorch.reference(name, source), models.tokens(LENGTH)
    )
    record("difference", max(op.judged.relative for op in report.ops))
    assert [op.name for op in report.ops] == [
        "embedding",
        *(
            f"layers.{i}.{op}"
            for i in range(models.config.num_hidden_layers)
            for op in OPS
            if op not in HIDDEN[name]
        ),
        *("final_norm", "logits"),
    ]
    assert all(op.local is not None for op in report.ops[1:])
    assert all(not layer.own and not layer.local for layer in report.routing)


def test_attention_scores(models, check):
    """Scores are captured before the softmax; the reference has them after it, without the sink."""
    tokens_T = models.tokens(LENGTH)
    run = jax.jit(lambda m, tokens: m.forward(tokens, capture="layers.*.attention.scores")[-1])
    ours = run(models.ours["hf"], jnp.asarray(tokens_T)[None])
    theirs = models.references["hf"].attention_weights(tokens_T)
    for i, layer in enumerate(models.ours["hf"].layers):
        scores_NTT = ours[f"layers.{i}.attention.scores"].reshape(-1, LENGTH, LENGTH)
        sinks_N11 = np.reshape(layer.attention.sinks, (-1, 1, 1))
        sinks_NT1 = np.broadcast_to(sinks_N11, (len(scores_NTT), LENGTH, 1))
        weights = jax.nn.softmax(np.concatenate([scores_NTT, sinks_NT1], -1))[..., :-1]
        check(weights, theirs[i])
