"""The parity report against both PyTorch implementations, streamed a block at a time.

On the unmodified model nothing is reported, at any length; in bf16 its verdict is that of the
divergence over many prompts; and the golden files are what PyTorch computes today.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import references
import torch
from faults import FAULTS
from golden_files import GOLDEN_FILES
from sizes import TINY

from gpt_oss_jax.checkpoint import load, open_source, synthetic
from gpt_oss_jax.parity import Recorder, Streamed, assert_parity, compare, golden, pytorch

NAMES = {"original": "official", "hf": "hf"}
LENGTHS = {"window-7": (1, 6, 7, 8, 300), "window-128": (1, 127, 128, 129, 4097)}
PROMPTS, LENGTH = 64, 40


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize(
    ("models", "length"),
    [(name, length) for name, lengths in LENGTHS.items() for length in lengths],
    indirect=["models"],
)
def test_nothing_is_reported_on_the_unmodified_model(models, record, layout, length):
    source = open_source(models.folders[layout])
    reference = pytorch.reference(NAMES[layout], source)
    report = assert_parity(Streamed(source), reference, models.tokens(length))
    worst = max(report.ops, key=lambda op: op.judged.excess_T.max())
    record(
        "remark",
        f"{worst.name} is nearest to its tolerance, {worst.judged.excess_T.max():.2f} of it; "
        f"largest divergence {report.predictions.kl_T.max():.1e} nats",
    )


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("models", ["window-128"], indirect=True)
def test_streamed_references_are_the_whole_ones(models, layout):
    """Blocks that are driven one by one compute what the whole model does, to the last bits."""
    tokens_T = models.tokens(150)
    whole = models.references[layout](tokens_T)
    *_, end = pytorch.reference(NAMES[layout], open_source(models.folders[layout]))(tokens_T)
    np.testing.assert_allclose(end["logits"], whole, atol=1e-5)


@pytest.mark.parametrize("file", GOLDEN_FILES, ids=lambda file: file.path.stem)
def test_golden_files_are_what_pytorch_computes(file, tmp_path):
    kept = golden.load(file.path)
    source = open_source(synthetic.write(file.config, tmp_path / "checkpoint"))
    recorder = Recorder(pytorch.reference(file.reference, source))
    for _ in recorder(kept.tokens_T):
        pass
    now = recorder.golden(kept.provenance)
    assert now.values.keys() == kept.values.keys()
    for name, x in now.values.items():
        np.testing.assert_allclose(x.values, kept.values[name].values, atol=1e-5, rtol=1e-5)
    assert golden.fingerprint(source) == kept.provenance["checkpoint"]


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    config = dataclasses.replace(TINY, num_hidden_layers=2)
    folder = synthetic.write(config, tmp_path_factory.mktemp("bf16") / "checkpoint")
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, (PROMPTS, LENGTH), np.int32)
    reference = pytorch.reference("hf", open_source(folder))
    exact = [{k: v for stage in reference(t) for k, v in stage.items()} for t in tokens]
    theirs = references.HuggingFace(folder, torch.bfloat16)
    kl = np.array([divergence(e["logits"], theirs(t)) for e, t in zip(exact, tokens, strict=True)])
    return folder, tokens, exact, kl


def divergence(reference_TV, logits_TV) -> float:
    """KL(reference || logits), nats, mean of a prompt."""
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (reference_TV, logits_TV))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("fault", [None, "window off by one", "rounded ramp", "nibbles swapped"])
def test_in_bf16_the_verdict_is_that_of_the_divergence(two_layers, record, fault):
    """Whether ours is further from the float32 reference, over 64 prompts, than PyTorch's bf16."""
    folder, tokens, exact, theirs = two_layers
    model = load(folder, dtype=jnp.bfloat16)
    if fault is not None:
        FAULTS[fault].weights(model)
    reports = [compare(model, e, t) for e, t in zip(exact, tokens, strict=True)]
    kl = np.array([report.predictions.kl_T.mean() for report in reports])
    found = sum(not report.ok for report in reports)
    # Standard errors by which ours is behind.
    behind = (kl - theirs).mean() / ((kl - theirs).std(ddof=1) / PROMPTS**0.5)
    record(
        "remark",
        f"{found} of {PROMPTS} prompts reported; KL {kl.mean():.1e} nats, PyTorch's bf16 "
        f"{theirs.mean():.1e}, {behind:.1f} standard errors",
    )
    if fault is None:
        assert found == 0 and behind < 3
    else:
        assert found == PROMPTS and behind > 3
        assert {report.first for report in reports} == {FAULTS[fault].op}
