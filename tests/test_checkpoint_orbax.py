"""Orbax: the same bytes back, on any mesh; a killed conversion goes on; damage is an error."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from checkpoint_oracle import leaves, read_all, rewrite, same_bits
from jax.sharding import NamedSharding, PartitionSpec as P
from orbax.checkpoint.experimental import v1 as ocp
from sizes import SHARDABLE, TINY

from gpt_oss_jax.checkpoint import convert, export, load, open_source, orbax, save, synthetic
from gpt_oss_jax.checkpoint.stream import Request
from gpt_oss_jax.sharding import make_mesh, named_sharding

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("orbax")
    synthetic.write(SHARDABLE, root / "hf")
    (root / "hf" / "tokenizer.json").write_text("a tokenizer")
    convert(root / "hf", root / "orbax")
    return root


def test_it_is_ocdbt_and_zarr3_with_the_files_beside_it(folders):
    metadata = json.loads((folders / "orbax" / "state" / "_METADATA").read_text())
    assert metadata["use_ocdbt"] and metadata["use_zarr3"]
    assert (folders / "orbax" / "state" / "manifest.ocdbt").exists()
    assert (folders / "orbax" / "tokenizer.json").read_text() == "a tokenizer"
    assert json.loads((folders / "orbax" / "config.json").read_text())["model_type"] == "gpt_oss"
    assert sorted(os.listdir(folders)) == ["hf", "orbax"]


def test_any_orbax_restores_it_by_abstract_target(folders):
    """A plain tree of arrays, onto whatever shardings are asked for."""
    mesh = make_mesh(expert=4, tensor=2)
    sharding = lambda x: NamedSharding(mesh, P("expert" if len(x.shape) == 5 else None))
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x)),
        ocp.metadata(folders / "orbax").metadata,
    )
    tree = ocp.load(folders / "orbax", target)
    want = leaves(load(folders / "hf", dtype=jnp.bfloat16))
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    same_bits({"/".join(x.key for x in path): np.asarray(value) for path, value in found}, want)
    blocks = tree["layers"]["1"]["mlp"]["up"]["blocks"]
    assert blocks.sharding.spec == P("expert") and blocks.shape == (8, 320, 2, 6, 16)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_loads_the_same_as_safetensors(folders, dtype):
    same_bits(
        leaves(load(folders / "orbax", dtype=dtype)), leaves(load(folders / "hf", dtype=dtype))
    )


@pytest.mark.parametrize("axes", [{"expert": 8}, {"expert": 2, "tensor": 2, "fsdp": 2}])
def test_restores_onto_another_mesh(folders, tmp_path, axes):
    model = load(folders / "hf", mesh=make_mesh(tensor=2, fsdp=4), dtype=jnp.bfloat16)
    save(model, tmp_path / "saved")
    mesh = make_mesh(**axes)
    for dtype in (jnp.bfloat16, jnp.float32):
        restored = load(tmp_path / "saved", mesh=mesh, dtype=dtype)
        same_bits(leaves(restored), leaves(load(folders / "hf", dtype=dtype)))
        down = restored.layers[1].mlp.down.blocks
        assert down[...].sharding == named_sharding(mesh, down.axes, down.shape)


def test_every_bit_pattern_survives(folders, tmp_path):
    shutil.copytree(folders / "hf", tmp_path / "hf")
    tensors = read_all(folders / "hf")
    pattern = np.arange(1 << 16, dtype=np.uint16)
    tensors["lm_head.weight"] = np.resize(pattern, (112, 192)).view(tensors["lm_head.weight"].dtype)
    tensors["model.embed_tokens.weight"] = np.resize(pattern[::-1], (112, 192)).view(
        tensors["lm_head.weight"].dtype
    )
    rewrite(tmp_path / "hf", tensors)
    convert(tmp_path / "hf", tmp_path / "orbax")
    for dtype in (jnp.bfloat16, jnp.float32):
        found = leaves(load(tmp_path / "orbax", dtype=dtype))
        same_bits(found, leaves(load(tmp_path / "hf", dtype=dtype)))


def test_reads_through_a_url(folders):
    found = leaves(load(f"file://{folders / 'orbax'}", dtype=jnp.bfloat16))
    same_bits(found, leaves(load(folders / "hf", dtype=jnp.bfloat16)))


def test_back_to_safetensors(folders, tmp_path):
    export(folders / "orbax", tmp_path / "out", "hf-mxfp4")
    same_bits(read_all(tmp_path / "out"), read_all(folders / "hf"))
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "a tokenizer"


def test_dense_experts(tmp_path):
    synthetic.write(TINY, tmp_path / "dense", experts="dense")
    convert(tmp_path / "dense", tmp_path / "orbax")
    same_bits(leaves(load(tmp_path / "orbax")), leaves(load(tmp_path / "dense")))
    export(tmp_path / "orbax", tmp_path / "out", "hf-bf16")
    same_bits(read_all(tmp_path / "out"), read_all(tmp_path / "dense"))


KILLED = """
import os, signal, sys
from orbax.checkpoint.experimental import v1 as ocp
from gpt_oss_jax.checkpoint import convert, orbax
source, target, where, after = sys.argv[1:]
owner = {"save": ocp.partial, "finalize": ocp.partial, "verify": orbax}[where]
do, calls = getattr(owner, where), 0
def killed(*args, **kwargs):
    global calls
    calls += 1
    if calls > int(after):
        os.kill(os.getpid(), signal.SIGKILL)
    return do(*args, **kwargs)
setattr(owner, where, killed)
convert(source, target)
"""


def _convert_and_kill(source, target, where, after):
    command = [sys.executable, "-c", KILLED, source, target, where, str(after)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("where, after", [("save", 3), ("finalize", 0), ("verify", 0)])
def test_goes_on_after_a_kill(folders, tmp_path, monkeypatch, where, after):
    target = tmp_path / "orbax"
    _convert_and_kill(folders / "hf", target, where, after)
    assert os.listdir(tmp_path) == ["orbax.partial"]

    groups, save_one = [], ocp.partial.save

    def counted(path, state, **options):
        groups.extend(state)
        save_one(path, state, **options)

    monkeypatch.setattr(ocp.partial, "save", counted)
    convert(folders / "hf", target)
    # embedding, layers 0 and 1, norm, unembedding: what was written is not written again.
    assert groups == ["embedding", "layers", "layers", "norm", "unembedding"][after or 5 :]
    assert os.listdir(tmp_path) == ["orbax"]
    same_bits(leaves(load(target)), leaves(load(folders / "hf")))
    assert open_source(target).checksums == open_source(folders / "orbax").checksums


def test_a_merge_that_was_broken_off_is_begun_again(folders, tmp_path, monkeypatch):
    target = tmp_path / "orbax"
    _convert_and_kill(folders / "hf", target, "finalize", 0)
    (tmp_path / "orbax.partial" / "orbax.partial_save" / "state").mkdir()
    groups, save_one = [], ocp.partial.save

    def counted(path, state, **options):
        groups.extend(state)
        save_one(path, state, **options)

    monkeypatch.setattr(ocp.partial, "save", counted)
    convert(folders / "hf", target)
    assert len(groups) == 5
    same_bits(leaves(load(target)), leaves(load(folders / "hf")))


def test_what_another_source_left_is_thrown_away(folders, tmp_path):
    other = synthetic.write(SHARDABLE, tmp_path / "other", seed=1)
    _convert_and_kill(other, tmp_path / "orbax", "save", 3)
    assert (tmp_path / "orbax.partial").exists()
    convert(folders / "hf", tmp_path / "orbax")
    same_bits(leaves(load(tmp_path / "orbax")), leaves(load(folders / "hf")))


def test_stopped_by_hand_it_can_go_on_and_an_error_leaves_nothing(folders, tmp_path, monkeypatch):
    save_one = ocp.partial.save

    def stopped(error):
        def save(path, state, **options):
            if "norm" in state:
                raise error
            save_one(path, state, **options)

        return save

    monkeypatch.setattr(ocp.partial, "save", stopped(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        convert(folders / "hf", tmp_path / "orbax")
    assert os.listdir(tmp_path) == ["orbax.partial"]
    monkeypatch.setattr(ocp.partial, "save", stopped(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        convert(folders / "hf", tmp_path / "orbax")
    assert not os.listdir(tmp_path)


def test_wrong_trees_are_named(folders, tmp_path):
    abstract = ocp.metadata(folders / "orbax").metadata
    empty = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), abstract)
    tree = ocp.load(folders / "orbax", empty)
    del tree["layers"]["0"]["mlp"]["router"]["bias"]
    tree["layers"]["0"]["mlp"]["gate"] = tree["norm"]["scale"]
    tree["unembedding"]["weight"] = tree["unembedding"]["weight"].T
    tree["norm"]["scale"] = tree["norm"]["scale"].astype("float32")
    sums = open_source(folders / "orbax").checksums
    ocp.save(tmp_path / "wrong", tree, custom_metadata={"gpt_oss_jax": {"checksums": sums}})
    shutil.copy(folders / "orbax" / "config.json", tmp_path / "wrong")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "wrong")
    assert sorted(line.strip() for line in str(error.value).splitlines()[1:]) == [
        "dtype of norm/scale: wanted bfloat16, got float32",
        "missing: layers/0/mlp/router/bias",
        "shape of unembedding/weight: wanted [112, 192], got [192, 112]",
        "unknown: layers/0/mlp/gate",
    ]


@pytest.mark.parametrize(
    "harm", ["manifest", "data", "bit", "chunk", "metadata", "no sums", "config", "no tree"]
)
def test_damage_is_one_clear_error(folders, tmp_path, harm):
    folder = shutil.copytree(folders / "orbax", tmp_path / "orbax")
    data = [x for x in folder.glob("state/*/d/*") if x.stat().st_size > 100_000]
    assert data
    if harm == "manifest":
        (folder / "state" / "manifest.ocdbt").write_bytes(b"nothing")
    elif harm == "data":
        for file in data:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif harm == "bit":
        _flip_a_bit(max(data, key=lambda file: file.stat().st_size))
    elif harm == "chunk":
        base = {"driver": "file", "path": f"{folder}/state/"}
        del ts.KvStore.open({"driver": "ocdbt", "base": base}).result()[b"norm.scale/c/0"]
    elif harm == "metadata":
        (folder / "_CHECKPOINT_METADATA").write_text("{")
    elif harm == "no sums":
        metadata = folder / "_CHECKPOINT_METADATA"
        metadata.write_text(metadata.read_text().replace("checksums", "sums"))
    elif harm == "config":
        (folder / "config.json").unlink()
    else:
        shutil.rmtree(folder / "state")
    for dtype in (jnp.float32, jnp.bfloat16):
        with pytest.raises(ValueError, match="is damaged|is no whole Orbax|lacks config.json"):
            load(folder, dtype=dtype)


def _flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_flipped_bit_is_found_in_whatever_type_it_is_read(folders, tmp_path, dtype):
    source = open_source(folders / "orbax")
    sums = dict(source.checksums)
    sums["norm/scale"] ^= 1
    request = Request("norm/scale", np.dtype(dtype))
    list(source.stream([request]))
    with pytest.raises(ValueError, match="norm/scale holds other bytes than were written"):
        list(dataclasses.replace(source, checksums=sums).stream([request]))


def test_verify_reads_every_variable(folders, tmp_path):
    source = open_source(folders / "orbax")
    seen = []
    orbax.verify(source, seen.append)
    assert sum(seen) == sum(x.nbytes for x in source.variables.values())
