"""`python -m convert`: there and back, refusals on stderr, help."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_oracle import read_all, same_bits
from sizes import TINY

from convert.__main__ import main
from gpt_oss_jax.checkpoint import synthetic

ROOT = Path(__file__).parents[1]


def test_there_and_back(tmp_path):
    """As a user types it, in a process of its own."""
    synthetic.write(TINY, tmp_path / "original", "original")
    command = [sys.executable, "-m", "convert"]
    for arguments in (("original", "orbax"), ("orbax", "back", "--to", "original")):
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        written = f"gpt-oss-jax: {arguments[1]} is written, read back and equal\n"
        assert (done.returncode, done.stdout, done.stderr) == (0, "", written)
    same_bits(read_all(tmp_path / "back"), read_all(tmp_path / "original"))


def test_refuses_in_one_line(tmp_path, capsys):
    synthetic.write(TINY, tmp_path / "hf")
    assert main([str(tmp_path / "hf"), str(tmp_path / "hf")]) == 2
    refusal = f"{tmp_path / 'hf'} exists; name a new folder, or remove it first."
    assert capsys.readouterr().err == f"gpt-oss-jax: {refusal}\n"
    assert main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert os.listdir(tmp_path) == ["hf"]


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "SRC" in capsys.readouterr().out.upper()
