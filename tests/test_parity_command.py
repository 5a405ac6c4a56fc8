"""The parity command without PyTorch: golden files, the page, and what it refuses."""

import dataclasses
import html as escaping
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from faults import FAULTS
from random_model import random_model
from sizes import TINY

from gpt_oss_jax import cli
from gpt_oss_jax.checkpoint import load, open_source, synthetic
from gpt_oss_jax.config import Config
from gpt_oss_jax.parity import Recorder, compare, golden, html, values

CONFIG = dataclasses.replace(TINY, num_hidden_layers=2)
TOKENS = np.random.default_rng(1).integers(0, CONFIG.vocab_size, 24, np.int32)
FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))


@pytest.fixture(autouse=True)
def user_directories(tmp_path_factory, monkeypatch):
    """No compiled program is kept in the user's cache."""
    monkeypatch.setattr(cli, "_enable_compile_cache", lambda: None)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def recorded(model):
    recorder = Recorder(lambda tokens: values(model, tokens))
    for _ in recorder(TOKENS):
        pass
    return recorder.golden({"config": dataclasses.asdict(CONFIG)})


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def golden_folder(request, tmp_path_factory):
    """A committed golden file, and the random checkpoint that it is of."""
    config = Config(**golden.load(request.param).provenance["config"])
    folder = tmp_path_factory.mktemp("golden") / "checkpoint"
    return request.param, synthetic.write(config, folder)


def test_we_agree_with_the_golden_files(golden_folder, capsys):
    """Made with PyTorch by `parity --save`, they need none to be compared with."""
    file, folder = golden_folder
    assert cli.main(["parity", str(folder), "--golden", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "No divergence" in out and "other weights" not in err
    assert golden.load(file).provenance["versions"]["torch"]


def test_the_golden_files_find_a_fault(golden_folder):
    file, folder = golden_folder
    model = load(folder, dtype=jnp.float32)
    with FAULTS["window off by one"].planted(model):
        report = compare(model, golden.load(file))
    assert report.first == "layers.0.attention.heads"
    window = model.config.sliding_window
    assert f"a window of {window} keys, not {window + 1}" in report.sentence


def test_a_golden_file_is_judged_by_its_logits_too_and_has_no_other_names(golden_folder):
    file, folder = golden_folder
    kept, model = golden.load(file), load(folder, dtype=jnp.float32)
    report = compare(model, dataclasses.replace(kept, values={}))
    assert report.ok and [op.name for op in report.ops] == ["logits"]
    other = dataclasses.replace(kept.logits, logsumexp_T=kept.logits.logsumexp_T + 0.1)
    assert compare(model, dataclasses.replace(kept, logits=other)).first == "logits"
    renamed = {f"x{name}": value for name, value in kept.values.items()}
    with pytest.raises(ValueError, match="of no known name: xembedding"):
        compare(model, dataclasses.replace(kept, values=renamed))


def test_a_golden_file_comes_back_as_it_was(recorded, tmp_path):
    golden.save(recorded, tmp_path / "x.npz")
    again = golden.load(tmp_path / "x.npz")
    assert list(tmp_path.iterdir()) == [tmp_path / "x.npz"]
    assert again.provenance == recorded.provenance and again.values.keys() == recorded.values.keys()
    for name, x in recorded.values.items():
        np.testing.assert_array_equal(again.values[name].values, x.values)
        np.testing.assert_array_equal(again.values[name].size_T, x.size_T)


def test_the_fingerprint_is_the_checkpoints(tmp_path):
    one = golden.fingerprint(open_source(synthetic.write(TINY, tmp_path / "hf")))
    layout = synthetic.write(TINY, tmp_path / "original", "original")
    other = synthetic.write(TINY, tmp_path / "other", seed=1)
    assert golden.fingerprint(open_source(layout)) == one
    assert golden.fingerprint(open_source(other)) != one


def test_the_page_is_one_file_and_says_it_all(recorded, tmp_path):
    with FAULTS["nibbles swapped"].planted(random_model(CONFIG)) as faulty:
        report = compare(faulty, recorded)
    html.write(
        report, tmp_path / "report.html", "a <b> against it", decode=lambda token: f"<{token}>"
    )
    text = (tmp_path / "report.html").read_text()
    assert text.count(escaping.escape(report.sentence)) == 2  # on top, and below the table
    assert text.count("a &lt;b&gt; against it") == 2
    assert not re.search(r"https?:|src=|@import|<script", text)
    assert text.count("<svg") == 4 and "layers.1.mlp.out: " in text
    assert f"&lt;{TOKENS[report.predictions.kl_T.argmax()]}&gt;" in text
    assert len(list(tmp_path.iterdir())) == 1


def test_bad_golden_files_are_refused_in_one_line(recorded, tmp_path, capsys):
    folder = str(synthetic.write(CONFIG, tmp_path / "checkpoint"))
    file = tmp_path / "x.npz"
    golden.save(recorded, file)
    np.savez(tmp_path / "lacking.npz", **{k: v for k, v in np.load(file).items() if k != "sizes"})
    np.savez(tmp_path / "arrays.npz", embedding=np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "half.npz").write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with open(tmp_path / "array.npz", "wb") as stream:
        np.save(stream, np.zeros(3))
    mine = tmp_path / "mine.npz"
    np.savez(mine, tokens=TOKENS, embedding=np.zeros((24, CONFIG.hidden_size)))
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    small = str(synthetic.write(dataclasses.replace(CONFIG, vocab_size=97), tmp_path / "small"))
    for arguments, said in [
        ([folder, "--golden", str(tmp_path / "lacking.npz")], "it lacks sizes"),
        ([folder, "--golden", str(tmp_path / "arrays.npz")], "not a whole golden file"),
        ([folder, "--golden", str(tmp_path / "text.npz")], "is not a whole .npz file"),
        ([folder, "--golden", str(tmp_path / "none.npz")], "none.npz"),
        ([small, "--golden", str(file)], "this one has vocab_size 97, not 101"),
        ([folder, "--golden", str(file), "--ids", "1,2"], "leave out --ids"),
        ([folder, "--reference", str(mine), "--seed", "1"], "leave out --seed"),
        ([folder, "--reference", str(tmp_path / "text.npz")], "not a whole .npz file"),
        ([folder, "--golden", str(tmp_path / "half.npz")], "not a whole .npz file"),
        ([folder, "--golden", str(tmp_path / "array.npz")], "not a whole .npz file"),
        ([folder, "--length", "3", "--html", "none/x.html"], "in a folder that exists"),
        ([folder, "--text", ""], "--text must not be empty"),
        ([folder, "--seed", "-1"], "--seed must not be negative"),
        ([folder, "--reference", str(tmp_path / "arrays.npz")], "must hold tokens"),
        ([folder, "--reference", small], "which has vocab_size 101, not 97"),
        ([folder, "--reference", str(file)], f"--golden {file} compares with it"),
        ([folder, "--save", str(tmp_path)], "is a folder"),
        ([folder, "--html", ""], "is a folder"),
        ([folder, "--ids", "1,2", "--seed", "3"], "--seed is of random tokens"),
        ([folder, "--golden", str(file), "--save", "y.npz"], "nothing saved"),
        ([folder, "--length", "0"], "at least 1 token"),
        ([str(tmp_path / "none"), "--length", "3"], "none"),
        ([str(tmp_path / "llama")], 'must have model_type "gpt_oss"'),
    ]:
        assert cli.main(["parity", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("provenance", lambda x: np.str_("not json")),
        ("provenance", lambda x: np.str_("[]")),
        ("provenance", lambda x: np.str_('{"config": {"hidden_size": 32}}')),
        ("tokens", lambda x: x.astype(float)),
        ("tokens", lambda x: x + 1000),
        ("tokens", lambda x: x[:3]),
        ("names", lambda x: x[:-1]),
        ("sizes", lambda x: x[:, :2]),
        ("samples", lambda x: x.astype(str)),
        ("rows", lambda x: x + 50),
        ("columns", lambda x: x + 5000),
        ("experts", lambda x: x[:, :2]),
        ("experts", lambda x: x + 90),
        ("logits_ids", lambda x: x + 9000),
        ("logits_next_T", lambda x: x[None]),
    ],
)
def test_damaged_golden_files_are_refused(recorded, tmp_path, name, change):
    golden.save(recorded, tmp_path / "x.npz")
    arrays = golden.read(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", **arrays | {name: change(arrays[name])})
    with pytest.raises(ValueError, match="is a damaged golden file"):
        golden.load(tmp_path / "x.npz")


def test_logits_that_are_not_numbers_show_on_the_page(model):
    arrays = {name: x for stage in values(model, TOKENS) for name, x in stage.items()}
    arrays["logits"][3, 4] = np.nan
    report = compare(model, arrays, TOKENS)
    assert report.first == "logits" and report.predictions.worst(1) == [3]
    assert "<td>nan</td>" in html.page(report, "title")


def test_without_pytorch_one_line_says_so(tmp_path, monkeypatch, capsys):
    folder = str(synthetic.write(CONFIG, tmp_path / "checkpoint"))
    for module, name in (("torch", "official"), ("transformers", "hf")):
        monkeypatch.setitem(sys.modules, module, None)
        assert cli.main(["parity", folder, "--reference", name]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"{name!r} needs torch" in err and "--golden" in err


def test_the_command_compares_checkpoints_and_precisions(tmp_path, capsys):
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    one, other = (
        str(synthetic.write(config, tmp_path / str(seed), seed=seed)) for seed in range(2)
    )
    kept = str(tmp_path / "kept.npz")
    page = tmp_path / "page.html"
    run = ["parity", one, "--length", "12", "--reference"]
    assert cli.main([*run, one, "--save", kept, "--html", str(page)]) == 0
    assert cli.main([*run, one, "--dtype", "bfloat16"]) == 0
    assert cli.main([*run, other]) == 1
    assert "First divergence: embedding" in capsys.readouterr().out
    assert cli.main(["parity", other, "--golden", kept]) == 1
    assert "other weights" in capsys.readouterr().err
    assert page.read_text().startswith("<!doctype html>")
    stages = values(load(one, dtype=jnp.float32), TOKENS)
    arrays = {name: x for stage in stages for name, x in stage.items()}
    np.savez(tmp_path / "mine.npz", tokens=TOKENS, **arrays)
    assert cli.main(["parity", one, "--reference", str(tmp_path / "mine.npz")]) == 0
