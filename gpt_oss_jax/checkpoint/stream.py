"""Reads slices of variables out of stored tensors, in order, a bounded number of bytes ahead.

Each slice is read from its own byte ranges, in parallel, into memory of its final shape and dtype;
what lies in another order in the file goes through a small buffer. Knows nothing of JAX or of
layouts: a `Piece` says how a stored tensor is seen.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from gpt_oss_jax.checkpoint.files import Folder, LocalFolder, allocate
from gpt_oss_jax.checkpoint.names import BF16, Piece, Variable
from gpt_oss_jax.checkpoint.safetensors import Tensor

# Memory held for arrays that are being read, in units of the largest one. With the buffers of the
# readers it stays under the promised 2.
_LOOK_AHEAD = 1.25
_CHUNK = 16 << 20
_SMALL = 256 << 10
_REMOTE_READERS = 32


@dataclasses.dataclass(frozen=True)
class Part:
    """A stored tensor and the part it plays in a variable."""

    tensor: Tensor
    piece: Piece


@dataclasses.dataclass(frozen=True)
class Request:
    """What to read.

    Attributes:
      path: Of the variable.
      dtype: To read it as: its own, or float32 for bfloat16.
      index: Slices of it, with a step of 1; None is all of it.
    """

    path: str
    dtype: np.dtype
    index: tuple[slice, ...] | None = None

    def bounds(self, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """The index with its ends spelled out."""
        index = self.index or (slice(None),) * len(shape)
        return tuple(slice(*x.indices(size)[:2]) for x, size in zip(index, shape, strict=True))


def stream(
    folder: Folder,
    variables: Mapping[str, Variable],
    parts: Mapping[str, tuple[Part, ...]],
    requests: Iterable[Request],
) -> Iterator[np.ndarray]:
    """Reads what is requested, in order; an array counts as held until the next is asked for.

    Yields:
      One array a request, in memory that JAX on a CPU can take over.

    Raises:
      ValueError: If a file ends too early, although its header said otherwise.
    """
    requests = list(requests)
    sizes = [_nbytes(request, variables[request.path]) for request in requests]
    largest = max(sizes, default=0)
    chunk = min(_CHUNK, max(_SMALL, largest // 64))
    local = isinstance(folder, LocalFolder)
    readers = min(16, os.cpu_count() or 1) if local else _REMOTE_READERS
    pending: deque[tuple[np.ndarray, list[Future]]] = deque()
    held = 0
    with ThreadPoolExecutor(readers, "gpt-oss-read") as pool:
        try:
            for request, size in zip(requests, sizes, strict=True):
                while pending and held + size > _LOOK_AHEAD * largest:
                    yield _finished(*pending[0])
                    held -= pending.popleft()[0].nbytes
                variable = variables[request.path]
                bounds = request.bounds(variable.shape)
                out = allocate([x.stop - x.start for x in bounds], request.dtype)
                jobs = [
                    pool.submit(job)
                    for part in parts[request.path]
                    for job in _jobs(folder, part, variable, bounds, out, chunk)
                ]
                pending.append((out, jobs))
                held += size
                del out, jobs
            while pending:
                yield _finished(*pending[0])
                held -= pending.popleft()[0].nbytes
        finally:
            pool.shutdown(cancel_futures=True)


def _nbytes(request: Request, variable: Variable) -> int:
    lengths = (x.stop - x.start for x in request.bounds(variable.shape))
    return math.prod(lengths) * np.dtype(request.dtype).itemsize


def _finished(out: np.ndarray, jobs: list[Future]) -> np.ndarray:
    for job in jobs:
        job.result()
    return out


def _jobs(folder: Folder, part: Part, variable: Variable, bounds, out: np.ndarray, chunk: int):
    """The reads that fill a part's share of `out`, each a function to call."""
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
    for rows, columns in _boxes(view, wanted, variable.dtype.itemsize, chunk):
        # Columns may be read wider than wanted, where a few bytes from each row would cost more.
        use = slice(max(columns.start, wanted[1].start), min(columns.stop, wanted[1].stop))
        target = out[
            rows.start - wanted[0].start : rows.stop - wanted[0].start,
            use.start - wanted[1].start : use.stop - wanted[1].start,
        ]
        shape = (rows.stop - rows.start, columns.stop - columns.start, *view[2:])
        columns_used = slice(use.start - columns.start, use.stop - columns.start)
        select = (slice(None), columns_used, *wanted[2:])
        offset = (base + rows.start * row + columns.start * unit) * variable.dtype.itemsize
        yield functools.partial(
            _read, folder, part.tensor, offset, shape, variable.dtype, select, target
        )


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
    if target.dtype == values.dtype:
        target[...] = values
    elif values.dtype == BF16 and target.dtype == np.float32:
        np.left_shift(values.view(np.uint16), 16, out=target.view(np.uint32), dtype=np.uint32)
    else:
        raise ValueError(f"{values.dtype} cannot be read as {target.dtype}, only as float32.")
