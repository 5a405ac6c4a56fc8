"""The benchmark: what it counts, what it makes of times, and what the command prints and draws."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_model import random_model

from gpt_oss_jax import SamplingParams, bench, cli, cost, generate_batch, limits, load
from gpt_oss_jax.checkpoint import synthetic
from gpt_oss_jax.cli import bench as cli_bench, bench_plot
from gpt_oss_jax.config import GPT_OSS_20B
from gpt_oss_jax.plan import KINDS, plan, variables
from gpt_oss_jax.sharding import make_mesh


def tokens(config, rows, length, seed=0):
    return np.random.default_rng(seed).integers(config.vocab_size, size=(rows, length), dtype="i4")


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 5), (0, 7), (3, 9), (7, 30), (29, 30)])
def test_visible_pairs_are_those_that_one_counts(tiny, start, stop):
    pairs = 0
    for layer in range(tiny.num_hidden_layers):
        window = tiny.layer_window(layer) or math.inf
        for query in range(start, stop):
            pairs += sum(0 <= query - key < window for key in range(stop))
    assert cost.visible_pairs(tiny, start, stop) == pairs


@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
def test_flops_are_two_for_each_weight_that_a_token_meets(tiny, experts):
    c = tiny
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    attention = c.hidden_size * (heads + c.num_attention_heads * c.head_dim)
    mlp = c.hidden_size * (c.num_experts + c.experts_per_token * 3 * c.intermediate_size)
    shapes = {path: x.shape for path, x in variables(c, jnp.float32, experts).items()}
    wanted = 2 * c.num_hidden_layers * (attention + mlp)
    assert cost.weight_flops(c, shapes, logits=0) == pytest.approx(wanted)
    wanted += 2 * 0.25 * c.vocab_size * c.hidden_size
    assert cost.weight_flops(c, shapes, logits=0.25) == pytest.approx(wanted)
    scores = jax.jit(lambda q, k, v: (q @ k) @ v)
    sizes = [(c.num_attention_heads, 1, c.head_dim), (c.num_attention_heads, c.head_dim, 30)]
    args = [jnp.zeros(size) for size in [*sizes, (c.num_attention_heads, 30, c.head_dim)]]
    assert cost.attention_flops(c, 30) == scores.lower(*args).compile().cost_analysis()["flops"]


def test_a_prompt_costs_its_attention_in_the_plan_too(tiny):
    """What the plan counts on one device is what the benchmark counts."""
    card = KINDS["h200"]
    for context in (100, 400):
        found = plan(tiny, card, context=context, dtype=jnp.float32).prefill_flops
        assert found == pytest.approx(bench.prefill_flops(tiny, context) / context)
    pairs = cost.visible_pairs(tiny, 0, 100) / 100
    without = bench.prefill_flops(tiny, 100) / 100 - cost.attention_flops(tiny, pairs)
    shapes = {path: x.shape for path, x in variables(tiny, jnp.float32, "mxfp4").items()}
    assert without == pytest.approx(cost.weight_flops(tiny, shapes, logits=0.01))


def test_each_device_of_a_mesh_has_its_heads(shardable):
    card, weights = KINDS["h200"], {}
    for axes in ({}, {"expert": 2, "tensor": 2}):
        devices = math.prod(axes.values())
        long, short = (
            plan(shardable, card, devices, mesh=axes, context=n, dtype=jnp.float32).prefill_flops
            for n in (100_000, 50_000)
        )
        weights[devices] = long - short
    assert weights[1] / weights[4] == pytest.approx(4, rel=1e-3)


def test_bytes_of_a_step(tiny):
    model = random_model(tiny)
    size = lambda part: sum(x.nbytes for x in jax.tree.leaves(part))
    experts = sum(size((layer.mlp.up, layer.mlp.down)) for layer in model.layers)
    rest = size(model) - size(model.embedding) - experts
    lengths = [[min(n, tiny.layer_window(i) or n) for n in range(11, 15)] for i in range(4)]
    cache = 3 * np.mean(lengths, axis=1).sum() * 2 * tiny.num_key_value_heads * tiny.head_dim * 4
    for touched in (11, 5.5):
        found, _ = bench.decode_cost(model, 3, 10, 5, touched)
        assert found == pytest.approx(rest + experts * touched / 11 + cache)


def test_flops_of_a_step(tiny):
    shapes = {path: x.shape for path, x in variables(tiny, jnp.float32, "mxfp4").items()}
    _, found = bench.decode_cost(random_model(tiny), 3, 10, 5, 11)
    attention = cost.attention_flops(tiny, cost.visible_pairs(tiny, 10, 14) / 4)
    assert found == pytest.approx(3 * (cost.weight_flops(tiny, shapes, logits=1) + attention))


@pytest.mark.parametrize("rows", [1, 3])
def test_experts_are_counted_as_by_hand(shardable, rows, monkeypatch):
    """Three rows are padded to four, and 30 positions go in one call, or in calls of 8 or 6."""
    model, text = random_model(shardable), tokens(shardable, rows, 30)
    capture = jax.jit(lambda model, x: model.forward(x, capture=("layers.*.mlp.experts",))[2])
    seen = capture(model, text)
    wanted = [
        [len(np.unique(seen[f"layers.{i}.mlp.experts"][:, step])) for step in range(19, 30)]
        for i in range(shardable.num_hidden_layers)
    ]
    assert rows == 1 or np.ptp(wanted) > 0
    np.testing.assert_array_equal(bench.distinct_experts(model, text, 19), wanted)
    monkeypatch.setattr(bench, "_COUNTED", 8 * rows)
    np.testing.assert_array_equal(bench.distinct_experts(model, text, 19), wanted)


def test_experts_are_counted_on_a_mesh(shardable):
    text = tokens(shardable, 4, 20)
    one = bench.distinct_experts(random_model(shardable), text, 10)
    on_mesh = random_model(shardable, mesh=make_mesh(expert=4, tensor=2))
    np.testing.assert_array_equal(bench.distinct_experts(on_mesh, text, 10), one)


def test_rows_alike_go_through_the_experts_of_one(shardable):
    text = np.repeat(tokens(shardable, 1, 20), 4, axis=0)
    assert (
        bench.distinct_experts(random_model(shardable), text, 5) == shardable.experts_per_token
    ).all()


def test_synthetic_weights_route_about_evenly(monkeypatch):
    """And what they generate goes on doing so: it does not end in one token again and again."""
    config = dataclasses.replace(
        GPT_OSS_20B,
        num_hidden_layers=2,
        vocab_size=8192,
        hidden_size=128,
        intermediate_size=128,
        head_dim=16,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    monkeypatch.setattr(synthetic, "config_of", lambda name: config)
    model, prompts = load("synthetic:20b"), tokens(config, 8, 32)
    _, _, new = bench._timed(model, prompts, 48)
    assert min(len(set(row)) for row in new.tolist()) > 24
    counted = bench.distinct_experts(model, np.concatenate([prompts, new[:, :-1]], axis=1), 0)
    for steps in (counted[:, :32], counted[:, 32:]):
        assert 0.9 < steps.mean() / cost.expected_experts(config, 8) < 1.03


def test_what_is_timed_is_what_generates(shardable):
    model, prompts = random_model(shardable), tokens(shardable, 3, 12)
    first, rest, found = bench._timed(model, prompts, 25)
    greedy = {"sampling": SamplingParams(temperature=0.0), "stop_tokens": ()}
    wanted = generate_batch(model, prompts.tolist(), max_tokens=25, **greedy)
    assert found.tolist() == [x.tokens for x in wanted]
    assert first > 0 and rest > 0


@pytest.fixture
def measured(tiny, monkeypatch):
    """Measures with times and limits given: two rows, prompts of 10, 5 new tokens, 3 experts."""

    def measure(*seconds, **reached):
        times = iter([(50.0, 50.0), *seconds])
        text = tokens(tiny, 2, 5)
        monkeypatch.setattr(bench, "_timed", lambda *args: (*next(times), text))
        monkeypatch.setattr(bench, "distinct_experts", lambda *args: np.array([[2, 4], [3, 3]]))
        monkeypatch.setattr(limits, "measure", lambda *args: limits.Limits(**reached))
        options = {"new_tokens": 5, "repeats": len(seconds)}
        (found,) = bench.measure(random_model(tiny), [(2, 10)], **options)
        return found

    return measure


def test_speeds_are_medians_beside_their_range(measured):
    times = (0.1, 2.0), (0.3, 0.4), (0.25, 0.8)
    found = measured(*times, gb_per_second=1e-3, tflop_per_second=1e-6)
    assert found.first_token_ms == 250 and found.first_token_ms_range == (100, 300)
    assert found.prefill_tokens_per_second == 2 * 10 / 0.25
    assert found.decode_tokens_per_second == 2 * 4 / 0.8 and found.decode_ms_per_step == 200
    assert found.decode_tokens_per_second_range == (2 * 4 / 2.0, 2 * 4 / 0.4)
    assert found.compile_seconds == pytest.approx(98.95, abs=0.01) and found.repeats == 3
    assert found.decode_experts == 3
    assert found.decode_experts_if_uniform == pytest.approx(11 * (1 - (9 / 11) ** 2), rel=1e-3)


def test_percentages_are_of_the_smaller_limit(measured, tiny):
    size, flops = bench.decode_cost(random_model(tiny), 2, 10, 5, 3)
    found = measured((0.2, 0.8), gb_per_second=1e-3, tflop_per_second=1.0)
    assert found.decode_limit == "memory"
    assert found.decode_gb_per_step == pytest.approx(size / 1e9, rel=1e-3)
    assert found.decode_tokens_per_second_limit == pytest.approx(2 / (size / 1e6), rel=1e-3)
    assert found.decode_percent_of_limit == pytest.approx(100 * size / 1e6 / 0.2, rel=1e-3)
    found = measured((0.2, 0.8), gb_per_second=1e3, tflop_per_second=1e-4)
    assert found.decode_limit == "products"
    assert found.decode_gflop_per_step == pytest.approx(flops / 1e9, rel=1e-3)
    assert found.decode_tokens_per_second_limit == pytest.approx(2 / (flops / 1e8), rel=1e-3)
    assert found.decode_percent_of_limit == pytest.approx(100 * flops / 1e8 / 0.2, rel=1e-3)
    prompts = bench.prefill_flops(tiny, 10)
    assert found.prefill_gflop_per_token == pytest.approx(prompts / 1e10, rel=1e-3)
    assert found.prefill_percent_of_limit == pytest.approx(100 * 2 * prompts / 1e8 / 0.2, rel=1e-3)


def test_what_makes_no_sense_is_refused_before_anything_is_timed(tiny):
    model = random_model(tiny)
    for shapes, options, said in [
        ([(1, 8), (0, 8)], {}, "batch=0"),
        ([(1, 8), (1, 131_000)], {}, "context is 131,072 tokens, got prompt_tokens=131000"),
        ([(1, 8)], {"new_tokens": 1}, "at least 2 new tokens"),
        ([(1, 8)], {"repeats": 0}, "repeats=0"),
    ]:
        with pytest.raises(ValueError, match=said):
            bench.measure(model, shapes, **options)


def test_limits_are_those_of_this_machine():
    found = limits.measure(jax.devices()[0], jnp.float32, devices=3)
    assert 0.1 < found.gb_per_second / 3 < 1e5 and 1e-3 < found.tflop_per_second / 3 < 1e3


SHAPES = ["--batch", "1,3", "--prompt-tokens", "16,8", "--new-tokens", "9", "--repeats", "2"]


@pytest.fixture
def small_model(shardable, monkeypatch):
    monkeypatch.setattr(cli, "_enable_compile_cache", lambda: None)
    monkeypatch.setattr(cli_bench, "load_model", lambda args, **_: random_model(shardable))


def test_the_command_prints_a_table_and_a_list(small_model, capsys):
    assert cli.main(["bench", "small", *SHAPES]) == 0
    out, err = capsys.readouterr()
    title, reached, _, groups, columns, *rows, last = out.splitlines()
    found = json.loads(last)
    shapes = [(x["batch"], x["prompt_tokens"]) for x in found]
    assert shapes == [(1, 16), (3, 16), (1, 8), (3, 8)] and len(rows) == 4
    assert title.startswith("small on 1 x ") and "9 new tokens a row, medians of 2 runs" in title
    assert f"{found[0]['tflop_per_second_limit']:,.4g} TFLOP/s" in reached
    assert len(groups) == len(columns)
    for row, x in zip(rows, found, strict=True):
        assert x["model"] == "small" and x["decode_percent_of_limit"] > 0
        assert row.split()[:2] == [str(x["batch"]), str(x["prompt_tokens"])]
        assert f" {x['decode_experts']:.2f} " in row
        assert row.endswith(f"{x['decode_limit']} {x['decode_percent_of_limit']:.0f}%")
        assert 2 <= x["decode_experts"] <= 2 * x["batch"]
    assert found[0]["decode_experts"] == found[0]["decode_experts_if_uniform"] == 2
    assert "timing 2 runs of 3 x (8 + 9) tokens" in err


def test_what_was_measured_before_a_shape_failed_is_said(measured, monkeypatch, capsys):
    def failing(*args, **options):
        yield measured((0.1, 0.2), gb_per_second=1, tflop_per_second=1)
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(cli, "_enable_compile_cache", lambda: None)
    monkeypatch.setattr(cli_bench, "load_model", lambda args, **_: None)
    monkeypatch.setattr(cli_bench, "measure", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        cli.main(["bench", "small"])
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])) == 1


def test_the_table_is_aligned(measured):
    found = measured((0.0241, 0.2), (0.0246, 0.21), gb_per_second=4100, tflop_per_second=760)
    for batch, size, speeds in ((1, 3.712, (630.2, 640.1)), (128, 13.1, (16_500, 16_700))):
        found = dataclasses.replace(
            found,
            batch=batch,
            decode_gb_per_step=size,
            decode_gflop_per_step=7.21,
            decode_tokens_per_second_range=speeds,
        )
        *_, groups, columns = cli_bench._head("20b", found).splitlines()
        assert len(cli_bench._line(found).rstrip("\n")) == len(groups) == len(columns)


def test_options_that_are_no_numbers_are_refused(capsys):
    for option in (["--batch", "1,x"], ["--prompt-tokens", "8,,9"], ["--batch", "0"]):
        with pytest.raises(SystemExit):
            cli.main(["bench", "small", *option])
        assert "at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("x.svg", 'needs matplotlib: pip install "gpt-oss-jax[tools]"'),
        ("x.pdf", "ends in .svg or .png, got 'x.pdf'"),
        ("no/such/folder/x.png", "a folder that exists"),
    ],
)
def test_a_plot_that_cannot_be_is_refused_at_once(path, said, monkeypatch, capsys):
    def fail(args, **_):
        raise AssertionError("loaded")

    monkeypatch.setattr(cli, "_enable_compile_cache", lambda: None)
    monkeypatch.setattr(cli_bench, "load_model", fail)
    monkeypatch.setattr(bench_plot.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "small", "--plot", path]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err


def test_the_command_draws(measured, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra `tools` has it")
    found = measured((0.1, 0.2), gb_per_second=1, tflop_per_second=1)
    found = [
        found,
        dataclasses.replace(found, batch=8),
        dataclasses.replace(found, prompt_tokens=9),
    ]
    monkeypatch.setattr(cli, "_enable_compile_cache", lambda: None)
    monkeypatch.setattr(cli_bench, "load_model", lambda args, **_: None)
    monkeypatch.setattr(cli_bench, "measure", lambda *args, **options: iter(found))
    for name, start in (("x.svg", b"<?xml"), ("x.png", b"\x89PNG")):
        assert cli.main(["bench", "small", "--plot", str(tmp_path / name)]) == 0
        assert len(json.loads(capsys.readouterr().out.splitlines()[-1])) == 3
        assert (tmp_path / name).read_bytes().startswith(start)
    assert {x.name for x in tmp_path.iterdir()} == {"x.svg", "x.png"}
