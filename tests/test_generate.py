"""Generation against the plainest loop: a full forward without a cache for every token.

Two layers, one windowed and one full, and few different shapes: the time here is compilation.
"""

import dataclasses
import gc
import itertools
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_model import random_model
from sizes import SHARDABLE, TINY

from gpt_oss_jax.checkpoint import outline
from gpt_oss_jax.generate import Completion, ahead, device, generate, generate_batch, loop
from gpt_oss_jax.kernels import dispatch
from gpt_oss_jax.sampling import SamplingParams, sample
from gpt_oss_jax.sharding import make_mesh, named_sharding

SMALL = dataclasses.replace(TINY, num_hidden_layers=2)
GREEDY = SamplingParams(temperature=0)
SAMPLED = SamplingParams(temperature=1.3, top_k=60, top_p=0.95, min_p=0.001, seed=7)
# One token, a few, one chunk of 16 and the token after it, and several chunks.
PROMPTS = [[40], [3, 1, 4, 1, 5], list(range(17)), [(7 * i) % 101 for i in range(37)]]


@pytest.fixture(scope="module")
def model():
    return random_model(SMALL)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Chunks and caches so small that every path is taken within a few dozen tokens."""
    monkeypatch.setattr(loop, "_CALLS", (4, 16))
    monkeypatch.setattr(loop, "_MIN_SLOTS", 64)
    monkeypatch.setattr(loop, "_ROOM", 16)


@pytest.fixture
def decode_calls(monkeypatch):
    """The cache length of every call of the device loop, as they are made."""
    calls, decode = [], device.decode

    def spy(leaves, state, *rest, **options):
        calls.append(state.cache.max_len)
        return decode(leaves, state, *rest, **options)

    monkeypatch.setattr(device, "decode", spy)
    return calls


@jax.jit
def full_forward(model, tokens_BT, positions_BT, last_B):
    return model.forward(tokens_BT, positions_BT, logits_at=last_B)[0]


def plain_loop(model, prompt, count, sampling, sample_index=0):
    """No cache, no chunks, no loop on the device."""
    key = jax.random.fold_in(jax.random.key(sampling.seed or 0), sample_index)
    ids, logprobs = list(prompt), []
    for position in range(len(prompt), len(prompt) + count):
        tokens, positions = np.zeros((1, 64), np.int32), np.full((1, 64), -1, np.int32)
        tokens[0, :position], positions[0, :position] = ids, np.arange(position)
        logits = full_forward(model, tokens, positions, np.array([position - 1]))
        token, logprob = jitted_sample(logits, jax.random.fold_in(key, position)[None], sampling)
        ids.append(int(token[0]))
        logprobs.append(float(logprob[0]))
    return ids[len(prompt) :], logprobs


jitted_sample = jax.jit(sample)


def tokens_of(steps):
    return [step.token for step in steps]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_tokens_are_those_of_the_plain_loop(model, sampling):
    """Past the window of 7 and past a chunk of 16."""
    prompt = PROMPTS[2]
    steps = list(generate(model, prompt, max_tokens=40, sampling=sampling))
    tokens, logprobs = plain_loop(model, prompt, 40, sampling)
    assert tokens_of(steps) == tokens
    np.testing.assert_allclose([step.logprob for step in steps], logprobs, atol=2e-5)
    assert [step.stop_reason for step in steps] == [None] * 39 + ["length"]


def test_the_cache_grows_in_the_middle_of_an_answer(model, monkeypatch, decode_calls):
    whole = generate(model, PROMPTS[1], max_tokens=50, sampling=GREEDY)
    tokens = tokens_of(whole)
    assert set(decode_calls) == {64}
    decode_calls.clear()
    monkeypatch.setattr(loop, "_MIN_SLOTS", 16)
    grown = generate(model, PROMPTS[1], max_tokens=50, sampling=GREEDY)
    assert tokens_of(grown) == tokens == plain_loop(model, PROMPTS[1], 50, GREEDY)[0]
    assert decode_calls[0] == 32 and decode_calls[-1] == 64


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_row_is_the_same_alone_and_among_others(model, sampling):
    """In a bucket of four rows, with other neighbours in other places, and as a stream."""
    options = {"max_tokens": 12, "sampling": sampling}
    together = generate_batch(model, PROMPTS, **options)
    turned = generate_batch(model, [PROMPTS[3], PROMPTS[1], [99, 98, 97]], **options)
    assert [turned[0].tokens, turned[1].tokens] == [together[3].tokens, together[1].tokens]
    np.testing.assert_allclose(turned[0].logprobs, together[3].logprobs, atol=1e-5)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        assert completion.tokens == tokens_of(generate(model, prompt, **options))
        assert len(completion.tokens) == len(completion.logprobs) == 12
        assert completion.stop_reason == "length"


@pytest.fixture
def prefills(monkeypatch):
    """The shape of every call that reads prompts, as they are made."""
    calls, prefill = [], device.prefill

    def spy(leaves, cache, tokens_BT, *rest):
        calls.append(tokens_BT.shape)
        return prefill(leaves, cache, tokens_BT, *rest)

    monkeypatch.setattr(device, "prefill", spy)
    return calls


def test_many_rows_are_read_in_shorter_chunks(model, monkeypatch, prefills):
    monkeypatch.setattr(loop, "_MAX_CALL", 32)
    out = generate_batch(model, PROMPTS, max_tokens=12, sampling=GREEDY)
    assert prefills == [(4, 8)] * 4 + [(4, 4)]
    assert out[3].tokens == plain_loop(model, PROMPTS[3], 12, GREEDY)[0]


def test_n_samples_of_ragged_prompts_share_one_prefill(model, prefills):
    out = generate_batch(model, PROMPTS[1:3], n=2, max_tokens=12, sampling=SAMPLED)
    assert prefills == [(2, 16)]
    assert len({tuple(completion.tokens) for completion in out}) == 4
    for i, sample_index in itertools.product(range(2), range(2)):
        wanted, _ = plain_loop(model, PROMPTS[1 + i], 12, SAMPLED, sample_index)
        assert out[2 * i + sample_index].tokens == wanted


def test_the_stop_token_is_the_last_step(model, decode_calls):
    """Without a token limit: rows end in different calls, and no long cache is ever made."""
    prompts = [*PROMPTS[:3], [9, 9]]
    greedy = generate_batch(model, prompts, max_tokens=30, sampling=GREEDY)
    stops = {completion.tokens[i] for completion, i in zip(greedy, (0, 2, 9, 18), strict=True)}
    decode_calls.clear()
    out = generate_batch(model, prompts, stop_tokens=stops, sampling=GREEDY)
    for short, long in zip(out, greedy, strict=True):
        end = next(i for i, token in enumerate(long.tokens) if token in stops) + 1
        assert (short.tokens, short.stop_reason) == (long.tokens[:end], "stop")
        np.testing.assert_allclose(short.logprobs, long.logprobs[:end], atol=1e-5)
    longest = max(len(completion.tokens) for completion in out)
    needed = 1 + sum(np.cumsum([1, 4, 16, 16]) < longest)
    assert len(decode_calls) <= needed + 1 and max(decode_calls) <= 64

    steps = list(generate(model, prompts[2], stop_tokens=stops, sampling=GREEDY))
    assert tokens_of(steps) == out[2].tokens
    assert [step.stop_reason for step in steps] == [None] * (len(steps) - 1) + ["stop"]


def test_a_stop_token_outside_the_vocabulary_never_matches(model):
    strange = [-1, 101, 200002, 2**40]
    steps = list(generate(model, [1], max_tokens=6, sampling=GREEDY, stop_tokens=strange))
    assert len(steps) == 6 and steps[-1].stop_reason == "length"


def test_seeds_and_no_seed(model):
    def run(seed):
        sampling = dataclasses.replace(SAMPLED, seed=seed)
        return generate_batch(model, [[5]] * 4, max_tokens=12, sampling=sampling)

    assert run(7) == run(7)
    assert run(7)[0].tokens != run(8)[0].tokens
    assert run(7)[0] == run(7)[3]
    unseeded = [tuple(completion.tokens) for completion in run(None) + run(None)]
    assert len(set(unseeded)) == 8


def test_the_next_call_runs_while_tokens_are_read(model, decode_calls):
    steps = generate(model, [1, 2], max_tokens=30, sampling=GREEDY)
    assert decode_calls == []
    next(steps)
    assert len(decode_calls) == 2, "the second call must start before the first is read"
    steps.close()
    assert len(decode_calls) == 2


def test_a_step_that_fails_is_one_error(model, monkeypatch):
    """Not a second one of the call after it, which had begun: pytest makes an error of that."""

    class Block:
        def copy_to_host_async(self):
            pass

        def block_until_ready(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: none is left")

        def __array__(self, *_, **__):
            self.block_until_ready()

    monkeypatch.setattr(device, "decode", lambda _, state, *__, **___: (state, (Block(),) * 3))
    with pytest.raises(jax.errors.JaxRuntimeError, match="none is left"):
        list(generate(model, [1, 2, 3], max_tokens=40))
    gc.collect()


def test_a_model_is_flattened_once(monkeypatch):
    """Until something but the values of its weights is another: those may be set in place."""
    model = random_model(SMALL)
    skeleton, _ = device.split(model)
    flattened, flatten = [], jax.tree.flatten
    count = lambda tree: flattened.append(None) or flatten(tree)
    monkeypatch.setattr(device.jax.tree, "flatten", count)

    def changed(model, times):
        """Whether the skeleton is another; weights must be those of the model."""
        now, own = device.split(model)
        assert all(x is y for x, y in zip(own, jax.tree.leaves(model), strict=True))
        assert len(flattened) == times
        return now is not skeleton

    assert not changed(model, 0)
    bias = model.layers[1].mlp.router.bias
    bias[...] = bias[...] + 1
    assert not changed(model, 0)
    model.implementation = "xla"
    assert changed(model, 1) and changed(model, 1)
    model.implementation = None
    assert not changed(model, 2)
    model.layers[1].mlp.router.bias = bias.replace(bias[...].astype(jnp.bfloat16))
    changed(model, 3)
    weight = jnp.ones_like(model.norm.scale[...])
    last = weakref.ref(weight)
    model.norm.scale[...] = weight
    del weight
    changed(model, 3)
    model.norm.scale = model.norm.scale.replace(2 * model.norm.scale[...])
    gc.collect()
    assert last() is None, "an array is kept that the model has no more"
    changed(model, 4)
    model.norm.another = 1
    assert changed(model, 5)
    del model.norm.another
    changed(model, 6)
    mesh = make_mesh(expert=2)
    for x in jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        x[...] = jax.device_put(x[...], named_sharding(mesh, x.axes, x.shape))
    assert device.split(model)[0].mesh == mesh
    table = model.embedding.weight
    table.set_raw_value(table.get_raw_value().astype(jnp.bfloat16))
    assert device.split(model)[0].dtype == jnp.bfloat16
    known = len(device._known)
    del model
    gc.collect()
    assert len(device._known) == known - 1


@pytest.mark.parametrize("more", [(nnx.Param(jnp.ones(2)),), jnp.ones(2)], ids=["tuple", "array"])
def test_leaves_that_modules_do_not_have_as_variables_are_looked_for_each_time(more):
    model = random_model(SMALL)
    model.more = nnx.data(more)
    for _ in range(2):
        _, leaves = device.split(model)
        assert all(x is y for x, y in zip(leaves, jax.tree.leaves(model), strict=True))


def test_weights_that_are_one_array_are_looked_for_each_time():
    model = random_model(SMALL)
    first, second = (layer.attention_norm.scale for layer in model.layers)
    second[...] = first[...]
    device.split(model)
    second[...] = first[...] + 1
    _, leaves = device.split(model)
    assert all(x is y for x, y in zip(leaves, jax.tree.leaves(model), strict=True))


def test_rows_that_are_done_change_no_more(model):
    """One of four, and then all: a call more than needed ends before its first step."""
    skeleton, leaves = device.split(model)
    prompts = [np.array(prompt, np.int32) for prompt in PROMPTS]
    state = loop._prefilled(leaves, skeleton, 64, prompts, [60] * 4, 1, 0)

    def decode(done_B):
        after = dataclasses.replace(state, done_B=jnp.array(done_B))
        stops = np.full(4, -1, np.int32)
        return device.decode(leaves, after, GREEDY, stops, np.int32(3), skeleton)

    before, cache = np.asarray(state.cache.full_positions), state.cache.k[0]
    state, (tokens, _, running) = decode([False, False, True, False])
    assert cache.is_deleted(), "the cache must be donated"
    assert running and ((np.asarray(tokens) >= 0).sum(axis=1) == [3, 3, 0, 3]).all()
    written = np.asarray(state.cache.full_positions) != before
    assert (written.sum(axis=1) == [3, 3, 0, 3]).all()
    _, (tokens, logprobs, running) = decode([True] * 4)
    assert (np.asarray(tokens) == -1).all() and not running
    assert (np.asarray(logprobs) == 0).all(), "a step was taken"


def test_new_values_and_weights_compile_nothing(model, caplog):
    def run(model, sampling, **options):
        list(generate(model, sampling=sampling, **options))

    run(model, SAMPLED, prompt=PROMPTS[2], max_tokens=12)
    other = random_model(SMALL, seed=1)
    with jax.log_compiles(), caplog.at_level("WARNING", "jax"):
        run(other, SAMPLED, prompt=PROMPTS[2], max_tokens=12)
        run(model, SamplingParams(0.7, 9, 0.5, 0.2, seed=1), prompt=PROMPTS[1], max_tokens=14)
        run(model, SAMPLED, prompt=[9], max_tokens=5, stop_tokens=(1, 2))
        assert "ompil" not in caplog.text
        run(model, SAMPLED, prompt=list(range(70)), max_tokens=0)
        skeleton, leaves = device.split(model)
        device.empty_cache(leaves[0], skeleton, 1, 8)
        assert "ompil" in caplog.text, "the log must show what compiles"


def test_prefill_computes_no_logits(model):
    skeleton, leaves = device.split(model)
    cache = device.empty_cache(leaves[0], skeleton, 4, 32)
    zeros = np.zeros((4, 16), np.int32)
    text = device.prefill.lower(leaves, cache, zeros, zeros, skeleton).as_text()
    assert "4x16x96x" in text and "x101x" not in text.replace("101x96x", "")


def test_a_sharded_model_generates_the_same_and_compiles_once(caplog):
    sharded = random_model(SHARDABLE, mesh=make_mesh(data=2, tensor=2))
    with jax.log_compiles(), caplog.at_level("WARNING", "jax"):
        out = generate_batch(sharded, PROMPTS[:2], max_tokens=8, sampling=SAMPLED)
    assert caplog.text.count("Finished XLA compilation of jit(_decode)") == 1
    model = random_model(SHARDABLE)
    for prompt, completion in zip(PROMPTS, out, strict=False):
        assert completion.tokens == plain_loop(model, prompt, 8, SAMPLED)[0]

    skeleton, leaves = device.split(sharded)
    k = device.empty_cache(leaves[0], skeleton, 2, 64).k[1]
    assert k.shape == (2, 64, 4 * 10) and k.sharding.shard_shape(k.shape) == (1, 64, 2 * 10)


@pytest.mark.parametrize("bound", [False, True], ids=["anywhere", "bound to a device, as on a TPU"])
def test_what_was_lowered_from_shapes_is_not_lowered_again(caplog, bound):
    config = dataclasses.replace(SMALL, vocab_size=103 + bound)  # Of no other test.
    shapes, model = outline(config), random_model(config)
    if bound:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        table = shapes.embedding.weight
        shapes.embedding.weight = table.replace(
            jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=place)
        )
        table = model.embedding.weight
        model.embedding.weight = table.replace(jax.device_put(table[...], place))
    prompt, name = list(range(19)), r"MLIR module conversion jit\((\w+)\)"
    lowered = lambda: [found for x in caplog.messages for found in re.findall(name, x)]
    with caplog.at_level("DEBUG", logger="jax"):
        ahead.lower_answer(shapes, len(prompt), 25, SAMPLED, 0)
        before = lowered()
        assert before == ["empty_cache", "prefill", "prefill", "begin", "_decode"]
        list(generate(model, prompt, context=25, sampling=SAMPLED, stop_tokens=()))
    assert not set(before) & set(lowered()[len(before) :])


@pytest.mark.parametrize("tight", [False, True])
def test_xla_knows_what_the_loop_asks_for_on_a_gpu(monkeypatch, caplog, tight):
    """Where memory is tight it makes no copies of weights to try out its products on."""
    asked = []

    def jit(*args, compiler_options=None, **more):
        asked.append(compiler_options)
        return real(*args, compiler_options=compiler_options, **more)

    real = jax.jit
    monkeypatch.setattr(device, "platform", lambda: "gpu")
    monkeypatch.setattr(device.jax, "jit", jit)
    monkeypatch.setattr(device, "memory", lambda leaves: 10**6 if tight else 10**9)
    device._decode_program.cache_clear()
    dispatch.say_once.cache_clear()
    model = random_model(SMALL)
    (completion,) = generate_batch(model, PROMPTS[:1], max_tokens=8, sampling=SAMPLED)
    assert completion.tokens == plain_loop(model, PROMPTS[0], 8, SAMPLED)[0]
    (options,) = [o for o in asked if "WHILE" in (o or {}).get("xla_gpu_enable_command_buffer", "")]
    assert options.get("xla_gpu_autotune_level") == (0 if tight else None)
    assert ("little memory is free" in caplog.text) == tight


def test_bfloat16_is_bfloat16_in_the_cache():
    """Traced, not run: the parity tests run it."""
    skeleton, leaves = device.split(random_model(SMALL, dtype=jnp.bfloat16))
    state = loop._prefilled(leaves, skeleton, 64, [np.array([1], np.int32)], [9], 1, 0)
    assert state.cache.k[0].dtype == jnp.bfloat16
    after, _ = jax.eval_shape(
        lambda state: device.decode(
            leaves, state, SAMPLED, np.zeros(4, np.int32), jnp.int32(1), skeleton
        ),
        state,
    )
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


def test_nothing_to_do(model):
    assert list(generate(model, [1], max_tokens=0)) == []
    assert generate_batch(model, []) == []
    assert generate_batch(model, [[1], [2]], max_tokens=0) == [Completion([], [], "length")] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "at least one token id"),
        ({"prompt": [[1, 2]]}, r"shape \(1, 2\)"),
        ({"prompt": [0.5]}, "float64"),
        ({"prompt": [5, 101]}, "0 to 100, got 101 at index 1"),
        ({"prompt": [-1]}, "got -1 at index 0"),
        ({"max_tokens": -1}, "max_tokens must be"),
        ({"max_tokens": 1.5}, "max_tokens must be"),
        ({"stop_tokens": 5}, "stop_tokens must be a collection of token ids, got 5"),
        ({"stop_tokens": [None]}, "stop_tokens must be"),
        ({"stop_tokens": [2.7]}, "stop_tokens must be"),
        ({"context": 0}, "context must be 1 to 131072"),
        ({"context": 131_073}, "got 131073"),
        ({"max_tokens": 131_070}, "131072 tokens, got 3 and max_tokens=131070"),
        ({"max_tokens": 8, "context": 10}, "10 tokens, got 3 and max_tokens=8"),
        ({"context": 3}, "3 tokens, got 3 and max_tokens=None"),
    ],
    ids=str,
)
def test_errors_come_from_the_call(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, **({"prompt": [1, 2, 3]} | options))


def test_batch_errors_name_the_prompt(model):
    with pytest.raises(ValueError, match="prompt 1 must"):
        generate_batch(model, [[1], [200]])
    with pytest.raises(ValueError, match="n must be"):
        generate_batch(model, [[1]], n=0)


def test_the_context_is_filled_to_its_last_token(model):
    options = {"context": 10, "stop_tokens": (), "sampling": GREEDY}
    for max_tokens in (7, None):
        steps = list(generate(model, [1, 2, 3], max_tokens=max_tokens, **options))
        assert len(steps) == 7 and steps[-1].stop_reason == "length"
