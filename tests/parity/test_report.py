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
from gpt_oss_jax.parity.predictions import predictions

NAMES = {"original": "official", "hf": "hf"}
LENGTHS = {"window-7": (1, 7, 8, 300), "window-128": (1, 127, 128, 129, 4097)}
ROTATED = tuple(f".attention.{x}" for x in ("q", "k", "q_rope", "k_rope"))
PROMPTS, LENGTH = 32, 100


def both(source):
    """The two references as one, transformers' with the rotations that it keeps to itself."""

    def stages(tokens_T):
        references = (pytorch.reference(name, source)(tokens_T) for name in NAMES.values())
        for official, hf in zip(*references, strict=True):
            yield hf | {k: v for k, v in official.items() if k.endswith(ROTATED)}

    return stages


@pytest.mark.parametrize(
    ("models", "length"),
    [(name, length) for name, lengths in LENGTHS.items() for length in lengths],
    indirect=["models"],
)
def test_nothing_is_reported_on_the_unmodified_model(models, record, request, length):
    if length > 1000:
        request.getfixturevalue("compiles_well")
    source = open_source(models.folders["hf"])
    report = assert_parity(Streamed(source), both(source), models.tokens(length))
    assert {op.name for op in report.ops} >= {f"layers.1{name}" for name in ROTATED}
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
def prompts(tmp_path_factory):
    """A checkpoint, texts, the reference's values of each, and KL of the right models in bf16."""
    config = dataclasses.replace(TINY, num_hidden_layers=2)
    folder = synthetic.write(config, tmp_path_factory.mktemp("bf16") / "checkpoint")
    tokens = np.random.default_rng(3).integers(0, config.vocab_size, (PROMPTS, LENGTH), np.int32)
    reference = both(open_source(folder))
    exact = [{k: v for stage in reference(t) for k, v in stage.items()} for t in tokens]
    theirs = references.HuggingFace(folder, torch.bfloat16)
    found = [predictions(theirs(t), e["logits"], t) for e, t in zip(exact, tokens, strict=True)]
    right = [
        compare(load(folder, dtype=jnp.bfloat16), e, t) for e, t in zip(exact, tokens, strict=True)
    ]
    return folder, tokens, exact, right, np.array([x.kl_T.mean() for x in found])


def divergences(reports) -> np.ndarray:
    return np.array([report.predictions.kl_T.mean() for report in reports])


def further(ours, other) -> float:
    """Standard errors by which ours is further away, from paired differences of the prompts."""
    return (ours - other).mean() / ((ours - other).std(ddof=1) / PROMPTS**0.5)


def test_in_bf16_nothing_is_reported(prompts, record):
    """Nor is ours further from the float32 reference than PyTorch's bf16, over 32 prompts."""
    *_, right, theirs = prompts
    ours = divergences(right)
    record(
        "remark",
        f"KL {ours.mean():.1e} nats, PyTorch in bf16 {theirs.mean():.1e}, "
        f"{further(ours, theirs):.1f} standard errors",
    )
    assert all(report.ok for report in right)
    assert further(ours, theirs) < 2


@pytest.mark.parametrize("fault", ("window off by one", "rounded ramp", "nibbles swapped"))
def test_in_bf16_a_fault_is_reported(prompts, record, fault):
    """In each of 32 prompts; over all, it is further from the reference than the right model."""
    folder, tokens, exact, right, _ = prompts
    model = load(folder, dtype=jnp.bfloat16)
    FAULTS[fault].weights(model)
    reports = [compare(model, e, t) for e, t in zip(exact, tokens, strict=True)]
    ours = divergences(reports)
    behind = further(ours, divergences(right))
    record(
        "remark",
        f"KL {ours.mean():.1e} nats, the right model {divergences(right).mean():.1e}, "
        f"{behind:.1f} standard errors",
    )
    assert {report.first for report in reports} == {FAULTS[fault].op}
    assert behind > 4
