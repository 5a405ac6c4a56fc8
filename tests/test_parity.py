"""The parity report without PyTorch: planted mistakes are found and named, and nothing else is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import FAULTS
from flax import nnx
from random_model import random_model
from sizes import TINY

from gpt_oss_jax.parity import assert_parity, compare, values

# The clamp binds, so that a wrong one shows.
CONFIG = dataclasses.replace(TINY, num_hidden_layers=2, swiglu_limit=1.0)
TOKENS = np.random.default_rng(1).integers(0, CONFIG.vocab_size, 24)


def copy(model):
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(jnp.array, state))


def arrays_of(model, tokens=TOKENS) -> dict[str, np.ndarray]:
    return {name: x for stage in values(model, tokens) for name, x in stage.items()}


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def reference(model):
    return arrays_of(model)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_named(model, reference, name):
    fault = FAULTS[name]
    with fault.planted(copy(model)) as faulty:
        report = compare(faulty, reference, TOKENS)
    print(report.sentence)
    assert report.first == fault.op
    assert fault.said in report.sentence
