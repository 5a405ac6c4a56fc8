"""Writes safetensors folders that Transformers and the reference implementation load as they are.

"hf-mxfp4" and "hf-bf16" are Hugging Face's layouts
(https://huggingface.co/docs/transformers/model_doc/gpt_oss), "original" is the reference's
(https://github.com/openai/gpt-oss). Tensors are written one at a time, headers first, and read back
in the end. Knows nothing of where the variables come from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from gpt_oss_jax.checkpoint import names
from gpt_oss_jax.checkpoint.experts import Source, with_experts
from gpt_oss_jax.checkpoint.files import LocalFolder
from gpt_oss_jax.checkpoint.names import Variable
from gpt_oss_jax.checkpoint.safetensors import DTYPES, make_header
from gpt_oss_jax.checkpoint.source import INDEX, open_safetensors
from gpt_oss_jax.checkpoint.stream import Request
from gpt_oss_jax.config import Config

# How each format holds its experts.
EXPERTS = {"hf-mxfp4": "mxfp4", "hf-bf16": "dense", "original": "mxfp4"}
FORMATS = tuple(EXPERTS)
_SHARD_BYTES = 5_000_000_000
_CHUNK = 16 << 20
_QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Where a stored tensor goes."""

    file: str
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def chunks(self) -> Iterator[tuple[slice, int]]:
        """Runs of rows, and where each lies in the file."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        step = max(1, _CHUNK // row)
        for start in range(0, self.shape[0], step):
            yield slice(start, min(start + step, self.shape[0])), self.offset + start * row


def config_files(config: Config, format: str) -> dict[str, bytes]:
    """The JSON files of a format, but for the index.

    Raises:
      ValueError: If the format cannot hold the config.
    """
    if format == "original":
        kinds = {"blocks": "FP4", "scales": "UE8"}
        dtypes = {
            name: kinds.get(variable.path.rsplit("/", 1)[1], "BF16")
            for variable in names.variables(config)
            for name in names.stored_tensors(variable, "original")
        }
        return {"config.json": _json(config.to_original_dict()), "dtypes.json": _json(dtypes)}
    extra = (
        {"quantization_config": _QUANTIZATION}
        if format == "hf-mxfp4"
        else {"torch_dtype": "bfloat16"}
    )
    return {"config.json": _json(config.to_hf_dict() | extra)}


def write_tensors(
    source: Source, folder: Path, format: str, step: Callable[[int], None]
) -> dict[str, list[int]]:
    """Writes the tensors, and the index of Hugging Face's formats.

    Args:
      source: Of the variables.
      folder: An existing one.
      format: Of `FORMATS`.
      step: Called with the bytes of each tensor that is written.

    Returns:
      Checksums of each tensor, for `verify`.
    """
    layout = "original" if format == "original" else "hf"
    source = with_experts(source, EXPERTS[format])
    slots, headers = _plan(source.variables, layout)
    sums = {}
    with contextlib.ExitStack() as stack:
        files = {}
        for file, (header, size) in headers.items():
            files[file] = stack.enter_context((folder / file).open("wb"))
            files[file].write(header)
            files[file].truncate(size)
            files[file].flush()
        # Left before the files are closed, and with nothing still to be written.
        pool = ThreadPoolExecutor(os.cpu_count())
        stack.callback(pool.shutdown, cancel_futures=True)
        arrays = source.stream([Request(x.path, x.dtype) for x in source.variables.values()])
        for variable, array in zip(source.variables.values(), arrays, strict=True):
            for name, stored in names.to_stored(variable, layout, array).items():
                slot = slots[name]
                fd = files[slot.file].fileno()
                jobs = [pool.submit(_write, fd, at, stored[rows]) for rows, at in slot.chunks()]
                sums[name] = [job.result() for job in jobs]
                step(stored.nbytes)
    if layout == "hf":
        index = {
            "metadata": {"total_size": sum(x.nbytes for x in source.variables.values())},
            "weight_map": {name: slot.file for name, slot in slots.items()},
        }
        (folder / INDEX).write_bytes(_json(index))
    return sums


def verify(folder: Path, sums: Mapping[str, list[int]], step: Callable[[int], None]) -> None:
    """Opens what was written, strictly, and compares every byte of it with what was meant.

    Raises:
      ValueError: If something differs.
    """
    written = LocalFolder(folder)
    parts = [part for parts in open_safetensors(written).parts.values() for part in parts]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for tensor in {part.tensor.name: part.tensor for part in parts}.values():
            slot = _Slot(tensor.file, tensor.offset, DTYPES[tensor.dtype], tensor.shape)
            jobs = [pool.submit(_read_sum, written, slot, rows, at) for rows, at in slot.chunks()]
            if [job.result() for job in jobs] != sums[tensor.name]:
                raise ValueError(f"{tensor.name} reads back other than written; is the disk well?")
            step(math.prod(tensor.shape) * slot.dtype.itemsize)


def _plan(variables: Mapping[str, Variable], layout: str):
    """A slot for every tensor, and the header and size of every file."""
    tensors = {
        name: (variable.dtype, shape)
        for variable in variables.values()
        for name, shape in names.stored_tensors(variable, layout).items()
    }
    shards, room = [[]], _SHARD_BYTES
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if layout == "hf" and shards[-1] and size > room:
            shards.append([])
            room = _SHARD_BYTES
        shards[-1].append(name)
        room -= size
    slots, headers = {}, {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors"
        if layout == "hf":
            file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        # Bytes last: readers want a bfloat16 tensor at an even offset.
        shard = sorted(shard, key=lambda name: tensors[name][0] == names.UINT8)
        spelled = {dtype: name for name, dtype in DTYPES.items()}
        header, offsets = make_header(
            [(name, spelled[tensors[name][0]], tensors[name][1]) for name in shard]
        )
        for name, offset in zip(shard, offsets, strict=True):
            slots[name] = _Slot(file, offset, *tensors[name])
        size = sum(math.prod(tensors[name][1]) * tensors[name][0].itemsize for name in shard)
        headers[file] = header, len(header) + size
    return {name: slots[name] for name in tensors}, headers


def _write(fd: int, offset: int, rows: np.ndarray) -> int:
    data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    rest = memoryview(data)
    while rest:
        count = os.pwrite(fd, rest, offset)
        rest, offset = rest[count:], offset + count
    return zlib.crc32(data)


def _read_sum(folder: LocalFolder, slot: _Slot, rows: slice, offset: int) -> int:
    out = np.empty((rows.stop - rows.start, *slot.shape[1:]), slot.dtype)
    folder.read_into(slot.file, offset, out)
    return zlib.crc32(out.reshape(-1).view(np.uint8))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
