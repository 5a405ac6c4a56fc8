"""A folder of safetensors as our variables; all that is there is checked against the name table.

Takes Hugging Face's layout, `original/`, and any mixture, tensor by tensor. Knows nothing of
devices: `stream.py` reads the bytes, `loading.py` puts them where they belong.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from gpt_oss_jax.checkpoint import names, pieces
from gpt_oss_jax.checkpoint.files import Folder, RemoteFolder
from gpt_oss_jax.checkpoint.names import Variable
from gpt_oss_jax.checkpoint.pieces import Part
from gpt_oss_jax.checkpoint.safetensors import DTYPES, Tensor, read_header
from gpt_oss_jax.checkpoint.stream import Request, stream
from gpt_oss_jax.config import Config

INDEX = "model.safetensors.index.json"
_SMALLEST_CHUNK = 256 << 10


@dataclasses.dataclass(frozen=True)
class SafetensorsSource:
    """A checked folder of safetensors.

    Attributes:
      folder: Where it lies.
      config: Of its config.json.
      variables: Path -> variable, of everything that is there.
      parts: Path -> the stored tensors, with the rows of each, that a variable is made of.
    """

    folder: Folder
    config: Config
    variables: Mapping[str, Variable]
    parts: Mapping[str, tuple[Part, ...]]

    def stream(self, requests: Iterable[Request]) -> Iterator[np.ndarray]:
        """Reads variables, or slices of them, in order."""
        largest = max(x.nbytes for x in self.variables.values())
        chunk = max(_SMALLEST_CHUNK, min(pieces.CHUNK, largest // 64))

        def reads(path, bounds, out):
            dtype = self.variables[path].dtype
            for part in self.parts[path]:
                yield from pieces.reads(self.folder, part, dtype, bounds, out, chunk)

        remote = isinstance(self.folder, RemoteFolder)
        return stream(requests, self.variables, reads, remote=remote)


def open_safetensors(folder: Folder) -> SafetensorsSource:
    """Opens a folder: reads its config, its index and all headers, and no tensor.

    Raises:
      ValueError: Naming everything that is wrong: broken files, and tensors that are missing,
        unknown, there twice, of another shape or of another dtype.
    """
    config = read_config(folder)
    tensors, problems = _list_tensors(folder)
    if not problems and config.num_hidden_layers > len(tensors):
        layers = config.num_hidden_layers
        problems = [f"config.json has {layers} layers, but only {len(tensors)} tensors are there"]
    variables, parts = {}, {}
    if not problems:
        variables, parts, problems = _match(config, tensors)
    if problems:
        raise ValueError(
            f"{folder} must hold the gpt-oss model of its config.json, but\n  "
            + "\n  ".join(problems)
        )
    return SafetensorsSource(folder, config, variables, parts)


def read_config(folder: Folder) -> Config:
    """The config of a checkpoint.

    Raises:
      ValueError: If it is not there, broken, or not gpt-oss's.
    """
    values = read_json(folder, "config.json")
    quantized = values.get("quantization_config") or {"quant_method": "mxfp4"}
    if not isinstance(quantized, dict) or quantized.get("quant_method") != "mxfp4":
        raise ValueError(
            f"config.json in {folder} must have a quantization_config with quant_method mxfp4, or "
            f"none, got {quantized!r}."
        )
    try:
        return Config.from_dict(values)
    except (AttributeError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"config.json in {folder} has a value of a wrong kind: {error}") from error


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
      ValueError: If the file is not there or holds something else.
    """
    if name not in folder.names():
        raise ValueError(f"{folder} lacks {name}.")
    try:
        value = json.loads(folder.read(name))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} in {folder} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} in {folder} must hold an object, not a {type(value).__name__}.")
    return value


def _list_tensors(folder: Folder) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors by name, and what is wrong with the files and the index."""
    present, problems = folder.names(), []
    indexed = None
    if INDEX in present:
        indexed = read_json(folder, INDEX).get("weight_map")
        if not isinstance(indexed, dict) or not all(isinstance(x, str) for x in indexed.values()):
            raise ValueError(f"{INDEX} in {folder} must map tensors to files under weight_map.")
        files = sorted(set(indexed.values()))
    else:
        files = [name for name in present if name.endswith(".safetensors")]
    if not files:
        raise ValueError(f"{folder} holds no .safetensors files.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        if file not in present:
            problems.append(f"missing file: {file}, which {INDEX} names")
            continue
        try:
            found = read_header(folder, file)
        except ValueError as error:
            problems.append(str(error))
            continue
        for tensor in found:
            if tensor.name in tensors:
                other = tensors[tensor.name].file
                problems.append(f"set twice: {tensor.name}, in {other} and {file}")
            tensors[tensor.name] = tensor
    if indexed is not None and not problems:
        for name, file in indexed.items():
            if name not in tensors or tensors[name].file != file:
                problems.append(f"missing: {name}, which {INDEX} has in {file}")
        problems += [f"not in {INDEX}: {name}" for name in tensors if name not in indexed]
    return tensors, problems


def _match(config: Config, tensors: Mapping[str, Tensor]):
    """Finds each variable among the tensors: the variables, their parts, and what is wrong."""
    home = "original" if any(name.startswith("block.") for name in tensors) else "hf"
    variables, parts = {}, {}
    used: set[str] = set()
    kinds, problems = _expert_kinds(config, tensors)
    for variable in names.variables(config, kinds):
        found = {
            layout: stored
            for layout in variable.layouts
            if (stored := names.stored_tensors(variable, layout)).keys() & tensors.keys()
        }
        used.update(*found.values())
        if len(found) > 1:
            both = " and as ".join(" + ".join(stored) for stored in found.values())
            problems.append(f"set twice: {variable.path}, as {both}")
            continue
        layout = next(iter(found), home if home in variable.layouts else "hf")
        for name, shape in names.stored_tensors(variable, layout).items():
            problems += _problems(name, shape, variable.dtype, tensors.get(name))
        variables[variable.path] = variable
        parts[variable.path] = tuple(
            Part(tensors[piece.tensor], piece)
            for piece in variable.layouts[layout]
            if piece.tensor in tensors
        )
    problems += [f"unknown: {name}" for name in tensors if name not in used]
    return variables, parts, problems


def _problems(name: str, shape, dtype: np.dtype, tensor: Tensor | None) -> Iterator[str]:
    if tensor is None:
        yield f"missing: {name}"
        return
    if tensor.shape != shape:
        yield f"shape of {name}: wanted {list(shape)}, got {list(tensor.shape)}"
    if DTYPES.get(tensor.dtype) != dtype:
        wanted = next(x for x, known in DTYPES.items() if known == dtype)
        yield f"dtype of {name}: wanted {wanted}, got {tensor.dtype}"


def _expert_kinds(
    config: Config, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, str], list[str]]:
    """How each expert matrix is there, and which are there twice."""
    there = {
        matrix: [
            kind
            for kind in ("mxfp4", "dense")
            if any(
                name in tensors
                for variable in names.matrix_variables(config, matrix, kind)
                for layout in variable.layouts
                for name in names.stored_tensors(variable, layout)
            )
        ]
        for matrix in names.matrices(config)
    }
    home = "dense" if ["dense"] in there.values() and ["mxfp4"] not in there.values() else "mxfp4"
    problems = [
        f"set twice: {matrix}, as blocks and scales and as a dense matrix"
        for matrix, kinds in there.items()
        if len(kinds) > 1
    ]
    return {matrix: (kinds or [home])[0] for matrix, kinds in there.items()}, problems
