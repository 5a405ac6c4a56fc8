"""Sampling against exact distributions: sets counted in numpy, frequencies by chi-squared."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_oss_jax.sampling import SamplingParams, _weights, sample

DRAWS = 4_000
LOGITS = jax.random.normal(jax.random.key(5), (600,)) * 2
jitted_sample = jax.jit(sample)


def keys_for(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@functools.partial(jax.jit, static_argnames="draws")
def draw_many(logits_V, params, draws=DRAWS):
    """Independent draws from one row: the same logits in every row, another key in each."""
    logits_BV = jnp.broadcast_to(logits_V, (draws, logits_V.size))
    return sample(logits_BV, keys_for(draws), params)


def expected(logits_V, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution by its definition: sort in float64, cut, renormalise after every option."""
    logits = np.asarray(logits_V, np.float64) / temperature
    order = np.lexsort((np.arange(len(logits)), -logits))
    p = np.exp(logits - logits.max())
    p /= p.sum()
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    if top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0
        p /= p.sum()
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def assert_draws(tokens, p):
    """Only possible tokens, in proportions that chance would give more than once in a million."""
    counts = np.bincount(np.asarray(tokens), minlength=len(p))
    assert not counts[p == 0].any(), f"impossible tokens drawn: {np.flatnonzero(counts * (p == 0))}"
    often = p * len(tokens) >= 5
    observed = np.append(counts[often], counts[~often].sum())
    wanted = np.append(p[often], p[~often].sum()) * len(tokens)
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    chi2, freedom = np.sum((observed - wanted) ** 2 / wanted), max(len(wanted) - 1, 1)
    # Wilson and Hilferty: the cube root of chi-squared is nearly normal.
    z = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 4.75, f"{chi2=:.1f} with {freedom} degrees of freedom"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.8},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 5_000},
        {"top_p": 0.01},
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"temperature": 1.6, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_the_draws_have_the_stated_distribution(options):
    tokens, _ = draw_many(LOGITS, SamplingParams(**options))
    assert_draws(tokens, expected(LOGITS, **options))


def test_the_block_and_the_token_in_it_are_drawn_independently():
    """Four equal tokens, the first two of either block."""
    logits = jnp.full(600, -jnp.inf).at[jnp.array([0, 1, 512, 513])].set(1.0)
    tokens, _ = draw_many(logits, SamplingParams())
    assert_draws(tokens, expected(logits))


def test_a_wrong_distribution_is_noticed():
    tokens, _ = draw_many(LOGITS, SamplingParams(temperature=1.1))
    with pytest.raises(AssertionError):
        assert_draws(tokens, expected(LOGITS, temperature=1.0))


def test_top_k_and_top_p_break_ties_by_id_and_keep_the_smallest_set():
    weights = np.zeros(600)
    weights[:6] = [0.125, 0.25, 0.125, 0.25, 0.125, 0.125]
    with np.errstate(divide="ignore"):
        logits = jnp.asarray(np.log(weights), jnp.float32)
    for options, kept in [
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {0, 1, 3}),
        ({"top_p": 0.25}, {1}),
        ({"top_p": 0.5}, {1, 3}),
        ({"top_p": 0.51}, {0, 1, 3}),
        ({"top_p": 0.75}, {0, 1, 2, 3}),
        ({"top_k": 4, "top_p": 0.67, "min_p": 1e-9}, {0, 1, 3}),
        ({"min_p": 1.0}, {1, 3}),
        ({"min_p": 0.5}, {0, 1, 2, 3, 4, 5}),
    ]:
        tokens, _ = draw_many(logits, SamplingParams(**options))
        assert set(np.asarray(tokens).tolist()) == kept, options


def test_the_whole_vocabulary_is_cut_as_by_a_sort():
    """201,088 columns: the set kept is that of a float64 sort, but for what rounding may move."""
    logits = jax.random.normal(jax.random.key(2), (1, 201_088)) * 2
    p = expected(logits[0], top_k=50_000, top_p=0.9)
    options = SamplingParams(top_k=50_000, top_p=0.9)
    kept = np.asarray(_weights(logits, options, options.tree_flatten()[1]))[0] > 0
    assert np.flatnonzero(kept != (p > 0)).size <= 1
    assert 5_000 < (p > 0).sum() < 50_000


def test_greedy_takes_the_first_of_the_most_probable():
    logits = jnp.array([[0.0, 3.0, 3.0, 1.0], [5.0, -1.0, 2.0, 5.0]])
    params = SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.5)
    tokens, _ = jitted_sample(logits, keys_for(2), params)
    assert tokens.tolist() == [1, 0]


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SamplingParams(0.5, 3, 0.7, 0.2)]
)
def test_logprobs_are_of_the_raw_distribution(params):
    logits = jnp.stack([LOGITS, LOGITS[::-1]])
    tokens, logprobs = jitted_sample(logits, keys_for(2), params)
    wanted = jax.nn.log_softmax(logits)[jnp.arange(2), tokens]
    np.testing.assert_allclose(logprobs, wanted, atol=1e-6)


def test_a_row_depends_on_its_key_and_logits_only():
    logits = jax.random.normal(jax.random.key(3), (8, 2_000)) * 2
    keys = keys_for(8)
    params = SamplingParams(temperature=1.2, top_k=300, top_p=0.9, min_p=0.01)
    tokens, logprobs = jitted_sample(logits, keys, params)
    order = np.array([3, 1, 7, 0, 5, 6, 2, 4])
    shuffled_tokens, shuffled_logprobs = jitted_sample(logits[order], keys[order], params)
    np.testing.assert_array_equal(shuffled_tokens, tokens[order])
    np.testing.assert_array_equal(shuffled_logprobs, logprobs[order])


def test_extreme_values_stay_finite():
    logits = jnp.array([[1e30, -1e30, 0.0, 1e30], [-jnp.inf, 4.0, -jnp.inf, -jnp.inf]])
    params = SamplingParams(temperature=1e-6, top_k=2, top_p=0.9999999, min_p=0.5)
    tokens, logprobs = jitted_sample(logits, keys_for(2), params)
    assert tokens[0] in (0, 3) and tokens[1] == 1
    assert np.isfinite(logprobs).all()


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            if inner := getattr(value, "jaxpr", value if hasattr(value, "eqns") else None):
                yield from primitives(inner)


@pytest.mark.parametrize(
    ("options", "searched", "drawn"),
    [
        ({"temperature": 0, "top_k": 5}, False, False),
        ({}, False, True),
        ({"min_p": 0.1}, False, True),
        ({"top_k": 5}, True, True),
        ({"top_p": 0.9}, True, True),
    ],
    ids=str,
)
def test_options_that_are_off_compile_to_nothing(options, searched, drawn):
    jaxpr = jax.make_jaxpr(sample)(jnp.zeros((2, 201_088)), keys_for(2), SamplingParams(**options))
    seen = set(primitives(jaxpr.jaxpr))
    assert not seen & {"sort", "top_k", "approx_top_k"}
    assert bool(seen & {"while", "scan"}) == searched
    assert bool(seen & {"random_bits", "threefry2x32"}) == drawn


def test_new_values_compile_nothing():
    jitted = jax.jit(lambda *arguments: sample(*arguments))
    logits, keys = jnp.zeros((2, 101)), keys_for(2)
    for seed, temperature in enumerate((0.7, 0.8, 1, 1.5)):
        jitted(logits, keys, SamplingParams(temperature=temperature, top_p=0.9, seed=seed))
        jitted(logits, keys, SamplingParams(temperature=temperature, top_p=0.8))
    assert jitted._cache_size() == 1


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": 1e-9},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"seed": -1},
        {"seed": 2**32},
        {"seed": 0.5},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        SamplingParams(**options)
