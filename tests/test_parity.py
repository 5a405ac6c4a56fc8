"""The parity report without PyTorch: planted mistakes are found and named, and nothing else is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import FAULTS, Fault
from flax import nnx
from random_model import random_model
from sizes import TINY

from gpt_oss_jax.checkpoint import load, loading, open_source, synthetic
from gpt_oss_jax.model import rope
from gpt_oss_jax.parity import Recorder, Streamed, assert_parity, compare, ours, values
from gpt_oss_jax.parity.ops import LAYER

# The clamp binds, so that a wrong one shows.
CONFIG = dataclasses.replace(TINY, num_hidden_layers=2, swiglu_limit=1.0)
TOKENS = np.random.default_rng(1).integers(0, CONFIG.vocab_size, 24)


def copy(model):
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(jnp.array, state))


def arrays_of(model, tokens=TOKENS) -> dict[str, np.ndarray]:
    return {name: x for stage in values(model, tokens) for name, x in stage.items()}


def recorded_of(model):
    """A golden file's content."""
    recorder = Recorder(lambda tokens: values(model, tokens))
    for _ in recorder(TOKENS.astype(np.int32)):
        pass
    return recorder.golden({"config": dataclasses.asdict(model.config)})


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def reference(model):
    return arrays_of(model)


@pytest.fixture(scope="module")
def one_layer():
    """Half the compiling: a model, its values, and a golden file of them."""
    model = random_model(dataclasses.replace(CONFIG, num_hidden_layers=1))
    return model, arrays_of(model), recorded_of(model)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_named(one_layer, name):
    """By whole arrays, and by the samples of a golden file."""
    fault, (model, reference, recorded) = FAULTS[name], one_layer
    with fault.planted(copy(model)) as faulty:
        report = compare(faulty, reference, TOKENS)
        if faulty.config == model.config:
            sampled = compare(faulty, recorded)
            assert sampled.first == fault.op
            assert fault.said in sampled.sentence
    assert report.first == fault.op
    assert fault.said in report.sentence


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("window off by one", "a window of 8 keys, not 7"),
        ("no plus one", "no one added to the linear part"),
        ("nibbles swapped", "the nibbles of each byte swapped"),
        ("softmax before top-k", "the softmax over all experts"),
    ],
)
def test_a_fault_of_the_reference_is_said_to_be_its_own(one_layer, name, said):
    fault, (model, _, _) = FAULTS[name], one_layer
    with fault.planted(copy(model)) as faulty:
        reference = arrays_of(faulty)
    report = compare(model, reference, TOKENS)
    assert report.first == fault.op
    assert f"the reference is what the formula gives with {said}" in report.sentence


def test_experts_shuffled_for_hopper_are_judged_by_the_same_formula(one_layer):
    fault, (model, _, _) = FAULTS["no plus one"], one_layer
    with fault.planted(copy(model)) as faulty:
        reference = arrays_of(faulty)
    shuffled = copy(model)
    for projection in (shuffled.layers[0].mlp.up, shuffled.layers[0].mlp.down):
        projection.blocks[...] = projection.matrix.shuffle().blocks
        projection.shuffled = True
    report = compare(shuffled, reference, TOKENS)
    assert f"the formula gives with {fault.said}" in report.sentence


def test_a_constant_that_is_a_little_off_is_no_known_trap(one_layer):
    model, reference, recorded = one_layer
    model = copy(model)
    sinks = model.layers[0].attention.sinks
    sinks[...] *= 1.01
    for right in (reference, recorded):
        report = compare(model, right, TOKENS)
        assert report.first == "layers.0.attention.heads"
        assert "Likely cause" not in report.sentence


def test_sharp_attention_in_bfloat16_is_no_fault(tmp_path):
    """Its scores are off by more than 1: rounding may choose another key."""
    folder = synthetic.write(dataclasses.replace(CONFIG, num_hidden_layers=1), tmp_path / "x")
    found = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model = load(folder, dtype=dtype)
        weight = model.layers[0].attention.qkv.weight
        weight[...] = weight[...].at[:, :-1].multiply(16)
        found[dtype] = model
    reference = arrays_of(found[jnp.float32])
    report = assert_parity(found[jnp.bfloat16], reference, TOKENS)
    assert "cannot be judged" in report.sentence and "inf" in report.table()
    reference["layers.0.attention.heads"][3] = np.nan
    assert compare(found[jnp.bfloat16], reference, TOKENS).first == "layers.0.attention.heads"


def test_one_transposed_expert_is_found_and_named(tmp_path):
    """It must be as wide as the model to pass every check of shapes."""
    square = dataclasses.replace(CONFIG, intermediate_size=CONFIG.hidden_size)
    folder = synthetic.write(square, tmp_path / "dense", experts="dense")
    model = load(folder, dtype=jnp.float32)
    reference = arrays_of(model)
    weight = model.layers[1].mlp.down.weight
    weight[...] = weight[...].at[3].set(weight[3].T)
    report = compare(model, reference, TOKENS)
    assert report.first == "layers.1.mlp.out"
    assert "the down matrix of expert 3 transposed" in report.sentence
    assert all(op.judged.ok for op in report.ops if not op.name.startswith("layers.1.mlp.out"))


def test_nothing_is_found_where_nothing_is_wrong(model, reference):
    other_order = {name: x[None] for name, x in reversed(reference.items())}
    ascending = dict(reference)
    for name in ("mlp.experts", "mlp.expert_weights"):
        ascending |= {
            f"layers.{i}.{name}": reference[f"layers.{i}.{name}"][:, ::-1] for i in (0, 1)
        }
    for right in (reference, other_order, ascending, recorded_of(model)):
        report = assert_parity(model, right, TOKENS)
        assert all(op.judged.largest == 0 for op in report.ops)
        assert report.predictions.kl_T.max() < 1e-12 and report.predictions.top1_T.all()


def test_few_arrays_are_compared_too(model, reference):
    """Without an op's inputs, it is judged by ours from the last known value on."""
    names = ("layers.0.output", "layers.1.attention.out", "logits")
    report = assert_parity(model, {name: reference[name] for name in names}, TOKENS)
    assert [op.name for op in report.ops] == list(names)
    assert [op.local is not None for op in report.ops] == [False, True, False]
    wrong = reference["layers.1.attention.out"].copy()
    wrong[5, 7] += 1e-3
    report = compare(model, {"layers.1.attention.out": wrong}, TOKENS)
    assert (report.first, report.ops[0].judged.worst) == ("layers.1.attention.out", 5)
    with pytest.raises(AssertionError, match="layers.1.attention.out, at position 5"):
        assert_parity(model, {"layers.1.attention.out": wrong}, TOKENS)


def test_no_tolerance_grows_with_the_mistake(model, reference):
    """Rotated queries a million times too large, of a reference that does not show them."""
    hidden = {k: x for k, x in reference.items() if not k.endswith("_rope")}
    large = Fault("", "", code=(rope, "concentration", lambda config: 1e6))
    with large.planted(copy(model)) as faulty:
        report = compare(faulty, hidden, TOKENS)
    assert report.first == "layers.0.attention.heads"


def test_attention_scores(model, reference):
    """In the shape that most write them, [heads, T, S], masked by any large negative number."""
    name = "layers.1.attention.scores"
    run = jax.jit(lambda model, tokens: model.forward(tokens, capture=name)[2])
    scores_NTS = np.asarray(run(model, TOKENS[None])[name]).reshape(-1, 24, 24)
    large = np.where(np.isinf(scores_NTS), np.finfo(np.float32).min, scores_NTS)
    assert_parity(model, reference | {name: large}, TOKENS)
    assert compare(model, reference | {name: np.roll(large, 1, 0)}, TOKENS).first == name


def test_what_is_not_a_number_is_over(model, reference):
    broken = reference["layers.1.mlp_norm"].copy()
    broken[3, 4] = np.nan
    report = compare(model, reference | {"layers.1.mlp_norm": broken}, TOKENS)
    assert (report.first, report.ops[0].judged.ok) == ("layers.1.mlp_norm", True)


def test_rows_of_zeros_are_no_divergence_unless_one_side_has_them(model):
    """Rotation is allowed nothing there."""
    model = copy(model)
    for layer in model.layers:
        for variable in (layer.attention.qkv.weight, layer.attention.qkv.bias):
            variable[...] = jnp.zeros_like(variable[...])
    reference = arrays_of(model)
    assert_parity(model, reference, TOKENS)
    name = "layers.1.attention.k_rope"
    assert compare(model, reference | {name: reference[name] + 1e-3}, TOKENS).first == name


def test_logits_masked_by_minus_infinity_have_a_divergence(model, reference):
    """Some write that for ids that are no tokens; warnings are errors here."""
    masked = np.where(np.arange(CONFIG.vocab_size) == 100, -np.inf, reference["logits"])
    report = compare(model, {"logits": masked}, TOKENS)
    assert report.first == "logits"
    assert np.isfinite(report.predictions.kl_T).all() and report.predictions.kl_T.max() > 1e-4
    masked[:, 100] = np.inf
    assert np.isnan(compare(model, {"logits": masked}, TOKENS).predictions.kl_T).all()


def test_logits_in_bfloat16_are_named(model, reference):
    coarse = {"logits": np.asarray(reference["logits"].astype(jnp.bfloat16), np.float32)}
    said = "the reference computes this in bfloat16"
    assert said in compare(model, coarse, TOKENS).sentence


def test_a_flip_that_rounding_explains_is_allowed(model):
    """Two experts that the router cannot tell apart; the reference chooses the other one."""
    model = copy(model)
    router = model.layers[0].mlp.router
    first = int(np.asarray(router.bias[...]).argmax())
    twin = (first + 1) % CONFIG.num_experts
    router.weight[...] = router.weight[...].at[twin].set(router.weight[first])
    router.bias[...] = router.bias[...].at[twin].set(router.bias[first])
    name = "layers.0.mlp.experts"
    experts = arrays_of(model)[name]
    alone = np.isin(experts, (first, twin)).sum(1) == 1
    other = np.where(experts == first, twin, np.where(experts == twin, first, experts))
    choice = jnp.asarray(np.where(alone[:, None], other, experts))[None]
    capture = [f"layers.{i}.{op.name}" for i in range(2) for op in LAYER if "scores" not in op.name]
    run = jax.jit(lambda m, tokens, patch: m.forward(tokens, capture=capture, patch=patch)[2])
    seen = run(model, TOKENS[None], {name: choice})
    report = assert_parity(model, dict(seen) | {name: choice}, TOKENS)
    assert alone.any()
    assert [flip.position for flip in report.routing[0].own] == list(np.flatnonzero(alone))
    assert not report.ops[-1].own.judged_T[np.flatnonzero(alone)[0] :].any()


def test_a_flip_that_rounding_does_not_explain_is_named(model, reference):
    name = "layers.0.mlp.experts"
    experts, logits = reference[name].copy(), reference["layers.0.mlp.router_logits"]
    experts[4, -1] = logits[4].argmin()
    report = compare(model, reference | {name: experts}, TOKENS)
    assert report.first == name and "at position 4" in report.sentence
    assert report.routing[0].agreement == 1 - 1 / 24


def test_streamed_is_the_model(tmp_path):
    folder = synthetic.write(CONFIG, tmp_path / "checkpoint")
    whole = arrays_of(load(folder, dtype=jnp.float32))
    report = assert_parity(Streamed(open_source(folder)), whole, TOKENS)
    assert all(op.own.largest == 0 for op in report.ops)


def test_streamed_experts_lie_as_load_puts_them(tmp_path, monkeypatch):
    folder = synthetic.write(CONFIG, tmp_path / "checkpoint")
    for module in (loading, ours):
        monkeypatch.setattr(module, "shuffles", lambda *_: True)
    streamed = Streamed(open_source(folder), jnp.bfloat16).layers[1].mlp
    loaded = load(folder, dtype=jnp.bfloat16).layers[1].mlp
    assert nnx.graphdef(streamed) == nnx.graphdef(loaded) and streamed.up.matrix.shuffled
    for got, want in zip(jax.tree.leaves(streamed), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("change", "tokens", "said"),
    [
        (
            {"layers.0.attention.query": 1},
            TOKENS,
            "names of capture=, got layers.0.attention.query",
        ),
        ({"layers.0.attention.q": np.zeros((24, 5))}, TOKENS, r"must have shape \(24, 3, 5, 14\)"),
        (
            {"layers.0.attention.q": np.zeros((24, 210), complex)},
            TOKENS,
            "real numbers, got complex",
        ),
        ({"layers.0.attention.q": np.full((24, 210), "x")}, TOKENS, "real numbers, got <U1"),
        ({"logits": [[1.0, 2.0], [3.0]]}, TOKENS, "logits of the reference must be an array"),
        *(
            ({"layers.0.mlp.experts": np.tile(x, (24, 1))}, TOKENS, "different ints below")
            for x in ([0, 99], [0, -1], [1, 1], [0.0, 1.0])
        ),
        ({}, TOKENS[:5], r"must have shape"),
        ({}, TOKENS + 90, "vocabulary of 101"),
        ({}, TOKENS[None], r"ids \[T\]"),
        ({}, None, "tokens must be given"),
    ],
)
def test_bad_arrays_are_refused(model, reference, change, tokens, said):
    with pytest.raises(ValueError, match=said):
        compare(model, reference | change, tokens)


def test_what_is_no_reference_is_refused(model):
    with pytest.raises(ValueError, match="golden file that was loaded, got str"):
        compare(model, "window-7-hf.npz", TOKENS)
