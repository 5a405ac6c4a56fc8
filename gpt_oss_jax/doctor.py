"""What a bug report must say, and what is wrong: versions, devices, vocabulary, checkpoint.

Reads headers and metadata only, so a checkpoint of any size takes seconds, and downloads nothing.
Run it as `gpt-oss-jax doctor [MODEL]`.
"""

import dataclasses
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import jax

from gpt_oss_jax import __version__, compile_cache
from gpt_oss_jax.checkpoint import open_source
from gpt_oss_jax.config import GPT_OSS_20B, GPT_OSS_120B, Config
from gpt_oss_jax.harmony import read_vocabulary, vocabulary_path
from gpt_oss_jax.kernels.target import host_memory, why_not_several_gpus

_DISTRIBUTIONS = ("jax", "jaxlib", "flax", "orbax-checkpoint", "openai-harmony", "numpy")
_SETTINGS = ("JAX_", "XLA_", "LIBTPU_", "TIKTOKEN_", "HF_", "CUDA_VISIBLE", "TPU_VISIBLE")
_SECRETS = ("_TOKEN", "_KEY", "_SECRET", "_PASSWORD")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
      about: What was looked at.
      text: What was found.
      is_problem: Whether somebody has to do something about it.
    """

    about: str
    text: str
    is_problem: bool = False


def examine(model: str | None = None) -> Iterator[Finding]:
    """Looks at one thing after the other and never raises for what it finds.

    Args:
      model: A checkpoint to look at too: anything with files that `load` takes.
    """
    yield from _versions()
    yield from _devices()
    yield _vocabulary()
    yield _compile_cache()
    yield from _settings()
    if model is not None:
        yield from _checkpoint(model)


def _versions() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    found = [f"gpt-oss-jax {__version__}"]
    for name in _DISTRIBUTIONS:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            yield Finding("versions", f"{name} is not installed: pip install {name}", True)
    yield Finding("versions", ", ".join(found))


def why_no_device(error: Exception) -> str:
    """What JAX says, or what it means where it says nothing."""
    if not str(error) and (named := os.environ.get("JAX_PLATFORMS")):
        return f"JAX_PLATFORMS={named}, of which no plugin is installed"
    return str(error) or type(error).__name__


def _devices() -> Iterator[Finding]:
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        yield Finding("devices", f"JAX finds none: {why_no_device(error)}", True)
        return
    for device in devices:
        stats = device.memory_stats() or {}
        memory = "memory not reported"
        if "bytes_limit" in stats:
            used, limit = stats.get("bytes_in_use", 0), stats["bytes_limit"]
            memory = f"{limit / 1e9:.1f} GB for JAX, {used / 1e9:.1f} GB in use"
        yield Finding("device", f"{device}: {device.device_kind}, {memory}")
    if devices[0].platform == "gpu":
        share = os.environ.get("XLA_CLIENT_MEM_FRACTION") or os.environ.get(
            "XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"
        )
        yield Finding("device", f"JAX takes {share} of a GPU's memory: XLA_CLIENT_MEM_FRACTION")
        if len(devices) > 1 and (reason := why_not_several_gpus()):
            yield Finding("devices", reason, True)
    yield Finding("host", f"{os.cpu_count()} processors, {host_memory() / 1e9:.1f} GB of memory")


def _vocabulary() -> Finding:
    path = vocabulary_path()
    try:
        read_vocabulary(path)
    except ValueError as error:
        return Finding("vocabulary", str(error), True)
    return Finding("vocabulary", f"{path}, SHA-256 as it should be")


def _compile_cache() -> Finding:
    chosen = jax.config.jax_compilation_cache_dir
    if "://" in str(chosen):
        return Finding("cache", f"{chosen}, not looked at")
    try:
        directory = Path(chosen) if chosen else compile_cache.default_directory()
    except OSError as error:
        return Finding("cache", str(error), True)
    if not directory.is_dir():
        return Finding("cache", f"{directory}, not there yet")
    sizes = [path.stat().st_size for path in directory.glob("*-cache")]
    if not os.access(directory, os.W_OK):
        return Finding(
            "cache", f"{directory} cannot be written: set JAX_COMPILATION_CACHE_DIR", True
        )
    return Finding("cache", f"{directory}, {len(sizes)} programs, {sum(sizes) / 1e6:.1f} MB")


def _settings() -> Iterator[Finding]:
    for name in sorted(os.environ):
        if name.startswith(_SETTINGS):
            value = "(set)" if name.endswith(_SECRETS) else os.environ[name]
            yield Finding("setting", f"{name}={value}")


def _checkpoint(model: str) -> Iterator[Finding]:
    try:
        source = open_source(model, download=False)
    except (ValueError, OSError) as error:
        for line in str(error).splitlines():
            yield Finding("checkpoint", line.strip(), True)
        return
    size = sum(variable.nbytes for variable in source.variables.values())
    yield Finding(
        "checkpoint",
        f"{source.folder}, {_size_name(source.config)}, {len(source.variables)} variables, "
        f"{size / 1e9:.2f} GB: index, files and shapes agree",
    )


def _size_name(config: Config) -> str:
    names = {GPT_OSS_20B: "gpt-oss-20b", GPT_OSS_120B: "gpt-oss-120b"}
    return names.get(config, f"{config.num_hidden_layers} layers of width {config.hidden_size}")
