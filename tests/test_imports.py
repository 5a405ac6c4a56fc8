"""The layers of the package: imports point down, and siblings do not know each other."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gpt_oss_jax"
OUTSIDE = {"convert", "benchmarks", "examples", "tests"}

LAYERS = [
    {"_compat", "directories"},
    {
        "aot",
        "compile_cache",
        "config",
        "quant",
        "sampling",
        "sharding",
        "distributed",
        "harmony",
    },
    {"kernels", "compile_archive"},
    {"model"},
    {"checkpoint", "generate", "cost", "limits"},
    {"parity", "plan", "tools"},
    {"chat"},
    {"__init__"},
    {"serving", "finetune", "bench", "doctor"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(source: str) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it, functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(own: str, source: str) -> list[str]:
    """What `source`, a file of the module `own`, imports although it must not."""
    found = []
    for name in imported(source):
        top, *rest = name.split(".")
        if top in OUTSIDE:
            found.append(f"{name}: outside the package")
        elif top == "openai_harmony" and own != "harmony":
            found.append(f"{name}: only harmony knows it")
        elif top == "gpt_oss_jax":
            # A bare `import gpt_oss_jax` and `from gpt_oss_jax import load` mean the public face.
            module = rest[0] if rest and rest[0] in LEVEL else "__init__"
            if module != own and LEVEL[module] >= LEVEL[own]:
                found.append(f"{name}: {module} is not below {own}")
    return found


def modules() -> list[Path]:
    return sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=str)
def test_imports_point_down(path):
    own = module_of(path)
    assert own in LEVEL, f"{path}: give {own} a level in LAYERS"
    assert violations(own, (PACKAGE / path).read_text()) == []


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ("kernels", "from gpt_oss_jax.model.rope import rotate"),
        ("kernels", "import gpt_oss_jax.model"),
        ("kernels", "from gpt_oss_jax import model"),
        ("kernels", "def f():\n    from gpt_oss_jax import load"),
        ("generate", "from gpt_oss_jax.checkpoint import load"),
        ("model", "import tests.conftest"),
        ("checkpoint", "from convert import main"),
        ("chat", "import openai_harmony"),
    ],
)
def test_a_planted_import_is_caught(own, line):
    assert len(violations(own, line)) == 1


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ("model", "from gpt_oss_jax.kernels.attention import attention"),
        ("model", "from gpt_oss_jax.model.rope import rotate"),
        ("harmony", "import openai_harmony"),
        ("cli", "from gpt_oss_jax.chat import Chat\nimport jax"),
    ],
)
def test_what_is_allowed_passes(own, line):
    assert violations(own, line) == []


def test_importing_leaves_logging_alone():
    """Orbax's import would take a program's `logging.basicConfig` away from it."""
    code = """
import logging, sys
import gpt_oss_jax
assert "orbax.checkpoint" not in sys.modules, "half a second that nobody asked for"
from gpt_oss_jax.checkpoint._orbax import orbax_v1
orbax_v1()
assert not logging.root.handlers, logging.root.handlers
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
