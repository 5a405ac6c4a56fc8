"""The doctor on a well checkpoint, on sick ones, and on a sick environment."""

import json
import shutil

import pytest
from sizes import TINY

from gpt_oss_jax import cli, compile_cache
from gpt_oss_jax.checkpoint import convert, synthetic
from gpt_oss_jax.doctor import examine


@pytest.fixture(scope="module", params=["hf", "original", "orbax"])
def folder(request, tmp_path_factory):
    base = tmp_path_factory.mktemp(request.param)
    layout = "hf" if request.param == "orbax" else request.param
    folder = synthetic.write(TINY, base / "random", layout, 1)
    if request.param == "orbax":
        convert(folder, base / "orbax")
        return base / "orbax"
    return folder


@pytest.fixture(autouse=True)
def no_compile_cache(monkeypatch):
    monkeypatch.setattr(compile_cache, "enable", lambda: None)


def problems(model=None):
    return [f"{x.about}: {x.text}" for x in examine(model) if x.is_problem]


def test_all_is_well_here(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    findings = list(examine())
    assert not [x for x in findings if x.is_problem]
    text = "\n".join(f"{x.about} {x.text}" for x in findings)
    for word in ("jax ", "cpu", "o200k_base", "GB of memory", "XLA_FLAGS="):
        assert word in text
    assert "very_secret" not in text


def test_a_well_checkpoint(folder, capsys):
    assert problems(str(folder)) == []
    assert cli.main(["doctor", str(folder)]) == 0
    out = capsys.readouterr().out
    assert str(folder) in out and "4 layers of width 96" in out and "all well" in out


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert len(problems(str(tmp_path / "nothing"))) == 1
    assert cli.main(["doctor", str(tmp_path / "nothing")]) == 1
    assert "PROBLEM" in capsys.readouterr().out


def test_nothing_is_downloaded(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(repository, *, local_files_only, **_):
        assert local_files_only
        raise LocalEntryNotFoundError(repository)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    first, second = problems("20b")
    assert "openai/gpt-oss-20b is not on this machine yet" in first
    assert "hf download openai/gpt-oss-20b" in second


@pytest.fixture
def sick(tmp_path):
    return synthetic.write(TINY, tmp_path / "sick", "hf", 1)


def test_a_truncated_file(sick):
    file = next(sick.glob("*.safetensors"))
    with file.open("r+b") as f:
        f.truncate(file.stat().st_size - 1)
    found = problems(str(sick))
    assert any(file.name in line for line in found)


def test_a_file_that_the_index_names_is_gone(sick):
    file = next(sick.glob("*.safetensors"))
    file.unlink()
    assert any(file.name in line for line in problems(str(sick)))


def test_shapes_that_disagree_with_the_config(sick):
    config = json.loads((sick / "config.json").read_text())
    (sick / "config.json").write_text(json.dumps(config | {"head_dim": 16}))
    found = problems(str(sick))
    # Every layer's q, k, v and output projection, and the first line.
    assert len([line for line in found if "shape of" in line]) >= 4 * TINY.num_hidden_layers


def test_an_index_that_lacks_a_tensor_names_it(sick):
    index = sick / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    assert any("model.norm.weight" in line for line in problems(str(sick)))


def test_an_unfinished_orbax_checkpoint(sick, tmp_path):
    convert(sick, tmp_path / "orbax")
    shutil.rmtree(tmp_path / "orbax" / "state")
    assert problems(str(tmp_path / "orbax"))


def test_a_wrong_vocabulary(tmp_path, monkeypatch):
    (tmp_path / "o200k_base.tiktoken").write_text("AA== 0\n")
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", str(tmp_path))
    assert ["SHA-256" in line for line in problems()] == [True]
