"""The safetensors format: headers in, headers out.

A file is eight bytes (the header's length, little-endian), the header (JSON: name -> dtype, shape
and the byte range behind the header) and the tensors, without holes. Follows the description at
https://github.com/huggingface/safetensors. Knows nothing of gpt-oss.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from gpt_oss_jax.checkpoint.files import Folder

DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "U8": np.dtype(np.uint8)}
_ITEM_BITS = {"F4": 4, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
_ITEM_BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
_ITEM_BITS |= {"I64": 64, "U64": 64, "F64": 64, "C64": 64}
_LARGEST_HEADER = 100_000_000


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
      name: Its name.
      file: File name in its folder.
      dtype: The format's name of its dtype, "BF16".
      shape: Its shape.
      offset: Bytes before it in the file.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(folder: Folder, file: str) -> list[Tensor]:
    """Reads and checks a file's header; the tensors' bytes are not read.

    Raises:
      ValueError: If the file is truncated, or anything about its header is not as the format says.
    """
    try:
        (length,) = _read(folder, file, 0, 8).view("<u8").tolist()
        if length > _LARGEST_HEADER:
            raise ValueError(f"its header would have {length} bytes.")
        text = _read(folder, file, 8, length).tobytes().decode()
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        tensors = _tensors(header, file, 8 + length)
        end = max((x.offset + _nbytes(x.dtype, x.shape) for x in tensors), default=8 + length)
        if not folder.ends_at(file, end):
            raise ValueError(f"by its header it has {end} bytes, but it does not end there.")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is truncated or no safetensors file: {error}") from error
    return tensors


def make_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, list[int]]:
    """The bytes before the tensors, and the offset of each in the file.

    Args:
      tensors: Name, dtype and shape of each, in the order of the file.
    """
    entries, offsets, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name, dtype, shape in tensors:
        start, end = end, end + _nbytes(dtype, shape)
        offsets.append(start)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + start for start in offsets]


def _read(folder: Folder, file: str, offset: int, size: int) -> np.ndarray:
    out = np.empty(size, np.uint8)
    folder.read_into(file, offset, out)
    return out


def _without_duplicates(pairs):
    seen = dict(pairs)
    if len(seen) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"set twice: {', '.join(twice)}.")
    return seen


def _tensors(header, file: str, base: int) -> list[Tensor]:
    if not isinstance(header, dict):
        raise ValueError(f"an object is wanted, got {type(header).__name__}.")
    spans, tensors = [], []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]}:
                pass
            case _:
                raise ValueError(f"{name} lacks a dtype, a shape or its two offsets: {entry!r}.")
        if dtype not in _ITEM_BITS:
            raise ValueError(f"{name} has a dtype unknown to the format, {dtype!r}.")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{name} has the shape {shape!r}.")
        if start < 0 or end - start != _nbytes(dtype, shape):
            raise ValueError(
                f"{name}, {dtype} {shape}, has {_nbytes(dtype, shape)} bytes, but its offsets are "
                f"{start} and {end}."
            )
        spans.append((start, end, name))
        tensors.append(Tensor(name, file, dtype, tuple(shape), base + start))
    spans.sort()
    expected = 0
    for start, end, name in spans:
        if start != expected:
            raise ValueError(f"{name} begins at {start}, where {expected} was to come next.")
        expected = end
    return tensors


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    return math.prod(shape) * _ITEM_BITS[dtype] // 8
