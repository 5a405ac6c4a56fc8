"""The plan: names of devices, bytes counted as they will lie, and what fits."""

import re
from pathlib import Path

import jax
import pytest
from flax import nnx
from random_model import random_model

from gpt_oss_jax import cli
from gpt_oss_jax.checkpoint import load, loading, synthetic
from gpt_oss_jax.config import GPT_OSS_20B, GPT_OSS_120B
from gpt_oss_jax.generate import device, generate_batch
from gpt_oss_jax.generate.loop import prompt_calls
from gpt_oss_jax.plan import GIB, KINDS, Kind, parse_device, plan
from gpt_oss_jax.sampling import SamplingParams
from gpt_oss_jax.sharding import MESH_AXES, make_mesh, spelled

CARD = Kind("card", "gpu", 1.0, 100, 10)


@pytest.mark.parametrize(
    ("text", "name", "devices"),
    [
        ("v5e", "v5e", 1),
        ("v5litepod-8", "v5e", 8),
        ("V6e-4", "v6e", 4),
        ("TPU v5 lite", "v5e", 1),
        ("NVIDIA H100 80GB HBM3", "h100", 1),
        ("NVIDIA H200", "h200", 1),
        ("v5p-8", "v5p", 4),
        ("tpu7x", "tpu7x", 2),
        ("tpu7x-8", "tpu7x", 8),
        ("v7x-2", "tpu7x", 2),
        ("h100", "h100", 1),
        ("2xh100", "h100", 2),
        ("h200-8", "h200", 8),
        ("h100x2", "h100", 2),
        ("trillium-8", "v6e", 8),
        ("v5-lite", "v5e", 1),
        ("v5e-2x4", "v5e", 8),
        ("4xv5e", "v5e", 4),
        ("v5e-256", "v5e", 256),
        ("v5p", "v5p", 1),
        ("v5p-2x2x1", "v5p", 4),
        ("v5p-384", "v5p", 192),
        ("v5p-12288", "v5p", 6144),
        ("tpu7x-2x2x1", "tpu7x", 8),
        ("RTX-4090", "rtx4090", 1),
        ("2xrtx-4090", "rtx4090", 2),
        ("h100-80gb", "h100", 1),
        ("H100 80GB", "h100", 1),
        ("a100-80gb-8", "a100", 8),
    ],
)
def test_names_of_devices(text, name, devices):
    assert parse_device(text) == (KINDS[name], devices)


FLAT = "1, 4, 8, 16, 32, 64, 128 or 256 chips"
CUBES = "8, 16, 32, 64 or a multiple of 128 up to {} cores, two to a chip"


@pytest.mark.parametrize(
    ("kind", "sizes", "names"),
    [
        ("v5e", FLAT, ["v5e-3", "v5e-12", "v5e-3x3", "v5e-1x8", "v5e-4x4x4", "2xv5e", "2xv5e-4"]),
        ("v6e", FLAT, ["v6e-5", "v6e-512"]),
        ("v5p", CUBES.format("12,288"), ["v5p-2", "v5p-6", "v5p-192", "v5p-12416", "v5p-1x1x1"]),
        ("tpu7x", "2, " + CUBES.format("18,432"), ["tpu7x-3", "tpu7x-4", "2xtpu7x"]),
    ],
)
def test_a_slice_that_does_not_exist_is_refused(kind, sizes, names):
    """And is not taken for a smaller one."""
    for name in names:
        with pytest.raises(ValueError, match=f"must be one {kind} slice of {sizes}; got '{name}'"):
            parse_device(name)


def test_a_tpu_has_the_memory_it_has():
    with pytest.raises(ValueError, match=r"v5e has 15.75 GiB .* got 'v5e-32GB'"):
        parse_device("v5e-32GB")


def test_a_card_is_known_by_its_memory():
    kind, devices = parse_device("16GB")
    assert (kind.platform, devices) == ("gpu", 1) and kind.memory_gib == 0.95 * 16
    kind, devices = parse_device("2xa100-40GB")
    assert (kind.memory_gib, kind.bandwidth_gb, devices) == (0.95 * 40, 0, 2)
    assert kind.name == "a100-40GB"
    assert parse_device("a100_40gb-4") == (kind, 4) and parse_device("4x16GB")[1] == 4
    assert parse_device("16 GB") == parse_device("16GB")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "v5",
        "tpu",
        "h100-0",
        "0xh100",
        "GB",
        "v5e-2x",
        "9999999xh100",
        "v9-40gb",
        "1" * 400 + "GB",
    ],
)
def test_other_names_are_refused(text):
    with pytest.raises(ValueError, match="the device must be one of v5e"):
        parse_device(text)


@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
@pytest.mark.parametrize("axes", [{}, {"expert": 4, "tensor": 2}, {"fsdp": 2, "context": 4}])
def test_bytes_are_those_that_lie_on_a_device(shardable, axes, experts):
    mesh = make_mesh(**axes)
    model = random_model(shardable, experts=experts, mesh=mesh)
    first = mesh.devices.flat[0]

    def here(arrays):
        shards = (s for x in arrays for s in x.addressable_shards if s.device == first)
        return sum(s.data.nbytes for s in shards)

    kind = {"dtype": "float32", "experts": experts, "mesh": axes}
    found = plan(shardable, CARD, mesh.size, context=512, batch=4, **kind)
    assert found.weights == here(jax.tree.leaves(nnx.state(model)))
    skeleton, leaves = device.split(model)
    assert found.cache == here(jax.tree.leaves(device.empty_cache(leaves[0], skeleton, 4, 512)))
    assert found.mesh == dict.fromkeys(MESH_AXES, 1) | axes


def test_the_cache_is_that_of_generate(shardable, monkeypatch):
    """Which rounds rows and slots up."""
    made, empty_cache = [], device.empty_cache
    monkeypatch.setattr(
        device, "empty_cache", lambda *args: made.append(empty_cache(*args)) or made[-1]
    )
    tops = {"max_tokens": 5, "sampling": SamplingParams(temperature=0.0)}
    generate_batch(random_model(shardable), [[1] * 600] * 3, **tops)
    found = plan(shardable, CARD, context=605, batch=3, dtype="float32")
    assert found.cache == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made[0]))


def test_on_tpu_words_are_counted_where_load_makes_them(shardable, tmp_path, monkeypatch):
    """Not where a mesh splits the width of an expert."""
    folder = synthetic.write(shardable, tmp_path / "x")
    monkeypatch.setattr(loading, "_platform", lambda mesh: "tpu")
    kind = Kind("chip", "tpu", 1.0, 100, 10)
    for axes in ({"expert": 4}, {"expert": 2, "tensor": 2}, {"tensor": 4}, {"expert": 3}):
        mesh = make_mesh(**axes)
        model = load(folder, mesh=mesh, dtype="float32")
        shards = (s for x in jax.tree.leaves(nnx.state(model)) for s in x.addressable_shards)
        here = sum(s.data.nbytes for s in shards if s.device == mesh.devices.flat[0])
        assert plan(shardable, kind, mesh.size, dtype="float32", mesh=axes).weights == here
        assert (model.layers[0].mlp.up.words_of is None) == (axes == {"expert": 2, "tensor": 2})
    for axes in ({"expert": 4}, {"expert": 2, "fsdp": 2}):
        form = {"mesh": make_mesh(**axes), "dtype": "float32", "expert_form": "folded"}
        model = load(folder, **form)
        shards = (s for x in jax.tree.leaves(nnx.state(model)) for s in x.addressable_shards)
        here = sum(s.data.nbytes for s in shards if s.device == mesh.devices.flat[0])
        assert plan(shardable, kind, 4, **form | {"mesh": axes}).weights == here


def test_experts_are_folded_for_many_rows_where_that_fits():
    def form(kind, batch, devices=1, **options):
        found = plan(GPT_OSS_20B, KINDS[kind], devices, batch=batch, **{"context": 2048} | options)
        assert found.fits
        return found.expert_form

    assert (form("v6e", 8), form("v6e", 9)) == ("packed", "folded")
    assert form("v6e", 16, 4, mesh={"data": 2, "expert": 2}) == "packed"
    assert form("v6e", 32, context=8192) == "packed"  # 10 GB more do not fit beside that cache.
    assert (form("tpu7x", 2), form("tpu7x", 3)) == ("packed", "folded")
    assert form("v6e", 9, 2, mesh={"tensor": 2}) is None
    with pytest.raises(ValueError, match="on TPU .* got 'folded' for h200"):
        plan(GPT_OSS_20B, KINDS["h200"], expert_form="folded")
    packed, folded = (
        plan(GPT_OSS_20B, KINDS["v6e"], batch=64, expert_form=x) for x in ("packed", "folded")
    )
    assert (packed.expert_form, folded.expert_form) == ("packed", "folded")
    # All experts are read, in 8 bits instead of 4.25; the scales are only kept.
    values = 24 * 32 * 3 * 2880 * 2880
    assert 1 < (folded.weights - packed.weights) / (values / 2) < 1.03
    assert 0.99 < (folded.decode_bytes - packed.decode_bytes) / (values * 3.75 / 8) < 1.03


def test_one_gpu_is_the_default_where_it_is_enough():
    """Of TPUs all are taken; so are those that are asked for."""
    one, gpu = dict.fromkeys(MESH_AXES, 1), KINDS["h100"]
    found = plan(GPT_OSS_120B, gpu, 4)
    assert found.fits and found.mesh == one and found.spread == {"data": 1, "expert": 4}
    for kind, devices, options in [
        (gpu, 4, {"batch": 16, "context": 131_072}),
        (gpu, 4, {"mesh": {"expert": 4}}),
        (KINDS["v5p"], 4, {}),
    ]:
        found = plan(GPT_OSS_120B, kind, devices, **options)
        assert found.mesh == one | {"expert": 4} and found.spread is None
    assert plan(GPT_OSS_120B, gpu).spread is None


@pytest.mark.parametrize("devices", [8, 16, 256])
def test_slices_of_any_size_run_on_kernels_for_tpu(devices):
    """Which want whole experts."""
    found = plan(GPT_OSS_120B, KINDS["v5e"], devices)
    assert found.fits and found.expert_form == "packed"
    assert (found.mesh["data"], found.mesh["expert"]) == (devices // 8, 8)


def test_no_memory_at_all_is_refused():
    with pytest.raises(ValueError, match="must have memory, got '0GB'"):
        parse_device("0GB")


def test_the_largest_that_fits_fits_and_no_more():
    kind = KINDS["v5e"]
    found = plan(GPT_OSS_20B, kind, context=8192)
    assert found.fits and 32768 <= found.largest_context < GPT_OSS_20B.max_context
    assert plan(GPT_OSS_20B, kind, context=found.largest_context).fits
    assert not plan(GPT_OSS_20B, kind, context=found.largest_context + 128).fits
    assert plan(GPT_OSS_20B, kind, context=8192, batch=found.largest_batch).fits
    assert not plan(GPT_OSS_20B, kind, context=8192, batch=found.largest_batch + 1).fits


def test_released_sizes():
    """13.76 and 65.25 GB in the files, experts in 4.25 bits; words for TPU are a little larger."""
    assert plan(GPT_OSS_20B, KINDS["h200"]).weights == 13_761_264_768
    assert plan(GPT_OSS_120B, KINDS["h200"]).weights == 65_248_815_744
    assert 1 < plan(GPT_OSS_20B, KINDS["v5e"]).weights / 13_761_264_768 < 1.03
    assert plan(GPT_OSS_120B, KINDS["h100"]).fits
    assert not plan(GPT_OSS_120B, KINDS["v6e"]).fits
    on_four = plan(GPT_OSS_120B, KINDS["v6e"], 4)
    assert on_four.fits and on_four.mesh == dict.fromkeys(MESH_AXES, 1) | {"expert": 4}
    assert on_four.weights < 65.25e9 / 4 * 1.05


def test_what_is_used_is_gathered_beside_the_weights_at_rest():
    """At most the unembedding, the largest of the layers."""
    one, four = plan(GPT_OSS_20B, CARD), plan(GPT_OSS_20B, CARD, 4, mesh={"fsdp": 4})
    assert four.weights < 1.01 * one.weights / 4
    assert four.workspace - one.workspace == 201_088 * 2880 * 2 * 3 / 4
    assert four.decode_bytes == one.decode_bytes


def test_what_makes_no_sense_is_refused(shardable):
    for options, said in [
        ({"context": 0}, "at least 1"),
        ({"context": 10**7}, "the model's context is 131,072 tokens"),
        ({"mesh": {"expert": 4}}, "needs 4 devices, not 1"),
    ]:
        with pytest.raises(ValueError, match=said):
            plan(shardable, CARD, **options)


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_enable_compile_cache", lambda: None)
    assert cli.main(["plan", "20b", "--device", "v5e", "--context", "32768"]) == 0
    out = capsys.readouterr().out
    assert "20b on v5e, bfloat16, context 32,768 tokens, batch 1" in out
    assert "It fits. Largest context" in out and "tokens/s" in out
    assert cli.main(["plan", "120b", "--device", "v6e-4"]) == 0
    assert "4 x v6e (--mesh expert=4)" in capsys.readouterr().out
    assert cli.main(["plan", "20b", "--device", "v6e", "--batch", "16"]) == 0
    assert "experts folded, 8.25 bits a weight" in capsys.readouterr().out
    rows = ["--batch", "16", "--expert-form", "packed"]
    assert cli.main(["plan", "20b", "--device", "v6e", *rows]) == 0
    assert "experts packed, 4.25 bits a weight" in capsys.readouterr().out
    assert cli.main(["plan", "20b", "--device", "16GB"]) == 0
    assert "export XLA_CLIENT_MEM_FRACTION=0.95" in capsys.readouterr().out
    assert cli.main(["plan", "120b", "--device", "16GB"]) == 1
    assert "does NOT fit: 4" in capsys.readouterr().out
    assert cli.main(["plan", "20b", "--device", "v5e-4", "--mesh", "expert=3"]) == 0
    err = capsys.readouterr().err
    assert "expert=3 does not divide embedding" in err and "width of experts" not in err
    assert cli.main(["plan", "120b", "--device", "2xh200", "--mesh", "tensor=2"]) == 0
    assert "--mesh tensor=2 splits the width of experts" in capsys.readouterr().err
    assert cli.main(["plan", "tiny", "--device", "v5e"]) == 0
    out, err = capsys.readouterr()
    assert "MiB, an estimate" in out and not err
    assert cli.main(["plan", "20b", "--device", "v5e", "--batch", "100000"]) == 1
    assert "--batch 8 would fit at this context." in capsys.readouterr().out
    assert cli.main(["plan", "20b", "--device", "v5e", "--expert-form", "folded"]) == 1
    assert "or larger ones, or --expert-form packed." in capsys.readouterr().out
    assert cli.main(["plan", "20b", "--device", "2xh100"]) == 0
    told = capsys.readouterr()
    assert "20b on h100, bfloat16" in told.out
    assert "running on 1 of 2 GPUs, where 20b fits; --mesh expert=2 spreads it" in told.err
    assert cli.main(["plan", "20b", "--device", "3xh100"]) == 0
    said = "of 3 GPUs, where 20b fits; --mesh expert=2 spreads it over 2; --mesh tensor=3 takes all"
    assert said in capsys.readouterr().err
    assert cli.main(["plan", "120b", "--device", "6xa100-40GB"]) == 0
    said = "spread over 4 of 6 devices, --mesh expert=4; --mesh expert=2,tensor=3 takes all"
    assert said in capsys.readouterr().err
    assert cli.main(["plan", "120b", "--device", "7xa100-40GB"]) == 0
    said = "4 of 7 devices, --mesh expert=4; no mesh splits it over all 7"
    assert said in capsys.readouterr().err
    assert cli.main(["plan", "20b", "--device", "v5e-8", "--mesh", "data=3,context=2"]) == 0
    said = "--mesh data=3 does not split rows, which come in powers of two; data=2 does\n"
    assert capsys.readouterr().err == f"gpt-oss-jax: {said}"
    assert cli.main(["plan", "20b", "--device", "v5p-256", "--batch", "8192"]) == 0
    assert "largest batch at this context: 32,768." in capsys.readouterr().out
    assert cli.main(["plan", "tiny", "--device", "v5p-256"]) == 0
    assert "largest batch at this context: 65,536 or more." in capsys.readouterr().out
    assert cli.main(["plan", "20b", "--device", "v5e-4", "--mesh", "expert=2"]) == 0
    assert "2 x v5e (--mesh expert=2)" in capsys.readouterr().out
    assert cli.main(["plan", "openai/gpt-oss-none-20b", "--device", "v5e"]) == 2
    assert "openai/gpt-oss-none-20b" in capsys.readouterr().err
    assert cli.main(["plan", "20b", "--device", "abacus"]) == 2
    assert "got 'abacus'" in capsys.readouterr().err
    assert cli.main(["plan", "20b", "--device", "h100", "--compile"]) == 2


@pytest.mark.parametrize(
    ("longest", "rows", "kind", "memory", "calls"),
    [
        (0, 1, "gpu", 75, []),
        (1, 1, "tpu", 16, [128]),
        (640, 1, "gpu", 75, [128] * 5),
        (641, 1, "cpu", 0, [1024]),
        (1025, 1, "gpu", 75, [1024, 128]),
        (4095, 1, "gpu", 75, [4096]),
        (4095, 1, "tpu", 31, [1024] * 4),
        (4097, 1, "gpu", 75, [4096, 128]),
        (8191, 1, "gpu", 75, [8192]),
        (8191, 1, "gpu", 15, [4096] * 2),
        (9000, 1, "gpu", 75, [8192, 1024]),
        (8191, 2, "gpu", 75, [8192]),
        (8191, 4, "gpu", 75, [4096] * 2),
        (1000, 32, "gpu", 75, [512] * 2),
        (40, 1024, "gpu", 75, [16] * 3),
    ],
)
def test_long_prompts_go_in_few_calls_that_fit(longest, rows, kind, memory, calls):
    assert prompt_calls(longest, rows, kind, memory * 2**30) == calls


def test_a_released_model_is_known_by_its_last_name(capsys):
    """`plan` needs no folder, and looks nowhere else."""
    assert cli.main(["plan", "gpt-oss-20b", "--device", "h100"]) == 0
    assert "weights         12.82 GiB" in capsys.readouterr().out


DOCS = Path(__file__).parents[1] / "docs"
ROW = re.compile(r"^\| (\S[^|]*) \| (20b|120b) \| .*\|$", re.M)


def row(device, model):
    """Of the tables in docs/."""
    config = {"20b": GPT_OSS_20B, "120b": GPT_OSS_120B}[model]
    found = plan(config, *parse_device(device))
    needed = (found.weights + found.cache + found.workspace) / GIB
    largest = f"{found.largest_context:,}" if found.largest_context else "does not fit"
    return (
        f"| {device} | {model} | {spelled(found.mesh)} | {needed:.2f} of "
        f"{found.kind.memory_gib:.2f} GiB | {largest} |"
    )


TABLES = {
    "tpu.md": "v5e-1 v5e-4 v5e-8 v5e-16 v6e-1 v6e-4 v6e-8 v6e-16 v5p-8 v5p-16 tpu7x-2 tpu7x-8",
    "meshes.md": "16GB rtx4090 rtx5090 a100 h100 h200 b200 2xa100-40GB",
}


@pytest.mark.parametrize("page", TABLES)
def test_tables_in_the_documentation_are_what_plan_says(page):
    """Of both models, also where one does not fit."""
    planned = [row(device, model) for device in TABLES[page].split() for model in ("20b", "120b")]
    assert [x[0] for x in ROW.finditer((DOCS / page).read_text())] == planned


def test_tables_in_the_documentation_have_each_kind():
    named = {parse_device(device)[0].name for device in " ".join(TABLES.values()).split()}
    assert named >= set(KINDS)
