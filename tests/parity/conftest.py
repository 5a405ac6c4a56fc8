"""What the parity tests share: random checkpoints, and every model that reads them, loaded once.

PyTorch, `transformers` and the `gpt-oss` package are required here, not optional: without them
these tests fail. Where they cannot be had, leave the folder out: `pytest --ignore tests/parity`.
After the tests the largest difference that each of them saw is printed.
"""

import collections
import dataclasses
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
import torch

from gpt_oss_jax.checkpoint import load, synthetic
from gpt_oss_jax.config import Config

# The models are too small to share out, and threads that wait for each other spin: with one core
# busy elsewhere the tests would take ten times as long.
torch.set_num_threads(1)

CONFIGS = {"window-7": references.WINDOW_7, "window-128": references.WINDOW_128}
LAYOUTS = {"original": references.Official, "hf": references.HuggingFace}


@dataclasses.dataclass(frozen=True)
class Models:
    """One set of random weights in both layouts; ours and the reference's float32 model of each."""

    config: Config
    folders: dict[str, Path]
    ours: dict
    references: dict

    def tokens(self, *shape: int) -> np.ndarray:
        """Random tokens, always the same ones of a shape."""
        return np.random.default_rng(1).integers(0, self.config.vocab_size, shape, np.int32)


@pytest.fixture(scope="session", params=CONFIGS)
def models(request, tmp_path_factory) -> Models:
    config = CONFIGS[request.param]
    folders = {layout: tmp_path_factory.mktemp(request.param) / layout for layout in LAYOUTS}
    for layout, folder in folders.items():
        synthetic.write(config, folder, layout=layout, seed=0)
    return Models(
        config,
        folders,
        ours={x: load(folder, dtype=jnp.float32) for x, folder in folders.items()},
        references={x: LAYOUTS[x](folder) for x, folder in folders.items()},
    )


@pytest.fixture
def compiles_well():
    """For a text so long that its programs run for longer than they take to compile."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def record(request):
    """Keeps a figure of a test for the summary (`record_property` warns under --junitxml)."""
    return lambda key, value: request.node.user_properties.append((key, value))


@pytest.fixture
def check(record):
    """Fails where ours is further from the reference than `tolerance` times the reference's range.

    Two float32 computations of the same formulas differ by their rounding alone: the two references
    by under 1e-6 of the range (`test_references_agree`). The mildest classic mistake, a rounded
    YaRN ramp, makes 2e-2.
    """

    def check(ours, theirs, tolerance=2e-5):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.shape == theirs.shape
        difference = float(np.abs(ours - theirs).max() / np.ptp(theirs))
        record("difference", difference)
        assert difference < tolerance  # false for NaN, too

    return check


def pytest_terminal_summary(terminalreporter):
    differences, remarks = collections.defaultdict(list), []
    for report in terminalreporter.getreports("passed"):
        test = report.nodeid.split("::")[-1]
        for key, value in report.user_properties:
            if key == "difference":
                differences[test.split("[")[0]].append(value)
            elif key == "remark":
                remarks.append(f"{test}: {value}")
    if differences or remarks:
        terminalreporter.section("largest difference from PyTorch, of the reference's range")
    for test, values in differences.items():
        terminalreporter.line(f"{max(values):.1e}  {test}, {len(values)} comparisons")
    for remark in remarks:
        terminalreporter.line(remark)
