"""Save, convert and export: from a model or a checkpoint to a new checkpoint, whole or not at all.

What is written lies in a folder beside the target until it is complete and has been read back; then
it is renamed.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from gpt_oss_jax import distributed
from gpt_oss_jax.checkpoint import names, orbax, writer
from gpt_oss_jax.checkpoint.experts import Source, expert_kinds, with_experts
from gpt_oss_jax.checkpoint.files import Folder, LocalFolder, open_folder
from gpt_oss_jax.checkpoint.hub import resolve
from gpt_oss_jax.checkpoint.loading import open_source, origin
from gpt_oss_jax.checkpoint.names import BF16, Variable
from gpt_oss_jax.checkpoint.progress import progress
from gpt_oss_jax.checkpoint.stream import Request
from gpt_oss_jax.config import Config
from gpt_oss_jax.model import Transformer
from gpt_oss_jax.quant import MXArray

FORMATS = ("orbax", *writer.FORMATS)
SIDE_FILES = (
    "LICENSE",
    "NOTICE",
    "README.md",
    "USAGE_POLICY",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def save(
    model: Transformer,
    path: str | os.PathLike,
    *,
    format: str = "orbax",
    files_from: str | os.PathLike | None = None,
) -> None:
    """Writes a model to a new folder.

    Checkpoints hold bfloat16. A float32 value that came from bfloat16, and was not changed, is
    written as it came, bit for bit; another is rounded to the nearest, ties to even, which is said
    on stderr. Experts in MXFP4 are written as they are, or decoded, exactly, for "hf-bf16"; dense
    ones are quantised for "hf-mxfp4" and "original".

    Of a model that is spread over several processes, which all call this, process 0 writes one
    variable after the other; each is whole on every device then, and no two are. For "orbax" there
    must be room on the disk for two.

    Args:
      model: To write.
      path: A folder that does not exist.
      format: "orbax" (ours), "hf-mxfp4" or "hf-bf16" (Transformers), "original" (the reference).
      files_from: Whose tokenizer, chat template, generation config and licence to carry over. None:
        of what the model was loaded from, if it was.

    Raises:
      ValueError: If the folder exists, the format is unknown or cannot hold the model, or what was
        written does not read back the same.
    """
    folder = origin(model) if files_from is None else open_folder(resolve(files_from))
    files = {} if folder is None else _side_files(folder)
    source = _ModelSource(model)
    if source.spread and distributed.index():
        source.serve()
        return
    try:
        if format == "orbax" and distributed.count() > 1:
            _write_orbax_apart(source, path, files)
        else:
            _write(source, path, format, files)
    except Exception as error:
        source.dismiss(str(error))
        raise
    source.dismiss(None)
    if source.rounded:
        sys.stderr.write(
            f"Rounded to bfloat16: {len(source.rounded)} float32 tensors that it cannot hold "
            f"exactly, {source.rounded[0]} first.\n"
        )


def convert(src: str | os.PathLike, dst: str | os.PathLike) -> None:
    """Writes any checkpoint that `load` takes as an Orbax one, tensor by tensor.

    Killed on the way, it goes on where it was when it is called again. As `export` does, it takes
    one process for each disk.

    Args:
      src: What `load` takes.
      dst: A folder that does not exist.

    Raises:
      ValueError: As `load` and `save`.
    """
    export(src, dst, "orbax")


def export(src: str | os.PathLike, dst: str | os.PathLike, to: str) -> None:
    """Writes any checkpoint that `load` takes in another format, tensor by tensor.

    Where several processes call it, process 0 writes while the others wait; then those write, too,
    that do not see the folder, because they have another disk.

    Args:
      src: What `load` takes.
      dst: A folder that does not exist.
      to: As `save`'s `format`.

    Raises:
      ValueError: As `load` and `save`.
    """
    path = _check(dst, to)
    source = open_source(src)

    def write():
        if to == "orbax" and distributed.count() > 1:
            _convert_apart(src, path)
        else:
            _write(source, path, to, _side_files(source.folder), _fingerprint(source))

    distributed.once(write, path.exists)


def _write(
    source: Source, path, format: str, files: Mapping[str, bytes], fingerprint: str | None = None
) -> None:
    """Writes beside the target, verifies, renames.

    Args:
      source: Of the variables.
      path: The target.
      format: Of `FORMATS`.
      files: Name -> content of the files to lay beside the weights.
      fingerprint: Of the source, to go on from what an earlier call left; None begins anew.
    """
    path = _check(path, format)
    layout = format
    if format == "orbax":
        layout = "hf-bf16" if expert_kinds(source) == {"dense"} else "hf-mxfp4"
    files = dict(files) | writer.config_files(source.config, layout)
    target = source if format == "orbax" else with_experts(source, writer.EXPERTS[format])
    total = sum(x.nbytes for x in target.variables.values())
    resumable = format == "orbax" and fingerprint is not None
    work = _work_folder(path, resumable)
    unfinished = work / path.name
    lock = _locked(work, path) if resumable else None
    try:
        _check(path, format)
        _check_room(work, total)
        with progress(f"writing {path.name}", total) as step:
            if format == "orbax":
                orbax.write_orbax(source, unfinished, fingerprint or "", step)
                orbax.finalize(unfinished, files)
            else:
                unfinished.mkdir()
                sums = writer.write_tensors(source, unfinished, format, step)
                for name, content in files.items():
                    (unfinished / name).write_bytes(content)
        with progress(f"checking {path.name}", total) as step:
            if format == "orbax":
                orbax.verify(orbax.open_orbax(LocalFolder(unfinished)), step)
            else:
                writer.verify(unfinished, sums, step)
        try:
            os.rename(unfinished, path)
        except OSError as error:
            raise ValueError(f"{path} cannot get its name: {error}.") from error
        shutil.rmtree(work)
    except BaseException as error:
        # Stopped by hand, a conversion can be gone on with; anything else leaves nothing behind.
        if not resumable or isinstance(error, Exception):
            shutil.rmtree(work)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _write_orbax_apart(source: Source, path, files: Mapping[str, bytes]) -> None:
    """Writes safetensors beside the target, and converts them."""
    path = _check(path, "orbax")
    path.parent.mkdir(parents=True, exist_ok=True)
    layout = "hf-bf16" if expert_kinds(source) == {"dense"} else "hf-mxfp4"
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as work:
        _write(source, Path(work, "safetensors"), layout, files)
        _convert_apart(Path(work, "safetensors"), path)


def _convert_apart(src, path: Path) -> None:
    """Converts in a process of its own: Orbax waits for all of JAX's, where one writes.

    Raises:
      ValueError: As `convert`.
    """
    code = "import sys; from gpt_oss_jax.checkpoint import convert; convert(*sys.argv[1:])"
    search = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, search))}
    done = subprocess.run(
        [sys.executable, "-c", code, str(src), str(path)],
        env=os.environ | environment, stderr=subprocess.PIPE, text=True, errors="replace",
    )  # fmt: skip
    if done.returncode:
        _, _, why = done.stderr.rpartition("\nValueError: ")
        raise ValueError(f"{path} could not be written: {why.strip()}")


def _work_folder(path: Path, resumable: bool) -> Path:
    """A folder beside the target: a new one, or the one that an earlier call left.

    Raises:
      ValueError: If what has the name of an earlier call's folder is something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not resumable:
        return Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    work = path.with_name(path.name + ".partial")
    if work.exists() and not (
        work.is_dir() and all(x.name.startswith(path.name) for x in work.iterdir())
    ):
        raise ValueError(f"{work} is in the way and not ours: move it, or name another target.")
    return work


def _locked(work: Path, path: Path) -> int:
    """Makes the folder and takes it for this process, until the descriptor it returns is closed.

    Raises:
      ValueError: If another process has it.
    """
    while True:
        work.mkdir(exist_ok=True)
        lock = os.open(work, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise ValueError(
                f"another process is writing {path}: wait for it, or name another target."
            ) from error
        except OSError:
            return lock  # The file system has no locks; alone, as nearly always, that is no harm.
        # Whoever had it may have finished, and removed it, before it was locked here.
        if work.exists() and os.path.samestat(os.fstat(lock), os.stat(work)):
            return lock
        os.close(lock)


def _check(path: str | os.PathLike, format: str) -> Path:
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    if "://" in str(path):
        raise ValueError(f"{path} is a URL: write to a local folder, then copy it there.")
    path = Path(os.path.abspath(os.path.expanduser(path)))
    if format == "orbax" and (odd := set(str(path)) & set("[]*?")):
        raise ValueError(
            f"{path} has {' '.join(sorted(odd))}, which Orbax takes for a pattern: name another."
        )
    if os.path.lexists(path):
        raise ValueError(f"{path} exists; name a new folder, or remove it first.")
    return path


def _check_room(work: Path, total: int) -> None:
    used = sum(x.stat().st_size for x in work.rglob("*") if x.is_file())
    free = shutil.disk_usage(work).free
    if free + used < total:
        raise ValueError(
            f"{work.parent} needs room for {total / 1e9:.1f} GB, but has {free / 1e9:.1f} GB."
        )


def _side_files(folder: Folder) -> dict[str, bytes]:
    """Tokenizer, template, licence; of the folder around it too, for the hub's original/."""
    found = {}
    if isinstance(folder, LocalFolder) and folder.path.name == "original":
        found = _side_files(LocalFolder(folder.path.parent.absolute()))
    present = set(folder.names())
    return found | {name: folder.read(name) for name in SIDE_FILES if name in present}


def _fingerprint(source: Source) -> str:
    """Tells one source from another without reading it: where it lies, and its files' sizes."""
    folder = source.folder
    stats: list = [str(folder), folder.names(), dataclasses.asdict(source.config)]
    if isinstance(folder, LocalFolder):
        stats[0] = str(folder.path.absolute())
        for name in folder.names():
            stat = (folder.path / name).stat()
            stats.append((name, stat.st_size, stat.st_mtime_ns))
    return f"{zlib.crc32(json.dumps(stats).encode()):08x}"


_in_checkpoint_order = jax.jit(MXArray.in_checkpoint_order)


class _ModelSource:
    """The variables of a model, as checkpoints hold them."""

    def __init__(self, model: Transformer):
        self.config: Config = model.config
        state = nnx.to_flat_state(nnx.state(model))
        # The factors of folded experts follow from the rest.
        self._arrays = {
            "/".join(map(str, path)): x[...] for path, x in state if path[-1] != "factors"
        }
        kinds = {
            matrix: "dense" if f"{matrix}/weight" in self._arrays else "mxfp4"
            for matrix in names.matrices(self.config)
        }
        self.variables: dict[str, Variable] = {
            x.path: x for x in names.variables(self.config, kinds)
        }
        self.rounded: list[str] = []
        self._words = {
            f"layers/{i}/mlp/{name}": projection.matrix
            for i, layer in enumerate(model.layers)
            for name, projection in (("up", layer.mlp.up), ("down", layer.mlp.down))
            if projection.shuffled or projection.words_of is not None
        }
        self.spread = not all(x.is_fully_addressable for x in self._arrays.values())
        if odd := self._arrays.keys() ^ self.variables.keys():
            raise ValueError(f"a plain gpt-oss model is wanted; odd are {', '.join(sorted(odd))}.")

    def stream(self, requests: Iterable[Request]) -> Iterator[np.ndarray]:
        """Whole variables, in order."""
        for request in requests:
            if self.spread:
                distributed.broadcast({"path": request.path})
            array = self._whole(request.path)
            if array.dtype == np.float32:
                array, exact = _narrow(array)
                if not exact:
                    self.rounded.append(request.path)
            wanted = self.variables[request.path].dtype
            if array.dtype != wanted:
                raise ValueError(
                    f"{request.path} must be {wanted}{'' if wanted == np.uint8 else ' or float32'} "
                    f"to be saved, got {array.dtype}: cast it first."
                )
            yield array

    def serve(self) -> None:
        """Gives process 0 what it streams, until it is done.

        Raises:
          ValueError: If it failed.
        """
        while "path" in (message := distributed.broadcast(None)):
            self._whole(message["path"])
        if message["error"] is not None:
            raise ValueError(f"process 0: {message['error']}")

    def dismiss(self, error: str | None) -> None:
        """Tells those who serve that all is streamed, or that it failed."""
        if self.spread:
            distributed.broadcast({"error": error})

    def _whole(self, path: str) -> np.ndarray:
        array = self._array(path)
        if self.spread:
            return multihost_utils.process_allgather(array, tiled=True)
        return np.asarray(jax.device_get(array))

    def _array(self, path: str) -> jax.Array:
        matrix, _, part = path.rpartition("/")
        if matrix in self._words and part in ("blocks", "scales"):
            return getattr(_in_checkpoint_order(self._words[matrix]), part)
        return self._arrays[path]


def _narrow(array: np.ndarray) -> tuple[np.ndarray, bool]:
    """float32 as bfloat16, and whether no bit was lost; then bits are moved, NaNs included."""
    bits = array.view(np.uint32)
    if not (bits & 0xFFFF).any():
        return (bits >> 16).astype(np.uint16).view(BF16), True
    return array.astype(BF16), False
