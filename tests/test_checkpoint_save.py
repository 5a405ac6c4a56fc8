"""Saving and exporting: untouched tensors come out byte for byte, from any layout into any."""

import fcntl
import json
import os
import shutil
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_oracle import leaves, ours_from_hf, read_all, rewrite, same_bits
from flax import nnx
from sizes import SHARDABLE, TINY

from gpt_oss_jax.checkpoint import export, load, loading, save, saving, synthetic, writer
from gpt_oss_jax.quant import dequantize
from gpt_oss_jax.sharding import make_mesh

SIDE_FILES = ("tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    synthetic.write(TINY, root / "hf")
    synthetic.write(TINY, root / "original", "original")
    synthetic.write(TINY, root / "dense", experts="dense")
    for name in SIDE_FILES:
        (root / "hf" / name).write_text(f"the {name} of the release")
    for layout in ("hf", "original"):
        # NaNs with a payload, infinities, subnormals and both zeros.
        tensors = read_all(root / layout)
        for name, value in tensors.items():
            if value.dtype == ml_dtypes.bfloat16 and "norm" in name:
                bits = np.array([0x7FA1, 0xFFC2, 0x7F80, 0x0001, 0x8000, 0xFF80], np.uint16)
                tensors[name] = np.resize(bits, value.shape).view(value.dtype)
        rewrite(root / layout, tensors)
    return root


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("source", ["hf", "original"])
@pytest.mark.parametrize("target", ["hf", "original"])
def test_untouched_weights_are_byte_identical(folders, tmp_path, source, target, dtype):
    format = "hf-mxfp4" if target == "hf" else target
    save(load(folders / source, dtype=dtype), tmp_path / "out", format=format)
    same_bits(read_all(tmp_path / "out"), read_all(folders / target))


@pytest.mark.parametrize("source", ["hf", "original"])
@pytest.mark.parametrize("target", ["hf", "original"])
def test_export_is_byte_identical(folders, tmp_path, source, target):
    export(folders / source, tmp_path / "out", "hf-mxfp4" if target == "hf" else target)
    same_bits(read_all(tmp_path / "out"), read_all(folders / target))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dense_experts_are_byte_identical(folders, tmp_path, dtype):
    save(load(folders / "dense", dtype=dtype), tmp_path / "saved", format="hf-bf16")
    export(folders / "dense", tmp_path / "exported", "hf-bf16")
    same_bits(read_all(tmp_path / "saved"), read_all(folders / "dense"))
    same_bits(read_all(tmp_path / "exported"), read_all(folders / "dense"))


@pytest.mark.parametrize("axes", [None, {"expert": 2, "tensor": 2}], ids=["one", "four"])
def test_experts_shuffled_for_hopper_go_out_as_they_came(folders, tmp_path, monkeypatch, axes):
    mesh = axes and make_mesh(**axes)
    plain = load(folders / "hf", dtype=jnp.bfloat16, mesh=mesh)
    monkeypatch.setattr(loading, "shuffles", lambda *_: True)
    model = load(folders / "hf", dtype=jnp.bfloat16, mesh=mesh)
    outlined = loading.outline(model.config, dtype=jnp.bfloat16, mesh=mesh)
    assert nnx.graphdef(outlined) == nnx.graphdef(model) != nnx.graphdef(plain)
    up, came = model.layers[0].mlp.up.blocks[...], plain.layers[0].mlp.up.blocks[...]
    assert up.sharding == came.sharding and (up != came).any()
    run = jax.jit(lambda model: model(jnp.arange(6)[None]))
    np.testing.assert_array_equal(run(model), run(plain))
    save(model, tmp_path / "out", format="hf-mxfp4")
    same_bits(read_all(tmp_path / "out"), read_all(folders / "hf"))


def test_a_model_on_a_mesh_is_saved_whole(tmp_path):
    folder = synthetic.write(SHARDABLE, tmp_path / "hf")
    save(load(folder, mesh=make_mesh(expert=4, tensor=2)), tmp_path / "out", format="hf-mxfp4")
    same_bits(read_all(tmp_path / "out"), read_all(folder))


def test_bf16_export_decodes_exactly(folders, tmp_path):
    export(folders / "original", tmp_path / "out", "hf-bf16")
    found = ours_from_hf(read_all(tmp_path / "out"), TINY)
    want = ours_from_hf(read_all(folders / "hf"), TINY)
    for i in range(TINY.num_hidden_layers):
        for matrix in ("up", "down"):
            path = f"layers/{i}/mlp/{matrix}"
            values = dequantize(want.pop(f"{path}/blocks"), want.pop(f"{path}/scales"))
            want[f"{path}/weight"] = np.asarray(values)
    same_bits(found, want)


@pytest.mark.parametrize("format", ["hf-mxfp4", "original"])
def test_dense_experts_are_quantised(folders, tmp_path, format):
    """A block's largest becomes 4 to 6, or 6 from under 8: a quarter of it is the most."""
    save(load(folders / "dense"), tmp_path / "out", format=format)
    dense = ours_from_hf(read_all(folders / "dense"), TINY)
    found = leaves(load(tmp_path / "out"))
    for path in ("layers/1/mlp/up", "layers/3/mlp/down"):
        values = np.asarray(
            dequantize(found[f"{path}/blocks"], found[f"{path}/scales"], jnp.float32)
        )
        want = dense[f"{path}/weight"].astype(np.float32)
        largest = np.abs(want).reshape(*want.shape[:-1], -1, 32).max(axis=-1).repeat(32, axis=-1)
        assert (np.abs(values - want) <= largest / 4).all()
        assert np.abs(values - want).max() > 0


def test_there_and_back_through_bf16_keeps_the_values(folders, tmp_path):
    export(folders / "hf", tmp_path / "dense", "hf-bf16")
    export(tmp_path / "dense", tmp_path / "back", "hf-mxfp4")
    before, after = leaves(load(folders / "hf")), leaves(load(tmp_path / "back"))
    for path in ("layers/0/mlp/up", "layers/2/mlp/down"):
        a, b = (
            np.asarray(dequantize(x[f"{path}/blocks"], x[f"{path}/scales"], jnp.float32))
            for x in (before, after)
        )
        np.testing.assert_array_equal(a, b)


def test_values_that_bfloat16_cannot_hold_are_rounded_and_said(folders, tmp_path, capsys):
    model = load(folders / "hf")
    weight = model.layers[1].mlp.router.weight
    weight[...] = weight[...] * 1.001
    save(model, tmp_path / "out", format="hf-mxfp4")
    said = capsys.readouterr().err
    assert said == (
        "Rounded to bfloat16: 1 float32 tensors that it cannot hold exactly, "
        "layers/1/mlp/router/weight first.\n"
    )
    name = "model.layers.1.mlp.router.weight"
    found, want = read_all(tmp_path / "out"), read_all(folders / "hf")
    np.testing.assert_array_equal(
        found.pop(name), np.asarray(weight[...]).astype(ml_dtypes.bfloat16)
    )
    del want[name]
    same_bits(found, want)


def test_files_that_came_in_go_out(folders, tmp_path):
    model = load(folders / "hf")
    another = nnx.merge(*nnx.split(model))
    save(model, tmp_path / "own", format="original")
    save(another, tmp_path / "named", format="original", files_from=folders / "hf")
    save(another, tmp_path / "without", format="original")
    for name in SIDE_FILES:
        for target in ("own", "named"):
            assert (tmp_path / target / name).read_text() == f"the {name} of the release"
        assert not (tmp_path / "without" / name).exists()
    # The hub keeps the tokenizer beside original/, not in it.
    shutil.copytree(folders / "hf", tmp_path / "hub")
    shutil.copytree(folders / "original", tmp_path / "hub" / "original")
    export(tmp_path / "hub" / "original", tmp_path / "out", "hf-mxfp4")
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_index_and_configs(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_SHARD_BYTES", 400_000)
    export(folders / "original", tmp_path / "hf", "hf-mxfp4")
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(x.name for x in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3 and files == sorted(set(index["weight_map"].values()))
    tensors = read_all(tmp_path / "hf")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert all((tmp_path / "hf" / x).stat().st_size < 800_000 for x in files)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    assert config["quantization_config"]["modules_to_not_convert"] == [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ]
    export(folders / "hf", tmp_path / "dense", "hf-bf16")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    export(tmp_path / "hf", tmp_path / "original", "original")
    assert [x.name for x in (tmp_path / "original").glob("*.safetensors")] == ["model.safetensors"]
    assert (
        json.loads((tmp_path / "original" / "config.json").read_text()) == TINY.to_original_dict()
    )


@pytest.mark.parametrize("format", ["orbax", "hf-mxfp4", "hf-bf16", "original"])
def test_an_existing_target_is_refused(folders, tmp_path, format):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists; name a new folder"):
        export(folders / "hf", tmp_path / "out", format)
    assert os.listdir(tmp_path) == ["out"] and not os.listdir(tmp_path / "out")


def test_refusals(folders, tmp_path):
    model = load(folders / "hf")
    with pytest.raises(ValueError, match="format must be one of orbax, hf-mxfp4, .*, got 'gguf'"):
        save(model, tmp_path / "out", format="gguf")
    with pytest.raises(ValueError, match="is a URL: write to a local folder"):
        save(model, "gs://bucket/out")
    model.extra = nnx.Param(jnp.zeros(3))
    with pytest.raises(ValueError, match="odd are extra"):
        save(model, tmp_path / "out")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("format", ["orbax", "hf-mxfp4", "original"])
def test_a_disk_that_lies_is_noticed_and_nothing_is_left(folders, tmp_path, monkeypatch, format):
    """One byte changes after it was written."""
    write_tensors, finalize = writer.write_tensors, saving.orbax.finalize

    def flip(folder):
        file = max((x for x in folder.rglob("*") if x.is_file()), key=lambda x: x.stat().st_size)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    def lying_tensors(source, folder, *rest):
        sums = write_tensors(source, folder, *rest)
        flip(folder)
        return sums

    def lying_finalize(path, files):
        finalize(path, files)
        flip(path)

    monkeypatch.setattr(writer, "write_tensors", lying_tensors)
    monkeypatch.setattr(saving.orbax, "finalize", lying_finalize)
    with pytest.raises(ValueError, match="reads back other than written|is damaged"):
        export(folders / "hf", tmp_path / "out", format)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "format, free", [("orbax", 1_000_000), ("hf-mxfp4", 1_000_000), ("hf-bf16", 4_000_000)]
)
def test_a_full_disk_leaves_nothing(folders, tmp_path, monkeypatch, format, free):
    """Room is needed for what is written: unpacked, 4.5 MB; packed, 1.6 MB."""
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"needs room for 0.0 GB, but has 0.0 GB"):
        export(folders / "hf", tmp_path / "out", format)
    assert not os.listdir(tmp_path)


def test_the_original_format_says_what_it_cannot_hold(tmp_path):
    import dataclasses

    config = dataclasses.replace(TINY, rms_norm_eps=1e-6)
    synthetic.write(config, tmp_path / "hf")
    with pytest.raises(ValueError, match="cannot hold rms_norm_eps"):
        export(tmp_path / "hf", tmp_path / "out", "original")
    assert os.listdir(tmp_path) == ["hf"]


@pytest.mark.parametrize("format", ["orbax", "hf-mxfp4"])
def test_other_floats_are_not_saved(folders, tmp_path, format):
    model = load(folders / "hf")
    model.norm.scale = nnx.Param(model.norm.scale[...].astype(jnp.float16))
    with pytest.raises(ValueError, match="norm/scale must be bfloat16 or float32.*got float16"):
        save(model, tmp_path / "out", format=format)
    assert not os.listdir(tmp_path)


def test_what_orbax_takes_for_a_pattern_is_refused_at_once(folders, tmp_path):
    with pytest.raises(ValueError, match=r"has \[ \], which Orbax takes for a pattern"):
        export(folders / "hf", tmp_path / "m[1]", "orbax")
    export(folders / "hf", tmp_path / "m[1]", "original")


@pytest.mark.parametrize("format", ["orbax", "hf-mxfp4"])
def test_a_target_that_appears_meanwhile_stays(folders, tmp_path, monkeypatch, format):
    verify = saving.orbax.verify, writer.verify

    def appears(*args):
        verify[format != "orbax"](*args)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")

    monkeypatch.setattr(saving.orbax, "verify", appears)
    monkeypatch.setattr(writer, "verify", appears)
    with pytest.raises(ValueError, match="out cannot get its name"):
        export(folders / "hf", tmp_path / "out", format)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_a_failed_write_leaves_no_thread_with_a_closed_file(folders, tmp_path, monkeypatch):
    failed, pwrite = [], os.pwrite

    def failing(fd, data, offset):
        try:
            os.fstat(fd)
        except OSError as error:
            failed.append(error)
        time.sleep(0.001)
        if offset > 100_000:
            raise OSError(28, "No space left on device")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    monkeypatch.setattr(writer, "_CHUNK", 1000)
    with pytest.raises(OSError, match="No space"):
        export(folders / "hf", tmp_path / "out", "original")
    assert not failed and not os.listdir(tmp_path)


def test_two_writers_of_one_target(folders, tmp_path):
    (tmp_path / "out.partial").mkdir()
    other = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process is writing .*out: wait for it"):
        export(folders / "hf", tmp_path / "out", "orbax")
    assert os.listdir(tmp_path) == ["out.partial"]
    os.close(other)
    export(folders / "hf", tmp_path / "out", "orbax")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("to", ["orbax", "hf-bf16"])
def test_a_stranger_beside_the_target_stays(tmp_path, to):
    """Whatever is called like our unfinished work, but is not, is nobody's to delete."""
    synthetic.write(TINY, tmp_path / "src")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    if to == "orbax":
        with pytest.raises(ValueError, match="in the way and not ours"):
            export(tmp_path / "src", tmp_path / "out", to)
    else:
        export(tmp_path / "src", tmp_path / "out", to)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"
