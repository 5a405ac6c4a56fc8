"""Programs compiled ahead are those that generation looks for, and archives are whole or not."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from sizes import SHARDABLE, WHOLE_VOCABULARY

from gpt_oss_jax import cli, compile_archive
from gpt_oss_jax.checkpoint import load, loading, outline, preparations, synthetic
from gpt_oss_jax.generate import ahead, generate_batch, loop
from gpt_oss_jax.sampling import SamplingParams
from gpt_oss_jax.sharding import make_mesh

NAMES = {"empty_cache", "prefill", "begin", "_decode", "grown"}
# Another process, which finds what an archive brought, or does not.
RUN = """
import json, sys
import jax
from gpt_oss_jax import cli

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.split("/")[-1]))
archive, model, *arguments = sys.argv[1:]
assert cli.main(["compile", "--unpack", archive]) == 0
assert cli.main(["generate", model, "word " * 200, "--max-tokens", "5", *arguments]) == 0
counts = [events.count(x) for x in ("compile_requests_use_cache", "cache_hits")]
sys.stderr.write("\\n" + json.dumps([*counts, jax.config.jax_compilation_cache_dir]))
"""


def kept(directory) -> set[str]:
    """Names of the programs of generation in a directory."""
    names = (path.name for path in compile_archive.programs(directory))
    return {name for name in names if name.rsplit("-", 2)[0].removeprefix("jit_") in NAMES}


def process(tmp_path, *arguments):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


def test_an_archive_spares_a_new_process_all_compiling(tmp_path):
    folder, archive = str(synthetic.write(WHOLE_VOCABULARY, tmp_path / "model")), tmp_path / "a.tar"
    compile = ["-m", "gpt_oss_jax", "compile", folder, "-c", "400", "--output", str(archive)]
    done = process(tmp_path, *compile)
    assert done.stdout.startswith("5 programs for cpu in ") and "MB: " in done.stdout
    assert "decode: 1 x 512 slots, temperature: " in done.stderr and " s, 0." in done.stderr
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.tar", "cache", "model"]
    for arguments in ((), ("--temperature", "0")):
        done = process(tmp_path, "-c", RUN, str(archive), folder, *arguments)
        asked, found, directory = json.loads(done.stderr.splitlines()[-1])
        assert asked == found >= 4
        assert {x.split("-")[0] for x in kept(Path(directory))} == {
            "jit_empty_cache",
            "jit_prefill",
            "jit_begin",
            "jit__decode",
        }
        assert len(kept(Path(directory))) == 5


@pytest.mark.parametrize(
    ("axes", "form", "context"),
    [
        ({}, None, 600),
        ({"fsdp": 2, "context": 2, "expert": 2}, "folded", 400),
    ],
    ids=["one device", "a mesh"],
)
def test_shapes_give_the_programs_of_arrays(tmp_path, monkeypatch, axes, form, context):
    """With the weights in the order of a TPU, one of them bound to its device."""
    monkeypatch.setattr(loading, "_platform", lambda mesh: "tpu")
    folder = synthetic.write(SHARDABLE, tmp_path / "model")
    jax.clear_caches()  # What an earlier test compiled would not be compiled again.
    greedy, mesh = SamplingParams(0.0), make_mesh(**axes) if axes else None
    with compile_archive.kept_in(tmp_path / "ahead"):
        options = {"mesh": mesh, "dtype": jnp.float32, "expert_form": form}
        model = outline(SHARDABLE, **options)
        of_use = {"context": context, "batch": 2, "memory": 0, "samplings": [greedy]}
        made = len(list(ahead.programs(model, **of_use)))
        made += len([lowered.compile() for _, lowered in preparations(model)])
        before = compile_archive.programs(tmp_path / "ahead")
        assert made == len(before) == (9 + 3 if form is None else 4 + 5)
        model = load(folder, **options)
        prompts = [[1, 2, 3], [4] * 200]  # Of which one is read in two calls.
        generate_batch(model, prompts, max_tokens=context - 250, sampling=greedy, stop_tokens=())
        assert compile_archive.programs(tmp_path / "ahead") == before


def test_every_size_that_generation_takes():
    assert ahead.cache_sizes(2, 1, "cpu", 0) == {512: ()}
    both = (128, 1024)
    assert ahead.cache_sizes(2048, 1, "tpu", 0) == {512: (128,), 1024: both, 2048: both}
    gpu = (1, "gpu", 80 * 2**30)
    found = ahead.cache_sizes(16384, *gpu)
    assert found[16384] == (128, 1024, 4096, 8192)
    for prompt in (1, 130, 500, 641, 6000, 9000, 16383):
        for furthest in (prompt, prompt + 300, 16383):
            slots = loop.first_slots(prompt, min(furthest, 16383))
            assert set(loop.prompt_calls(prompt - 1, *gpu)) <= set(found[slots])
    with pytest.raises(ValueError, match="must hold a prompt and an answer, got 1 tokens"):
        ahead.cache_sizes(1, 1, "cpu", 0)


@pytest.fixture
def programs(tmp_path):
    directory = tmp_path / "programs"
    directory.mkdir()
    for name in ("jit_a-0-cache", "jit_b-1-cache"):
        (directory / name).write_bytes(name.encode() * 1000)
    return directory


def test_what_goes_in_comes_out(tmp_path, programs):
    chip, archive = jax.devices()[0], tmp_path / "a.tar"
    (programs / "xla_gpu_per_fusion_autotune_cache_dir").mkdir()
    assert compile_archive.pack(programs, archive, chip) == archive.stat().st_size
    assert compile_archive.unpack(archive, tmp_path / "new", chip) == 2
    for path in compile_archive.programs(programs):
        assert (tmp_path / "new" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "new").iterdir())) == 2


def test_nothing_half_packed_is_left(tmp_path, programs):
    chip, archive = jax.devices()[0], tmp_path / "a.tar"
    compile_archive.pack(programs, archive, chip)
    before = archive.read_bytes()
    (programs / "jit_c-2-cache").mkdir()  # Which cannot be read as a program.
    with pytest.raises(OSError):
        compile_archive.pack(programs, archive, chip)
    assert archive.read_bytes() == before
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.tar", "programs"]


def test_an_archive_is_a_file(tmp_path, capsys):
    assert cli.main(["compile", "--unpack", str(tmp_path / "none.tar")]) == 2
    assert "none.tar is no file" in capsys.readouterr().err


def test_nothing_half_unpacked_is_left(tmp_path, programs):
    chip, archive = jax.devices()[0], tmp_path / "a.tar"
    compile_archive.pack(programs, archive, chip)
    archive.write_bytes(archive.read_bytes()[:20_000])
    with pytest.raises(ValueError, match="no archive of compiled programs: unexpected end"):
        compile_archive.unpack(archive, tmp_path / "new", chip)
    assert not (tmp_path / "new").exists()


def test_programs_for_another_machine_are_refused(tmp_path, programs, monkeypatch):
    chip, archive = jax.devices()[0], tmp_path / "a.tar"
    compile_archive.pack(programs, archive, chip)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_something=true")
    with pytest.raises(ValueError, match=r"(?s)another machine:\n  flags: .*something=true'\nComp"):
        compile_archive.unpack(archive, tmp_path / "new", chip)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["../jit_a-0-cache", "jit_a-0-atime", "/etc/jit_a-0-cache"])
def test_other_files_are_refused(tmp_path, programs, name):
    chip, archive = jax.devices()[0], tmp_path / "a.tar"
    compile_archive.pack(programs, archive, chip)
    with tarfile.open(archive, "a") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(ValueError, match="no compiled program"):
        compile_archive.unpack(archive, tmp_path / "new", chip)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "either a MODEL"),
        (["20b", "--unpack", "a.tar"], "either a MODEL"),
        (["--unpack", __file__], "no archive of compiled programs"),
        (["20b", "--device", "v5e"], "need --output"),
        (["20b", "--device", "h100", "--output", "a.tar"], "only TPUs"),
        (["20b", "--output", "no/such/folder/a.tar"], "does not exist"),
        (["20b", "-c", "1"], "2 to 131,072 tokens"),
    ],
)
def test_what_is_wrong_is_said_at_once(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(cli, "_enable_compile_cache", lambda: None)
    with compile_archive.kept_in(tmp_path):
        assert cli.main(["compile", *arguments]) == 2
    assert said in capsys.readouterr().err
