"""The scripts in benchmarks/, as far as they go without the GPU that they measure."""

import dataclasses
import importlib.util
import os
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sizes import TINY

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Imports a script by its name, as if it were run from its folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for path in FOLDER.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    return importlib.import_module


@pytest.mark.parametrize(
    "name",
    [
        *("aot_gpu", "attention", "experts", "goals", "hopper_dense"),
        *("prefill_attention", "several_gpus"),
    ],
)
def test_options_are_explained(name, script, monkeypatch, capsys):
    main = script(name).main
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 0 and f"usage: {name}.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("attention", []),
        ("experts", []),
        ("goals", ["20b"]),
        ("hopper_dense", []),
        ("precision", ["tiny"]),
        ("prefill_attention", []),
        ("timeline", ["tiny"]),
        ("tokens", []),
    ],
)
def test_without_a_hopper_they_end_with_a_line(name, model, script, monkeypatch):
    module = script(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *model])
    monkeypatch.setattr(module, "load", lambda _: pytest.fail("it loads"), raising=False)
    with pytest.raises(SystemExit, match="there is nothing to .*: needs"):
        module.main()


@pytest.mark.parametrize(
    ("name", "arguments", "extra"),
    [
        ("aot_gpu", ["20b"], "cuda13"),
        ("aot_tpu", ["20b", "v5e"], "tpu"),
        ("tpu_attention", ["v6e"], "tpu"),
        ("tpu_experts", ["v6e", "folded"], "tpu"),
        ("parity_memory", ["folder"], "test"),
    ],
)
def test_without_what_they_need_nothing_is_done(name, arguments, extra, script, monkeypatch):
    module = script(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    monkeypatch.setattr(module, "synthetic", None, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # Some set what libtpu reads.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=rf"pip install .*\[{extra}\]"):
        module.main()


def test_inputs_differ_from_run_to_run_unless_their_seed_is_named(script, monkeypatch, capsys):
    """It is printed, and the processes of all kernels get the same."""
    experts, seeds, commands = script("experts"), [], []
    monkeypatch.setattr(experts, "measure", lambda *args: seeds.append(args[-1]))
    monkeypatch.setattr(experts, "why_not_hopper", lambda: "")
    monkeypatch.setattr(experts.subprocess, "run", lambda command, **how: commands.append(command))
    for options in ["xla"], ["xla"], ["xla", "--seed", "7"], ["xla", "few_rows"]:
        monkeypatch.setattr(sys, "argv", ["experts.py", "--kernels", *options])
        experts.main()
    *printed, of_all = (x.removeprefix("seed ") for x in capsys.readouterr().out.splitlines())
    assert printed == list(map(str, seeds)) and seeds[0] != seeds[1] and seeds[2] == 7
    assert [command[-2:] for command in commands] == 2 * [["--seed", of_all]]
    monkeypatch.setattr(sys, "argv", ["experts.py", "--seed", "-1"])
    with pytest.raises(SystemExit):
        experts.main()
    assert "--seed: wanted 0 or more, got -1" in capsys.readouterr().err


def test_a_seed_decides_all_random_inputs(script):
    experts, attention, prefill = map(script, ("experts", "attention", "prefill_attention"))
    sizes = dataclasses.replace(TINY, hidden_size=32, intermediate_size=32)
    case = prefill.Case("one", np.zeros((1, 1), np.int32), np.zeros((1, 1), np.int32), None)
    for drawn in (
        lambda seed: experts.weights(sizes, seed),
        lambda seed: experts.routing(sizes, 3, 0.0, seed),
        lambda seed: attention.arrays((1, 1, 1, 1, 8), 16, 1, seed),
        lambda seed: [where["k_pos_BS"] for _, _, where, _ in attention.unusual(seed)],
        lambda seed: case.arrays(seed)[:4],
        lambda seed: [c.k_pos_BS for c in prefill.cases(seed) if "shuffled" in c.name],
    ):
        first, again, other = (jax.tree.leaves(drawn(seed)) for seed in (1, 1, 2))
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_goals_stand_beside_what_comes(script, monkeypatch, capsys):
    goals = script("goals")
    found = types.SimpleNamespace(decode_tokens_per_second=400, prefill_tokens_per_second=3000)
    monkeypatch.setattr(goals, "load", lambda name: name)
    monkeypatch.setattr(goals, "why_not_hopper", lambda: "")
    measure = lambda model, shapes, **how: [found] * len(shapes)
    monkeypatch.setattr(goals.bench, "measure", measure)
    for name in "_head", "_line":
        monkeypatch.setattr(goals, name, lambda *_, name=name: f"{name}\n")
    monkeypatch.setattr(sys, "argv", ["goals.py", "120b"])
    goals.main()
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [
        *("_head", "_line", "decoding 62.5% of 640 tokens/s"),
        *("_line", "decoding 27.6% of 1,450 tokens/s"),
        *("_line", "decoding 6.7% of 6,000 tokens/s"),
        *("_line", "prompts 4.6% of 65,000 tokens/s"),
    ]


def test_a_wrong_expert_of_the_router_is_seen_and_a_near_tie_is_none(script):
    dense = script("hopper_dense")
    dense.D = 64
    key = jax.random.key(0)
    args = dense.rows(35, key)[0], *dense.weights(key)["router"]
    want = jax.device_get(jax.tree.leaves(dense.XLA["router"](*args)))
    right = lambda got: dense.are_small(dense.errors_of("router", args, got, want))
    assert right(want)
    for place, change in (0, np.nan), (2, np.nan), (2, 1.5):
        wrong = [x.copy() for x in want]
        wrong[place][3, 1] *= change
        assert not right(wrong)
    h, weight, bias = map(np.float32, (want[0], *args[2:]))
    logits, best = jax.lax.top_k(h @ weight.T + bias, 5)
    gap = logits[:, 3] - logits[:, 4]
    row = int(jnp.where(gap > 2 * dense.LARGEST_ERROR, gap, jnp.inf).argmin())  # Hardest to see.
    for expert in best[row, 4], want[1][row, 0], -1, 32:
        wrong = [x.copy() for x in want]
        wrong[1][row, 3] = expert
        assert not right(wrong)
    swapped = [x.copy() for x in want]
    swapped[1][3, :2] = want[1][3, 1::-1]
    assert not right(swapped)
    x, scale, weight, bias = args
    twins = x, scale, weight.at[1].set(weight[0]), bias.at[1].set(bias[0])
    want = jax.device_get(jax.tree.leaves(dense.XLA["router"](*twins)))
    got = [want[0], np.where(want[1] < 2, 1 - want[1], want[1]), *want[2:]]
    assert (got[1] != want[1]).any()
    assert max(dense.errors_of("router", twins, got, want)) == 0.0


def test_the_roofline_is_the_slower_of_memory_and_matrix_unit(script):
    roofline = script("experts").roofline
    slow_memory = roofline(8e6, 1e9, 4e12, 8e14, us=4.0)
    assert slow_memory == {"limit_microseconds": 2.0, "percent_of_limit": 50.0}
    assert roofline(8e6, 4e9, 4e12, 8e14, us=10.0)["percent_of_limit"] == pytest.approx(50)


def test_dense_products_cost_what_their_weights_say(script):
    dense = script("hopper_dense")
    w = jax.eval_shape(dense.weights, jax.random.key(0))
    w = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), w)
    size, flops = dense.cost(w, ("qkv", "out"), 8)
    matrices = 5120 * 2880 + 2880 * 4096
    assert flops == 2 * 8 * matrices and size == 2 * (matrices + 2880 + 5120 + 2880)


def test_dense_products_are_timed(script, monkeypatch, capsys):
    """Those of XLA, which run anywhere, and a limit of which they reach next to nothing."""
    dense = script("hopper_dense")
    monkeypatch.setattr(dense, "SETS", 1)
    monkeypatch.setattr(dense, "TIMES", 2)
    key, reached = jax.random.key(0), (4e12, 8e14)
    rows = dense.rows(1, key)
    dense.timed("router", dense.XLA, key, *rows, reached=reached, only=("router",))
    out = capsys.readouterr().out
    assert out.startswith("router ") and "0.05 us" in out and "% of the limit" in out
