"""Our checkpoints in Orbax: OCDBT and zarr3, in the checkpoint's own order of bytes.

Written a layer at a time with Orbax's partial save, so that a writer that was killed goes on where
it was; any Orbax reads the result. Read here with TensorStore, which is underneath: each shard its
own chunks, straight into place, from a bucket too. The variables are a tree under `state`;
config.json, tokenizer and the like lie beside it.
https://orbax.readthedocs.io
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import itertools
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from gpt_oss_jax.checkpoint import names
from gpt_oss_jax.checkpoint._orbax import orbax_v1
from gpt_oss_jax.checkpoint.experts import Source
from gpt_oss_jax.checkpoint.files import Folder, LocalFolder, RemoteFolder
from gpt_oss_jax.checkpoint.names import Variable
from gpt_oss_jax.checkpoint.source import read_config
from gpt_oss_jax.checkpoint.stream import Request, stream
from gpt_oss_jax.config import Config

_MARKER = "orbax.checkpoint"
_CHUNK = 8 << 20
_SUMMED = 1 << 18  # Elements that are turned back at once to be summed.
_OURS = "gpt_oss_jax"
_TREE = "state"
_ZARR = "/zarr.json"


@dataclasses.dataclass(frozen=True)
class OrbaxSource:
    """A checked Orbax checkpoint.

    Attributes:
      folder: Where it lies.
      config: Of its config.json.
      variables: Path -> variable, of everything that is there.
      arrays: Path -> TensorStore.
      checksums: Path -> what `checksum` gave when it was written. A variable that is read whole is
        held against it; a slice, of a shard, cannot be.
    """

    folder: Folder
    config: Config
    variables: Mapping[str, Variable]
    arrays: Mapping[str, ts.TensorStore]
    checksums: Mapping[str, int]

    def stream(self, requests: Iterable[Request]) -> Iterator[np.ndarray]:
        """Reads variables, or slices of them, in order."""
        remote = isinstance(self.folder, RemoteFolder)
        return stream(requests, self.variables, self._reads, remote=remote)

    def _reads(self, path: str, bounds: tuple[slice, ...], out: np.ndarray):
        array = self.arrays[path]
        row = max(1, out[:1].size) * array.dtype.numpy_dtype.itemsize
        whole = all((x.start, x.stop) == (0, n) for x, n in zip(bounds, array.shape, strict=True))
        chunk = array.chunk_layout.read_chunk.shape[0]
        step = max(1, _CHUNK // row // chunk) * chunk
        lead = bounds[0]
        # From one chunk's edge to another's, so that none is read twice.
        edges = [lead.start, *range((lead.start // step + 1) * step, lead.stop, step), lead.stop]
        left = itertools.count(len(edges) - 2, -1)
        check = functools.partial(self._check, path, out) if whole else None
        for start, stop in itertools.pairwise(edges):
            target = out[start - lead.start : stop - lead.start]
            part = array[(slice(start, stop), *bounds[1:])]
            yield functools.partial(self._read, path, part, target, left, check)

    def _read(self, path: str, array: ts.TensorStore, target: np.ndarray, left, check) -> None:
        if array.dtype.numpy_dtype != target.dtype:
            array = ts.cast(array, target.dtype)
        try:
            ts.array(target).write(array).result()
        except Exception as error:
            raise ValueError(f"{self.folder} is damaged: {path} cannot be read: {error}") from error
        # Whoever reads the last part of a variable checks it; `next` of a count is atomic.
        if next(left) == 0 and check is not None:
            check()

    def _check(self, path: str, out: np.ndarray) -> None:
        if checksum(out, self.variables[path].dtype) != self.checksums[path]:
            raise ValueError(
                f"{self.folder} is damaged: {path} holds other bytes than were written. Fetch or "
                "convert it again."
            )


def is_orbax(folder: Folder) -> bool:
    """Whether the folder is an Orbax checkpoint."""
    return _MARKER in folder.names()


def open_orbax(folder: Folder) -> OrbaxSource:
    """Opens a checkpoint that `convert` or `save` wrote: reads its config and its tree.

    Raises:
      ValueError: Naming everything that is missing, unknown, of another shape or of another dtype.
    """
    config = read_config(folder)
    try:
        ours = json.loads(folder.read("_CHECKPOINT_METADATA"))["custom_metadata"][_OURS]
        checksums = dict(ours["checksums"])
        arrays = _open_arrays(folder)
    except Exception as error:
        raise ValueError(f"{folder} is no whole Orbax checkpoint of ours: {error}") from error
    if config.num_hidden_layers > len(arrays):
        raise ValueError(
            f"{folder} has {config.num_hidden_layers} layers in config.json, but holds only "
            f"{len(arrays)} variables."
        )
    kinds = {
        matrix: "dense" if f"{matrix}/weight" in arrays else "mxfp4"
        for matrix in names.matrices(config)
    }
    variables = {x.path: x for x in names.variables(config, kinds)}
    problems = [f"missing: {path}" for path in variables if path not in arrays]
    problems += [f"no checksum: {path}" for path in variables if path not in checksums]
    for path, found in arrays.items():
        variable = variables.get(path)
        if variable is None:
            problems.append(f"unknown: {path}")
            continue
        if tuple(found.shape) != variable.shape:
            wanted, got = list(variable.shape), list(found.shape)
            problems.append(f"shape of {path}: wanted {wanted}, got {got}")
        if found.dtype.numpy_dtype != variable.dtype:
            problems.append(f"dtype of {path}: wanted {variable.dtype}, got {found.dtype.name}")
    if problems:
        raise ValueError(
            f"{folder} must hold the gpt-oss model of its config.json, but\n  "
            + "\n  ".join(problems)
        )
    return OrbaxSource(folder, config, variables, arrays, checksums)


def write_orbax(source: Source, path: Path, fingerprint: str, step: Callable[[int], None]) -> None:
    """Writes a checkpoint, or goes on with one that was begun from the same source.

    Args:
      source: Of the variables.
      path: Of the checkpoint, in a folder of its own: what is unfinished lies beside it.
      fingerprint: Of the source. What was begun from another one is thrown away.
      step: Called with the bytes of each group of variables that is written, or was before.
    """
    if path.exists():
        # Merged by an earlier run, but not renamed by whoever called.
        if orbax_v1().metadata(str(path)).custom_metadata[_OURS]["fingerprint"] == fingerprint:
            return
        shutil.rmtree(path)
    done = _begun(path, fingerprint)
    groups = [
        (name, list(group))
        for name, group in itertools.groupby(source.variables.values(), key=_group)
    ]
    left = [x for name, group in groups if name not in done for x in group]
    arrays = source.stream([Request(x.path, x.dtype) for x in left])
    for name, group in groups:
        if name not in done:
            values = {x.path: next(arrays) for x in group}
            ours = {
                "fingerprint": fingerprint,
                "done": {name: True},
                "checksums": {path: checksum(value, value.dtype) for path, value in values.items()},
            }
            with _saving():
                orbax_v1().partial.save(path, _nest(values), custom_metadata={_OURS: ours})
            del values
        step(sum(x.nbytes for x in group))


def finalize(path: Path, files: Mapping[str, bytes]) -> None:
    """Turns what `write_orbax` has written into one checkpoint, with the files beside it."""
    if path.exists():
        return
    for name, content in files.items():
        (_partial(path) / name).write_bytes(content)
    with _saving():
        orbax_v1().partial.finalize(path)


def verify(source: OrbaxSource, step: Callable[[int], None]) -> None:
    """Reads a whole checkpoint, which checks it.

    Raises:
      ValueError: If something cannot be read or is not what was meant to be written.
    """
    for array in source.stream(Request(x.path, x.dtype) for x in source.variables.values()):
        step(array.nbytes)


def checksum(array: np.ndarray, dtype: np.dtype) -> int:
    """CRC-32 of an array's bytes in `dtype`: its own, or the bfloat16 that its float32 was."""
    flat, crc = np.ascontiguousarray(array).reshape(-1), 0
    for start in range(0, flat.size, _SUMMED):
        part = flat[start : start + _SUMMED]
        if array.dtype != dtype:
            # Its bits are the upper half.
            part = (part.view(np.uint32) >> 16).astype(np.uint16)
        crc = zlib.crc32(part.view(np.uint8), crc)
    return crc


def _saving() -> contextlib.AbstractContextManager:
    context = orbax_v1().Context()
    saving = context.array.saving
    # MXFP4 does not compress, and what does is not worth the time.
    saving.use_ocdbt, saving.use_zarr3, saving.use_compression = True, True, False
    saving.storage_options.chunk_byte_size = _CHUNK
    saving.scoped_storage_options_creator = _storage_of
    context.memory.deepcopy_host_arrays = False
    return context


def _storage_of(path, value):
    # One expert a chunk: whoever holds some of the experts reads those only.
    if "mlp" in jax.tree_util.keystr(path) and value.nbytes > _CHUNK:
        options = orbax_v1().options.ArrayOptions.Saving
        return options.StorageOptions(chunk_byte_size=_CHUNK, shard_axes=(0,))
    return None


def _group(variable: Variable) -> str:
    """A layer, or one of the variables around them."""
    first, second, *_ = variable.path.split("/")
    return f"{first}/{second}" if first == "layers" else first


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial_save")


def _begun(path: Path, fingerprint: str) -> set[str]:
    """The groups an earlier run has written; all is removed if it cannot be gone on with."""
    partial = _partial(path)
    for leftover in path.parent.glob(f"{glob.escape(partial.name)}.orbax-checkpoint-tmp*"):
        shutil.rmtree(leftover)
    done: set[str] = set()
    # A merge that was broken off cannot be gone on with: it leaves the tree beside the saves.
    usable = not (partial / _TREE).exists()
    for file in partial.glob("*.pending_*/_CHECKPOINT_METADATA"):
        ours = json.loads(file.read_bytes())["custom_metadata"][_OURS]
        usable = usable and ours["fingerprint"] == fingerprint
        done |= ours["done"].keys()
    if not usable:
        shutil.rmtree(partial)
        return set()
    return done


def _nest(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _open_arrays(folder: Folder) -> dict[str, ts.TensorStore]:
    """All arrays of the tree, by path."""
    base: Any = f"{folder}{_TREE}/"
    if isinstance(folder, LocalFolder):
        base = {"driver": "file", "path": f"{folder.path.absolute()}/{_TREE}/"}
    keys = ts.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
    opening = {}
    for key in map(bytes.decode, keys):
        if key.endswith(_ZARR):
            name = key.removesuffix(_ZARR)
            spec = {
                "driver": "zarr3",
                "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
                # A chunk that is not there is damage, not zeros.
                "fill_missing_data_reads": False,
            }
            opening[name.replace(".", "/")] = ts.open(spec, open=True, read=True)
    if not opening:
        raise ValueError(f"there are no arrays under {_TREE}.")
    return {path: array.result() for path, array in opening.items()}
