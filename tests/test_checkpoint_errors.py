"""Everything that is wrong with a checkpoint, in one ValueError; and a fuzz of broken ones."""

import json
import os
import random
import shutil

import numpy as np
import pytest
from checkpoint_oracle import read_all, rewrite
from sizes import TINY

from gpt_oss_jax.checkpoint import load, open_source, synthetic

BLOCKS = "model.layers.0.mlp.experts.gate_up_proj_blocks"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return synthetic.write(TINY, tmp_path_factory.mktemp("good") / "hf")


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "hf")


def _weights(folder):
    (file,) = folder.glob("*.safetensors")
    return file


def _edit_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def _edit_header(folder, edit):
    """Changes the header in place; the tensors' bytes stay."""
    file = _weights(folder)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = edit(header)
    text = json.dumps(header).encode() if text is None else text
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_all_of_it_is_reported_at_once(folder):
    tensors = read_all(folder)
    tensors["model.layers.7.input_layernorm.weight"] = tensors["model.norm.weight"]
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.copy()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    tensors["block.2.attn.sinks"] = tensors["model.layers.2.self_attn.sinks"]
    tensors["model.layers.3.mlp.experts.down_proj"] = np.zeros((11, 160, 96), np.uint16)
    rewrite(folder, tensors)
    with pytest.raises(ValueError) as error:
        load(folder)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{folder} must hold the gpt-oss model of its config.json, but"
    assert sorted(line.strip() for line in lines[1:]) == [
        "dtype of model.norm.weight: wanted BF16, got F32",
        "missing: model.layers.1.self_attn.k_proj.bias",
        "set twice: layers/2/attention/sinks, as model.layers.2.self_attn.sinks and as "
        "block.2.attn.sinks",
        "set twice: layers/3/mlp/down, as blocks and scales and as a dense matrix",
        "shape of lm_head.weight: wanted [101, 96], got [96, 101]",
        "unknown: model.layers.3.mlp.experts.down_proj",
        "unknown: model.layers.7.input_layernorm.weight",
    ]


def test_missing_layers_are_named(folder):
    config = json.loads((folder / "config.json").read_text())
    for layers, word, name in ((5, "missing", "layers.4"), (3, "unknown", "layers.3")):
        config |= {"num_hidden_layers": layers}
        del config["layer_types"]
        (folder / "config.json").write_text(json.dumps(config | {"layer_types": None}))
        with pytest.raises(ValueError, match=f"{word}: model.{name}.input_layernorm") as error:
            load(folder)
        assert str(error.value).count(f"{word}: ") == 19
        config["layer_types"] = None
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    with pytest.raises(ValueError, match="1000000000 layers, but only 79 tensors"):
        load(folder)


def test_a_tensor_in_two_files(folder):
    shutil.copy(_weights(folder), folder / "copy.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(
        ValueError, match="set twice: lm_head.weight, in copy.safetensors and model"
    ):
        load(folder)


def test_index_and_files_must_agree(folder):
    def edit(weights):
        weights["lm_head.weight"] = "gone.safetensors"

    _edit_index(folder, edit)
    with pytest.raises(ValueError, match="missing file: gone.safetensors, which .* names"):
        load(folder)

    def edit(weights):
        weights["lm_head.weight"] = weights["model.norm.weight"]
        weights["extra.weight"] = weights.pop("model.norm.weight")

    _edit_index(folder, edit)
    with pytest.raises(ValueError) as error:
        load(folder)
    assert "missing: extra.weight, which model.safetensors.index.json has in model-" in str(
        error.value
    )
    assert "not in model.safetensors.index.json: model.norm.weight" in str(error.value)


def test_index_cannot_lead_out_of_the_folder(folder):
    _edit_index(
        folder, lambda weights: weights.update({"lm_head.weight": "../elsewhere.safetensors"})
    )
    with pytest.raises(ValueError, match=r"missing file: ../elsewhere.safetensors"):
        load(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', '{"weight_map": 3}', "[" * 100_000])
def test_broken_index(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="model.safetensors.index.json in"):
        load(folder)


@pytest.mark.parametrize("content", ["", "nonsense", "[1]", "{}", '{"model_type": "llama"}'])
def test_broken_config(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json"):
        load(folder)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(ValueError, match="lacks config.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf_dict()))
    with pytest.raises(ValueError, match="holds no .safetensors files"):
        load(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        load(tmp_path / "config.json")


@pytest.mark.parametrize("size", [0, 5, 8, 100, 5000, -1, -100_000])
def test_truncated(folder, size):
    file = _weights(folder)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{file.name} is truncated or no safetensors file"):
        load(folder)


def test_bytes_behind_the_tensors(folder):
    with _weights(folder).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match="it does not end there"):
        load(folder)


def _two_the_same(header):
    text = json.dumps(header)
    entry = json.dumps(header[BLOCKS])
    return text.replace("{", f'{{"{BLOCKS}": {entry}, ', 1).encode()


@pytest.mark.parametrize(
    "edit, says",
    [
        (lambda h: h[BLOCKS].update(dtype="U7"), "a dtype unknown to the format, 'U7'"),
        (lambda h: h[BLOCKS].update(dtype="I8"), "wanted U8, got I8"),
        (lambda h: h[BLOCKS].update(dtype="BF16"), "but its offsets are"),
        (lambda h: h[BLOCKS].update(shape=[-11, -320, 3, 16]), "has the shape"),
        (lambda h: h[BLOCKS].update(shape=[11, 320, 3]), "but its offsets are"),
        (lambda h: h[BLOCKS].update(shape=[11, 3, 320, 16]), "wanted .11, 320, 3, 16., got"),
        (lambda h: h[BLOCKS].update(shape=["11", 320, 3, 16]), "has the shape"),
        (lambda h: h[BLOCKS].update(data_offsets=[0, 168960]), "was to come next"),
        (lambda h: h[BLOCKS].update(data_offsets=[-5, 168955]), "but its offsets are"),
        (lambda h: h[BLOCKS].update(data_offsets=[10**9, 10**9 + 168960]), "was to come next"),
        (lambda h: h[BLOCKS].update(data_offsets="all"), "lacks a dtype, a shape or its two"),
        (lambda h: h[BLOCKS].pop("dtype") and None, "lacks a dtype, a shape or its two"),
        (lambda h: h.update({BLOCKS: None}), "lacks a dtype, a shape or its two"),
        (lambda h: h.update({"x" + BLOCKS: h.pop(BLOCKS)}), "not in model.safetensors.index"),
        (_two_the_same, f"set twice: {BLOCKS}"),
        (lambda h: b"{" + b" " * 50, "Expecting"),
        (lambda h: b"\xff\xfe", "codec can't decode"),
        (lambda h: b"[]", "an object is wanted"),
    ],
)
def test_mislabelled(folder, edit, says):
    _edit_header(folder, edit)
    with pytest.raises(ValueError, match=says):
        load(folder)


def _break(folder, rng: random.Random) -> str:
    """Does one random harm to a checkpoint; says which."""
    file = _weights(folder)
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = sorted(header.keys() - {"__metadata__"})
    name, other = rng.sample(names, 2)
    harm = rng.choice(["cut", "grow", "byte", "length", "drop", "swap", "dtype", "shape", "shift"])
    if harm == "cut":
        del data[rng.randrange(len(data)) :]
    elif harm == "grow":
        data += bytes(rng.randrange(1, 100))
    elif harm == "byte":
        # Somewhere in the header, to something that is never the same JSON.
        at = rng.randrange(8, 8 + length)
        data[at] = rng.choice([x for x in b'\0"{}[],:x9' if x != data[at]])
    elif harm == "length":
        data[rng.randrange(8)] ^= 1 << rng.randrange(8)
    else:
        if harm == "drop":
            del header[name]
        elif harm == "swap":
            while header[name]["shape"] == header[other]["shape"]:
                other = rng.choice(names)
            header[name], header[other] = header[other], header[name]
        elif harm == "dtype":
            kinds = ["F32", "F16", "I8", "U8", "BF16", "F8_E5M2", "", 7]
            header[name]["dtype"] = rng.choice([x for x in kinds if x != header[name]["dtype"]])
        elif harm == "shape":
            shape = header[name]["shape"]
            shape[rng.randrange(len(shape))] += rng.choice([-1, 1, 2**40])
        elif harm == "shift":
            header[name]["data_offsets"][rng.randrange(2)] += rng.choice([-2, 2, 2**50])
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text + data[8 + length :]
    file.write_bytes(data)
    return harm


def _break_json(folder, rng: random.Random) -> str:
    """Puts something else in one place of the config or the index."""
    file = rng.choice(["config.json", "model.safetensors.index.json"])
    values = json.loads((folder / file).read_text())
    place = values.get("weight_map", values)
    junk = [None, 0, -1, 7, 10**12, 1.5, float("nan"), "", "yes", [], [1], {}, {"a": 1}, True]
    place[rng.choice(sorted(place))] = rng.choice(junk)
    (folder / file).write_text(json.dumps(values))
    return file


def _meaning(source):
    return {path: [x.tensor for x in parts] for path, parts in source.parts.items()}


def test_fuzz_ends_in_one_clear_error(good, tmp_path):
    """Each of 400 broken checkpoints is refused, or means what the whole one means."""
    want = _meaning(open_source(good))
    folder = shutil.copytree(good, tmp_path / "hf")
    refused = 0
    for seed in range(400):
        shutil.copy(_weights(good), folder)
        harm = _break(folder, random.Random(seed))
        try:
            found = _meaning(open_source(folder))
        except ValueError as error:
            assert str(error).startswith(f"{folder} must hold the gpt-oss model"), (seed, harm)
            refused += 1
            continue
        # A blank or the free text of __metadata__ may have been hit; nothing else may pass.
        assert harm == "byte" and found == want, (seed, harm)
    assert refused > 390


def test_fuzz_of_config_and_index(good, tmp_path):
    want = _meaning(open_source(good))
    refused = {"config.json": 0, "model.safetensors.index.json": 0}
    for seed in range(300):
        folder = shutil.copytree(good, tmp_path / str(seed), copy_function=os.link)
        for file in folder.glob("*.json"):
            file.unlink()
            shutil.copy(good / file.name, file)
        file = _break_json(folder, random.Random(seed))
        try:
            found = _meaning(open_source(folder))
        except ValueError:
            refused[file] += 1
            continue
        # Another value of the right kind, such as a clamp or a base of the rotation, may pass.
        assert found == want, seed
    assert refused["config.json"] > 60 and refused["model.safetensors.index.json"] > 120, refused


@pytest.mark.parametrize("value", ["mxfp4", {"quant_method": "fp8"}])
def test_another_quantization_is_refused_by_name(tmp_path, value):
    folder = synthetic.write(TINY, tmp_path / "sick", "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": value}))
    with pytest.raises(ValueError, match="quant_method mxfp4, or none, got"):
        load(folder)
