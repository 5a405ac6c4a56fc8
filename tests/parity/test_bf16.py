"""bfloat16, the mode that people run: as close to the float32 reference as PyTorch's own bfloat16.

On random weights bf16 moves the logits visibly, most where a near-tie of the router falls the other
way, so single logits cannot be compared. The Kullback-Leibler divergence from the float32 reference
can, over many tokens: ours must be no larger than that of either PyTorch model in bf16 on the same
tokens, in the mean, which the few rerouted tokens rule, and in the median, which is plain rounding.

No tolerance is added. Ours rounds less often (softmax, router, SwiGLU and all accumulators are
float32), which on these texts leaves its mean ahead by more than three standard errors, estimated
from the paired differences of independent texts: chance does not decide it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gpt_oss_jax.checkpoint import load

TEXTS, LENGTH = 48, 320  # past 256, the last position that bf16 tells from its neighbours
LAYOUTS = ("original", "hf")


def divergence(reference_TV, logits_TV) -> np.ndarray:
    """KL(reference || logits) of each token, in nats."""
    p, q = (jax.nn.log_softmax(np.asarray(x)) for x in (reference_TV, logits_TV))
    return np.asarray((jnp.exp(p) * (p - q)).sum(-1))


@pytest.fixture(scope="module")
def divergences(models):
    """By model, [texts, tokens]: of ours and of each reference in bf16."""
    ours = load(models.folders["hf"], dtype=jnp.bfloat16)
    forward = jax.jit(lambda model, tokens_BT: model(tokens_BT))
    bf16 = {"ours": lambda tokens_T: forward(ours, tokens_T[None])[0]}
    for layout, reference in models.references.items():
        bf16[layout] = type(reference)(models.folders[layout], torch.bfloat16)
    tokens = models.tokens(TEXTS, LENGTH)
    exact = [models.references["original"](tokens_T) for tokens_T in tokens]
    return {
        name: np.stack([divergence(e, model(t)) for e, t in zip(exact, tokens, strict=True)])
        for name, model in bf16.items()
    }


@pytest.mark.parametrize("models", ["window-128"], indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_divergence_is_no_worse(divergences, record, layout):
    ours, theirs = divergences["ours"], divergences[layout]
    ahead = (theirs - ours).mean(axis=1)
    errors = ahead.mean() / (ahead.std(ddof=1) / TEXTS**0.5)
    record(
        "remark",
        f"KL to float32, nats: mean {ours.mean():.1e}, PyTorch's {theirs.mean():.1e} ({errors:.1f} "
        f"standard errors more); median {np.median(ours):.1e}, PyTorch's {np.median(theirs):.1e}",
    )
    assert np.median(ours) <= np.median(theirs)
    assert ours.mean() <= theirs.mean()
