"""What the README tells people to type exists, and its Python runs."""

import re
import shlex
from pathlib import Path

import pytest

from gpt_oss_jax.cli import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    return [text for found, text in BLOCKS if found == language]


def lines() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines()]


def commands(program: str) -> list[str]:
    inline = re.findall(r"`([^`\n]+)`", README)
    return [line for line in lines() + inline if line.split()[:1] == [program]]


@pytest.mark.parametrize("line", commands("gpt-oss-jax"))
def test_commands_parse(line):
    _, *arguments = shlex.split(line, comments=True)
    build_parser().parse_args(arguments)


@pytest.mark.parametrize("line", commands("make"))
def test_make_targets_exist(line):
    target = shlex.split(line, comments=True)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_every_command_is_shown():
    shown = {line.split()[1] for line in commands("gpt-oss-jax")}
    of_checkpoints = {"convert", "export", "parity", "doctor"}
    assert shown == of_checkpoints | {"chat", "generate", "bench", "plan", "compile"}


def test_extras_exist():
    pyproject = (ROOT / "pyproject.toml").read_text()
    extras = set(re.findall(r"\.\[(\w+)\]", README)) | set(re.findall(r"`\[(\w+)\]`", README))
    assert extras
    for extra in extras:
        assert re.search(rf"^{extra} = \[", pyproject, flags=re.MULTILINE), extra


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def tree() -> list[str]:
    """Paths of the tree; what is indented lies in the last folder that is not."""
    (block,) = blocks("")
    found, top = [], ""
    for line in block.splitlines():
        top = top if line.startswith(" ") else line.split()[0]
        found.append(top if not line.startswith(" ") else top + line.split()[0])
    return found


@pytest.mark.parametrize("path", tree())
def test_the_tree_is_there(path):
    assert (ROOT / path).exists()


def test_the_tree_is_whole():
    for package in (ROOT / "gpt_oss_jax").glob("*/__init__.py"):
        assert f"gpt_oss_jax/{package.parent.name}/" in tree()


@pytest.mark.parametrize("source", blocks("python"), ids=["chat", "below harmony"])
def test_python_runs(source, capsys):
    exec(compile(source, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
