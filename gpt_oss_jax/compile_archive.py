"""Compiled programs of JAX's persistent cache in one file, to be carried to another machine.

A tar of the cache's own files and of a note that says what they are for, so that `tar` unpacks it
as well. JAX finds a program by a name that hashes all it was compiled from and for; the note makes
it possible to say why one would not be found. Programs are machine code: unpack only your own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from gpt_oss_jax.compile_cache import processor_digest

NOTE = "gpt-oss-jax-programs.json"
_PROGRAM = re.compile(r"[\w.-]+-cache")
# With all programs, of any size and time of compiling, and no failure to keep one passed over.
_KEEP_ALL = {
    "jax_enable_compilation_cache": True,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
    "jax_raise_persistent_cache_errors": True,
}


@contextlib.contextmanager
def kept_in(directory: Path) -> Iterator[None]:
    """Everything that is compiled meanwhile is kept there, and nowhere else."""
    wanted = _KEEP_ALL | {"jax_compilation_cache_dir": str(directory)}
    before = {name: getattr(jax.config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def programs(directory: Path) -> list[Path]:
    """Files of the programs that are kept in a directory."""
    return sorted(x for x in directory.glob("*-cache") if _PROGRAM.fullmatch(x.name))


def pack(directory: Path, archive: Path, device) -> int:
    """Writes the archive, whole or not at all, over one that is there.

    Args:
      directory: Of the programs.
      archive: To write.
      device: One that they were compiled for; it need not be there.

    Returns:
      Bytes of the archive.
    """
    descriptor, unfinished = tempfile.mkstemp(prefix=f".{archive.name}-", dir=archive.parent)
    try:
        with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
            note = json.dumps(made_for(device), indent=2).encode() + b"\n"
            entry = tarfile.TarInfo(NOTE)
            entry.size = len(note)
            tar.addfile(entry, io.BytesIO(note))
            for path in programs(directory):
                entry = tarfile.TarInfo(path.name)
                entry.size = path.stat().st_size
                with path.open("rb") as content:
                    tar.addfile(entry, content)
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, archive)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return archive.stat().st_size


def unpack(archive: Path, directory: Path, device) -> int:
    """Puts an archive's programs into a directory, each whole or not at all.

    Args:
      archive: Of `pack`.
      directory: JAX's persistent cache.
      device: One of this machine's.

    Returns:
      How many programs there were.

    Raises:
      ValueError: It is no such archive, or its programs are for another machine; then nothing is
        unpacked.
    """
    try:
        with tarfile.open(archive, "r:") as tar:
            entries = tar.getmembers()
            names = [x.name for x in entries if x.isfile()]
            if names[:1] != [NOTE] or len(names) < len(entries):
                raise ValueError(f"{archive} is no archive of compiled programs.")
            if strange := [name for name in names[1:] if not _PROGRAM.fullmatch(name)]:
                raise ValueError(f"{archive} holds what is no compiled program: {strange[0]!r}.")
            _check(json.load(tar.extractfile(NOTE)), device)
            directory.mkdir(parents=True, exist_ok=True)
            # Where programs lie they have their names at once, and JAX reads them while we write.
            with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=directory) as unfinished:
                tar.extractall(unfinished, entries[1:], filter="data")
                for name in names[1:]:
                    os.replace(Path(unfinished, name), directory / name)
    except (tarfile.TarError, json.JSONDecodeError) as error:
        raise ValueError(f"{archive} is no archive of compiled programs: {error}.") from error
    return len(names) - 1


def _check(note: dict[str, str], device) -> None:
    """Refuses what JAX would not find, and would compile again without a word."""
    here = made_for(device)
    other = [
        f"\n  {name}: {note.get(name, 'not said')!r}, here {here[name]!r}"
        for name in here
        if note.get(name) != here[name]
    ]
    if other:
        raise ValueError(
            f"these programs are for another machine:{''.join(other)}\n"
            "Compile for this one, with the same versions and settings."
        )


def made_for(device) -> dict[str, str]:
    """What of a machine goes into the names of the programs that run on it."""
    client = device.client
    flags = f"{os.environ.get('XLA_FLAGS', '')} {os.environ.get('LIBTPU_INIT_ARGS', '')}".split()
    zstd = any(importlib.util.find_spec(x) for x in ("zstandard", "compression"))
    found = {
        "jax": jax.__version__,
        "device": device.device_kind,
        "devices": str(client.device_count()),
        "compiler": client.platform_version,
        "flags": " ".join(sorted(flags)),
        "compressed by": "zstandard" if zstd else "zlib",
    }
    if device.platform == "cpu":
        found["processor"] = processor_digest()
    return found
