"""Loading: every layout, every dtype, every mesh gives the bytes that lie in the files."""

import functools
import json
import os
import re
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_oracle import leaves, ours_from_hf, read_all, rewrite, same_bits
from flax import nnx
from sizes import SHARDABLE, TINY

from gpt_oss_jax.checkpoint import load, loading, pieces, source, synthetic, writer
from gpt_oss_jax.checkpoint.files import LocalFolder
from gpt_oss_jax.kernels.expert_matmul.mosaic_gpu import on_hopper
from gpt_oss_jax.quant import dequantize
from gpt_oss_jax.sharding import make_mesh, named_sharding

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with the same weights in three forms; the floats hold every kind of bit pattern."""
    root = tmp_path_factory.mktemp("checkpoints")
    synthetic.write(TINY, root / "hf")
    synthetic.write(TINY, root / "original", "original")
    synthetic.write(TINY, root / "dense", experts="dense")
    return root


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return synthetic.write(SHARDABLE, tmp_path_factory.mktemp("sharded") / "hf")


def _as_float32(arrays):
    return {k: v.astype(np.float32) if v.dtype == BF16 else v for k, v in arrays.items()}


@pytest.mark.parametrize("layout", ["hf", "original", "dense"])
def test_bfloat16_is_what_lies_in_the_files(folders, layout):
    want = ours_from_hf(read_all(folders / ("dense" if layout == "dense" else "hf")), TINY)
    same_bits(leaves(load(folders / layout, dtype=jnp.bfloat16)), want)


@pytest.mark.parametrize("layout", ["hf", "original", "dense"])
def test_default_on_cpu_is_float32_and_exact(folders, layout):
    want = ours_from_hf(read_all(folders / ("dense" if layout == "dense" else "hf")), TINY)
    same_bits(leaves(load(folders / layout)), _as_float32(want))


def test_every_bit_pattern_survives(folders, tmp_path):
    shutil.copytree(folders / "hf", tmp_path / "hf")
    tensors = read_all(folders / "hf")
    pattern = np.arange(1 << 16, dtype=np.uint16)
    for i, (name, value) in enumerate(tensors.items()):
        if value.dtype == BF16:
            bits = np.resize(np.roll(pattern, 4099 * i), value.shape)
            tensors[name] = bits.view(BF16)
    rewrite(tmp_path / "hf", tensors)
    want = ours_from_hf(tensors, TINY)
    same_bits(leaves(load(tmp_path / "hf", dtype=jnp.bfloat16)), want)
    for path, value in leaves(load(tmp_path / "hf")).items():
        if value.dtype == np.float32:
            bits = want[path].view(np.uint16).astype(np.uint32) << 16
            np.testing.assert_array_equal(value.view(np.uint32), bits, err_msg=path)


def test_model_runs_and_carries_its_arguments(folders):
    model = load(folders / "hf", implementation="xla")
    assert (model.config, model.implementation) == (TINY, "xla")
    assert load(folders / "hf").implementation is None
    logits = jax.jit(lambda m, t: m(t))(model, jnp.arange(10)[None])
    assert logits.shape == (1, 10, 101) and bool(jnp.isfinite(logits).all())


def test_many_files_by_index_whatever_they_are_called(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_SHARD_BYTES", 300_000)
    folder = synthetic.write(TINY, tmp_path / "many")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 4
    # As the release does: counted from 0, "of" the last index; and a stray file that is not listed.
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    rename = {x.name: f"part-{i:05}-of-{len(files) - 1:05}.bin" for i, x in enumerate(files)}
    for old, new in rename.items():
        (folder / old).rename(folder / new)
    index["weight_map"] = {k: rename[v] for k, v in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "stray.safetensors").write_bytes(b"not one of ours")
    same_bits(leaves(load(folder)), leaves(load(folders / "hf")))


def test_no_index_means_all_files(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_SHARD_BYTES", 300_000)
    folder = synthetic.write(TINY, tmp_path / "many")
    (folder / "model.safetensors.index.json").unlink()
    same_bits(leaves(load(folder)), leaves(load(folders / "hf")))


def test_mixed_layouts(folders, tmp_path):
    """Layer 1 by its original names, then layer 2's down projections dense: so all are dense."""
    shutil.copytree(folders / "hf", tmp_path / "mixed")
    hf, original = read_all(folders / "hf"), read_all(folders / "original")
    tensors = {k: v for k, v in hf.items() if "layers.1." not in k}
    tensors |= {k: v for k, v in original.items() if k.startswith("block.1.")}
    rewrite(tmp_path / "mixed", tensors)
    same_bits(leaves(load(tmp_path / "mixed")), leaves(load(folders / "hf")))

    dense = read_all(folders / "dense")["model.layers.2.mlp.experts.down_proj"]
    prefix = "model.layers.2.mlp.experts.down_proj"
    del tensors[prefix + "_blocks"], tensors[prefix + "_scales"]
    rewrite(tmp_path / "mixed", tensors | {prefix: dense})
    found = leaves(load(tmp_path / "mixed", dtype=jnp.bfloat16))
    want = ours_from_hf(hf, TINY)
    for i in range(TINY.num_hidden_layers):
        for matrix in ("up", "down"):
            path = f"layers/{i}/mlp/{matrix}"
            exact = np.asarray(dequantize(want.pop(f"{path}/blocks"), want.pop(f"{path}/scales")))
            want[f"{path}/weight"] = exact
    want["layers/2/mlp/down/weight"] = np.swapaxes(dense, 1, 2)
    same_bits(found, want)


@pytest.mark.parametrize("axes", [{"expert": 4, "tensor": 2}, {"data": 2, "tensor": 2}, {}])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_meshes_get_the_same_values_where_the_table_says(sharded, axes, dtype):
    mesh = make_mesh(**axes)
    model, plain = load(sharded, mesh=mesh, dtype=dtype), load(sharded, dtype=dtype)
    same_bits(leaves(model), leaves(plain))
    up = model.layers[0].mlp.up.blocks
    assert up[...].sharding == named_sharding(mesh, up.axes, up.shape)
    assert model.embedding.weight[...].sharding.mesh == mesh


def test_each_shard_comes_from_its_own_bytes(sharded, monkeypatch):
    """Sharded over experts, every byte of a tensor is read once, not once a device."""
    count, read_into = {}, LocalFolder.read_into

    def counted(self, name, offset, out):
        count[name] = count.get(name, 0) + out.nbytes
        return read_into(self, name, offset, out)

    monkeypatch.setattr(LocalFolder, "read_into", counted)
    monkeypatch.setattr(pieces, "_SMALL", 0)
    for axes in ({"expert": 8}, {"expert": 2, "tensor": 2, "data": 2}):
        count.clear()
        load(sharded, mesh=make_mesh(**axes))
        files = sum(x.stat().st_size for x in sharded.glob("*.safetensors"))
        # But for the matrices that tensor parallelism cuts along their rows: those are read twice.
        assert files <= sum(count.values()) < (1.01 if "tensor" not in axes else 1.4) * files


def test_wide_rows_are_read_in_columns(folders, monkeypatch):
    """Chunks smaller than a row take the other path through `pieces`; the values are the same."""
    want = leaves(load(folders / "dense"))
    for module, name in ((pieces, "_SMALL"), (pieces, "CHUNK"), (source, "_SMALLEST_CHUNK")):
        monkeypatch.setattr(module, name, 1000)
    same_bits(leaves(load(folders / "dense")), want)
    same_bits(leaves(load(folders / "original")), leaves(load(folders / "hf")))


def test_reads_through_a_url(folders):
    """gs:// goes through TensorStore's key-value stores; file:// is the one that can be tested."""
    url = f"file://{folders / 'original'}"
    same_bits(
        leaves(load(url, dtype=jnp.bfloat16)), leaves(load(folders / "hf", dtype=jnp.bfloat16))
    )
    with pytest.raises(ValueError, match="TensorStore cannot open nowhere://x"):
        load("nowhere://x")
    with pytest.raises(ValueError, match="lacks config.json"):
        load(f"file://{folders / 'nothing'}")


def test_says_how_far_it_is_on_a_terminal_only(folders, capsys, monkeypatch):
    load(folders / "hf")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    load(folders / "hf", dtype=jnp.bfloat16)
    out, said = capsys.readouterr()
    assert out == "" and said.count("\n") == 1
    last = said.split("\r")[-1]
    assert re.fullmatch(r"loading: 0\.00 of 0\.00 GB, \d+\.\d\d GB/s *\n", last), said


def test_weights_are_not_tied_to_the_file(folders, tmp_path):
    shutil.copytree(folders / "hf", tmp_path / "hf")
    model = load(tmp_path / "hf")
    before = leaves(model)["embedding/weight"].copy()
    for file in (tmp_path / "hf").glob("*.safetensors"):
        file.write_bytes(b"\0" * file.stat().st_size)
    np.testing.assert_array_equal(leaves(model)["embedding/weight"], before)


def test_nothing_stays_open(folders):
    load(folders / "hf")
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    load(folders / "hf")
    after = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    assert len(after) <= len(before)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.int8, "foo", int])
def test_refuses_other_dtypes(folders, dtype):
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16"):
        load(folders / "hf", dtype=dtype)


def test_refuses_what_is_no_path():
    with pytest.raises(ValueError, match="a checkpoint's path or name is wanted, got None"):
        load(None)


def test_says_what_the_mesh_does_not_split(folders, sharded, caplog):
    with caplog.at_level("WARNING", "gpt_oss_jax"):
        load(sharded, mesh=make_mesh(expert=2, tensor=2))
        assert not caplog.messages
        load(folders / "hf", mesh=make_mesh(tensor=2))
    (said,) = caplog.messages
    assert "the mesh tensor=2 does not divide" in said
    assert "layers/*/attention/qkv/weight [3, 7, 14, 96]" in said and "mlp_norm" not in said
    assert said.endswith(" MB of them")


def test_the_largest_synthetic_arrays_are_made_while_there_is_room():
    """Making the embedding takes three and a half times its bytes beside it."""
    shapes = {"x/bias": (3,), "embedding/weight": (8, 4), "unembedding/weight": (4, 8)}
    targets = {path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in shapes.items()}
    made = [path for path, _ in synthetic.arrays(TINY, targets)]
    assert made == ["embedding/weight", "unembedding/weight", "x/bias"]


def test_synthetic_models_are_made_in_their_shards(monkeypatch):
    monkeypatch.setitem(synthetic._CONFIGS, "20b", SHARDABLE)
    mesh = make_mesh(expert=4, tensor=2)
    model = load("synthetic:20b", mesh=mesh, dtype=jnp.bfloat16)
    up = model.layers[1].mlp.up
    assert up.blocks[...].sharding == named_sharding(mesh, up.blocks.axes, up.blocks.shape)
    scales = np.asarray(up.scales[...])
    assert scales.min() == 119 and scales.max() == 123
    assert len(np.unique(np.asarray(up.blocks[...]))) == 256
    values = leaves(model)
    assert values["norm/scale"].astype(np.float32).mean() == pytest.approx(1, abs=0.05)
    router = "mlp/router/weight"
    assert (values[f"layers/0/{router}"] != values[f"layers/1/{router}"]).any()
    with pytest.raises(ValueError, match="synthetic:20b, synthetic:120b, got 'synthetic:7b'"):
        load("synthetic:7b")


def test_synthetic_folders_repeat(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        synthetic.write(TINY, tmp_path / name, seed=seed)
    a, b, c = (read_all(tmp_path / x) for x in "abc")
    same_bits(a, b)
    assert (a["lm_head.weight"] != c["lm_head.weight"]).any()
    with pytest.raises(ValueError, match="exists; a new folder is wanted"):
        synthetic.write(TINY, tmp_path / "a")
    with pytest.raises(ValueError, match="layout must be"):
        synthetic.write(TINY, tmp_path / "d", "original", experts="dense")


@pytest.mark.parametrize("axes", [None, {"expert": 4}])
def test_what_does_not_fit_is_refused_before_it_is_read(sharded, monkeypatch, axes):
    """By the part that each device gets; memory that is in use already is not free."""
    mesh = axes and make_mesh(**axes)
    first = jax.devices()[0]
    variables = jax.tree.leaves(nnx.state(load(sharded, mesh=mesh)))
    shards = [s for x in variables for s in x.addressable_shards]
    limit = 99 + sum(s.data.nbytes for s in shards if s.device == first)
    for used in (99, 100):
        stats = {"bytes_limit": limit, "bytes_in_use": used}
        monkeypatch.setattr(loading, "_memory", lambda device, stats=stats: stats)
        if used == 99:
            load(sharded, mesh=mesh)
    monkeypatch.setattr(loading, "_arrays", lambda *args: pytest.fail("it reads"))
    with pytest.raises(ValueError, match="the weights need .* GB on .*; gpt-oss-jax plan"):
        load(sharded, mesh=mesh)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_pool_that_is_too_small_is_named_on_a_gpu(folders, monkeypatch, platform):
    """And what sets its size; elsewhere there is none to set."""
    device = types.SimpleNamespace(platform=platform, memory_stats=lambda: {"bytes_limit": 99})
    there = types.SimpleNamespace(devices=lambda: [device])
    monkeypatch.setattr(loading, "_arrays", lambda *args: pytest.fail("it reads"))
    monkeypatch.setattr(loading.jax, "device_put", lambda x: there)
    with pytest.raises(ValueError, match="the weights need") as refusal:
        load(folders / "hf")
    assert ("XLA_CLIENT_MEM_FRACTION" in str(refusal.value)) == (platform == "gpu")


def test_a_cpu_has_the_memory_of_its_machine(folders, monkeypatch):
    monkeypatch.setattr(loading, "host_memory", lambda: 8 * 99)  # Of eight devices.
    monkeypatch.setattr(loading, "_arrays", lambda *args: pytest.fail("it reads"))
    with pytest.raises(ValueError, match="where the machine has 0.00 GB for it"):
        load(folders / "hf")


def test_a_mesh_is_a_mesh(folders):
    with pytest.raises(ValueError, match="make_mesh, got 'expert=2'"):
        load(folders / "hf", mesh="expert=2")


def test_several_gpus_are_refused_where_their_sums_would_fail(folders, monkeypatch):
    monkeypatch.setattr(loading, "why_not_several_gpus", lambda: "NCCL is old")
    mesh = make_mesh(expert=2)
    load(folders / "hf", mesh=mesh)  # CPUs need none.
    monkeypatch.setattr(loading, "_platform", lambda mesh: "gpu")
    with pytest.raises(ValueError, match="NCCL is old"):
        load(folders / "hf", mesh=mesh)


@pytest.mark.parametrize(
    ("folder", "dtype", "implementation", "shuffled"),
    [
        ("hf", "bfloat16", None, True),
        ("hf", "bfloat16", "mosaic_gpu", True),
        ("hf", "bfloat16", "xla", False),
        ("hf", "float32", None, False),
        ("dense", "bfloat16", None, False),
    ],
)
def test_on_hopper_experts_come_as_its_kernels_want_them(
    folders, monkeypatch, folder, dtype, implementation, shuffled
):
    how = {"dtype": jnp.dtype(dtype), "implementation": implementation}
    monkeypatch.setattr(loading, "why_not_hopper", lambda: "")
    assert not load(folders / folder, **how).layers[0].mlp.up.shuffled  # A CPU is no GPU.
    monkeypatch.setattr(loading, "_platform", lambda mesh: "gpu")
    mlp = load(folders / folder, **how).layers[0].mlp
    assert mlp.up.shuffled == mlp.down.shuffled == shuffled
    if shuffled:
        rows = jnp.zeros((1, TINY.hidden_size), jnp.bfloat16)
        chosen, weight = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2))
        run = functools.partial(on_hopper, limit=7.0)
        assert jax.eval_shape(run, rows, chosen, weight, mlp.weights).shape == rows.shape
    monkeypatch.setattr(loading, "why_not_hopper", lambda: "needs a Hopper GPU")
    assert not load(folders / folder, **how).layers[0].mlp.up.shuffled
