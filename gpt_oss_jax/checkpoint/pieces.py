"""Reads pieces of stored tensors: each slice of a variable from its own byte ranges.

What lies in the file as it is wanted is read straight into place; what lies in another order, or is
to be float32, goes through a buffer of one chunk. Knows nothing of JAX or of layouts: a `Piece`
says how a stored tensor is seen.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import numpy as np

from gpt_oss_jax.checkpoint.files import Folder
from gpt_oss_jax.checkpoint.names import BF16, Piece
from gpt_oss_jax.checkpoint.safetensors import Tensor

CHUNK = 16 << 20
_SMALL = 256 << 10


@dataclasses.dataclass(frozen=True)
class Part:
    """A stored tensor and the part it plays in a variable."""

    tensor: Tensor
    piece: Piece


def reads(
    folder: Folder,
    part: Part,
    dtype: np.dtype,
    bounds: tuple[slice, ...],
    out: np.ndarray,
    chunk: int,
) -> Iterator[Callable[[], None]]:
    """The reads that fill a part's share of a slice.

    Args:
      folder: Of the file.
      part: What to read.
      dtype: It is stored in.
      bounds: The slice of the variable, its ends spelled out.
      out: For that slice, of `dtype` or float32.
      chunk: Bytes to read at a time.

    Yields:
      Functions to call, in any order, in any thread.
    """
    piece = part.piece
    lead, *rest = bounds
    if rest:
        width = piece.view[piece.order[1]]
        start = max(rest[0].start, piece.at)
        stop = min(rest[0].stop, piece.at + width)
        if start >= stop:
            return
        out = out[:, start - rest[0].start : stop - rest[0].start]
        rest[0] = slice(start - piece.at, stop - piece.at)
    # From here on everything has the axes of the stored view; a vector gets a second axis.
    to_view = np.argsort(piece.order)
    view, wanted = piece.view, tuple((lead, *rest)[axis] for axis in to_view)
    out = out.transpose(to_view)
    if len(view) == 1:
        view, wanted, out = (*view, 1), (*wanted, slice(0, 1)), out[:, None]
    row, unit = math.prod(view[1:]), math.prod(view[2:])
    base = piece.first_row * math.prod(piece.stored[1:])
    for rows, columns in _boxes(view, wanted, dtype.itemsize, chunk):
        # Columns may be read wider than wanted, where a few bytes from each row would cost more.
        use = slice(max(columns.start, wanted[1].start), min(columns.stop, wanted[1].stop))
        target = out[
            rows.start - wanted[0].start : rows.stop - wanted[0].start,
            use.start - wanted[1].start : use.stop - wanted[1].start,
        ]
        shape = (rows.stop - rows.start, columns.stop - columns.start, *view[2:])
        columns_used = slice(use.start - columns.start, use.stop - columns.start)
        select = (slice(None), columns_used, *wanted[2:])
        offset = (base + rows.start * row + columns.start * unit) * dtype.itemsize
        yield functools.partial(_read, folder, part.tensor, offset, shape, dtype, select, target)


def _boxes(
    view: tuple[int, ...], wanted: tuple[slice, ...], itemsize: int, chunk: int
) -> Iterator[tuple[slice, slice]]:
    """Cuts the wanted rows and columns into contiguous runs of about `chunk` bytes."""
    lead, columns = wanted[0], wanted[1]
    unit = math.prod(view[2:]) * itemsize
    if (columns.stop - columns.start) * unit < min(_SMALL, chunk):
        columns = slice(0, view[1])
    if columns == slice(0, view[1]) and view[1] * unit <= chunk:
        step = max(1, chunk // max(1, view[1] * unit))
        for row in range(lead.start, lead.stop, step):
            yield slice(row, min(row + step, lead.stop)), columns
        return
    step = max(1, chunk // max(1, unit))
    for row in range(lead.start, lead.stop):
        for column in range(columns.start, columns.stop, step):
            yield slice(row, row + 1), slice(column, min(column + step, columns.stop))


def _read(folder: Folder, tensor: Tensor, offset: int, shape, dtype, select, target) -> None:
    if target.dtype == dtype and target.shape == shape and target.flags.c_contiguous:
        folder.read_into(tensor.file, tensor.offset + offset, target)
        return
    buffer = np.empty(shape, dtype)
    folder.read_into(tensor.file, tensor.offset + offset, buffer)
    assign(target, buffer[select])


def assign(target: np.ndarray, values: np.ndarray) -> None:
    """Copies, bfloat16 into float32 too: its bits are the upper half, so that no bit is lost."""
    if values.dtype == BF16 and target.dtype == np.float32:
        np.left_shift(values.view(np.uint16), 16, out=target.view(np.uint32), dtype=np.uint32)
    else:
        target[...] = values
