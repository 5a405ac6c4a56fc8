"""Our checkpoints in Orbax: OCDBT and zarr3, in the checkpoint's own order of bytes.

Written a layer at a time with Orbax's partial save, so that a writer that was killed goes on where
it was; read by abstract target, each device its own shard, or whole into host memory. The variables
are a tree under `state`; config.json, tokenizer and the like lie beside it.
https://orbax.readthedocs.io
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from gpt_oss_jax.checkpoint import names
from gpt_oss_jax.checkpoint.experts import Source
from gpt_oss_jax.checkpoint.files import Folder
from gpt_oss_jax.checkpoint.names import Variable
from gpt_oss_jax.checkpoint.source import read_json
from gpt_oss_jax.checkpoint.stream import Request
from gpt_oss_jax.config import Config

_MARKER = "orbax.checkpoint"
_CHUNK = 32 << 20
_OURS = "gpt_oss_jax"


@dataclasses.dataclass(frozen=True)
class OrbaxSource:
    """A checked Orbax checkpoint.

    Attributes:
      folder: Where it lies.
      config: Of its config.json.
      variables: Path -> variable, of everything that is there.
      checksums: Path -> what `checksum` gave when it was written.
    """

    folder: Folder
    config: Config
    variables: Mapping[str, Variable]
    checksums: Mapping[str, int]

    def stream(self, requests: Iterable[Request]) -> Iterator[np.ndarray]:
        """Reads variables, or slices of them, in order, into host memory."""
        requests = list(requests)
        for batch in self._batches(requests):
            targets = {
                # Only its shape and dtype are looked at: the memory is never touched.
                x.path: np.empty(self.variables[x.path].shape, x.dtype)
                for x in batch
            }
            arrays = self._load(targets)
            for request in batch:
                array = arrays[request.path]
                yield array if request.index is None else array[request.index]

    def arrays(
        self, targets: Mapping[str, jax.ShapeDtypeStruct]
    ) -> Iterator[tuple[str, jax.Array]]:
        """Reads variables onto devices, as the sharding of each target says."""
        for batch in self._batches([Request(path, x.dtype) for path, x in targets.items()]):
            yield from self._load({x.path: targets[x.path] for x in batch}).items()

    def _batches(self, requests: list[Request]) -> Iterator[list[Request]]:
        """As many at a time as fit in the size of the largest."""
        size = lambda x: self.variables[x.path].nbytes
        largest = max(map(size, requests), default=0)
        batch, held = [], 0
        for request in requests:
            twice = any(x.path == request.path for x in batch)
            if batch and (twice or held + size(request) > largest):
                yield batch
                batch, held = [], 0
            batch.append(request)
            held += size(request)
        if batch:
            yield batch

    def _load(self, targets: Mapping[str, Any]) -> dict[str, Any]:
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        try:
            with context:
                tree = ocp.load(str(self.folder), _nest(targets), checkpointable_name="state")
        except Exception as error:
            raise ValueError(
                f"{self.folder} is damaged: Orbax cannot read {', '.join(targets)}: {error}"
            ) from error
        return _flatten(tree)


def is_orbax(folder: Folder) -> bool:
    """Whether the folder is an Orbax checkpoint."""
    return _MARKER in folder.names()


def open_orbax(folder: Folder) -> OrbaxSource:
    """Opens a checkpoint that `convert` or `save` wrote: reads its config and its tree.

    Raises:
      ValueError: Naming everything that is missing, unknown, of another shape or of another dtype.
    """
    config = Config.from_dict(read_json(folder, "config.json"))
    try:
        metadata = ocp.metadata(str(folder))
        tree = _flatten(metadata.metadata)
        ours = (metadata.custom_metadata or {}).get(_OURS, {})
    except Exception as error:
        raise ValueError(f"{folder} is no whole Orbax checkpoint of a model: {error}") from error
    if config.num_hidden_layers > len(tree):
        raise ValueError(
            f"{folder} has {config.num_hidden_layers} layers in config.json, but holds only "
            f"{len(tree)} variables."
        )
    kinds = {
        matrix: "dense" if f"{matrix}/weight" in tree else "mxfp4"
        for matrix in names.matrices(config)
    }
    variables = {x.path: x for x in names.variables(config, kinds)}
    problems = [f"missing: {path}" for path in variables if path not in tree]
    problems += [f"unknown: {path}" for path in tree if path not in variables]
    for path in variables.keys() & tree.keys():
        variable, found = variables[path], tree[path]
        if tuple(found.shape) != variable.shape:
            wanted, got = list(variable.shape), list(found.shape)
            problems.append(f"shape of {path}: wanted {wanted}, got {got}")
        if found.dtype != variable.dtype:
            problems.append(f"dtype of {path}: wanted {variable.dtype}, got {found.dtype}")
    if problems:
        raise ValueError(
            f"{folder} must hold the gpt-oss model of its config.json, but\n  "
            + "\n  ".join(problems)
        )
    return OrbaxSource(folder, config, variables, ours.get("checksums", {}))


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
        if ocp.metadata(str(path)).custom_metadata[_OURS]["fingerprint"] == fingerprint:
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
                "checksums": {path: checksum(value) for path, value in values.items()},
            }
            with _saving():
                ocp.partial.save(path, _nest(values), custom_metadata={_OURS: ours})
            del values
        step(sum(x.nbytes for x in group))


def finalize(path: Path, files: Mapping[str, bytes]) -> None:
    """Turns what `write_orbax` has written into one checkpoint, with the files beside it."""
    if path.exists():
        return
    for name, content in files.items():
        (_partial(path) / name).write_bytes(content)
    with _saving():
        ocp.partial.finalize(path)


def verify(source: OrbaxSource, step: Callable[[int], None]) -> None:
    """Reads a checkpoint back and compares it with what was meant to be written.

    Raises:
      ValueError: If something differs.
    """
    requests = [Request(x.path, x.dtype) for x in source.variables.values()]
    for request, array in zip(requests, source.stream(requests), strict=True):
        if checksum(array) != source.checksums.get(request.path):
            raise ValueError(f"{request.path} reads back other than written; is the disk well?")
        step(array.nbytes)


def checksum(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _saving() -> ocp.Context:
    context = ocp.Context()
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
        return ocp.options.ArrayOptions.Saving.StorageOptions(
            chunk_byte_size=_CHUNK, shard_axes=(0,)
        )
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
    for leftover in path.parent.glob(f"{partial.name}.orbax-checkpoint-tmp*"):
        shutil.rmtree(leftover)
    done: set[str] = set()
    # A merge that was broken off cannot be gone on with: it leaves the tree beside the saves.
    usable = not (partial / "state").exists()
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


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}/{key}" if prefix else str(key))
    return flat
