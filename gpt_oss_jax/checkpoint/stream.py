"""Reads what is requested, in order and in parallel, a bounded number of bytes ahead.

Knows nothing of files or formats: a source says which reads fill an array.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from gpt_oss_jax.checkpoint.files import allocate
from gpt_oss_jax.checkpoint.names import Variable

# Memory held for arrays that are being read, in units of the largest one. With the buffers of the
# readers it stays under the promised 2.
_LOOK_AHEAD = 1.25
_LOCAL_READERS = 16
_REMOTE_READERS = 32

# From the path of a variable, the bounds of a slice and an array for it, the reads that fill that.
Reads = Callable[[str, tuple[slice, ...], np.ndarray], Iterable[Callable[[], None]]]


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
    requests: Iterable[Request], variables: Mapping[str, Variable], reads: Reads, *, remote: bool
) -> Iterator[np.ndarray]:
    """Reads what is requested; an array counts as held until the next is asked for.

    Args:
      requests: What to read.
      variables: By path, for their shapes.
      reads: Of the source.
      remote: Whether it is latency that reading in parallel has to hide.

    Yields:
      One array a request, in memory that JAX on a CPU can take over.

    Raises:
      ValueError: If the bytes are not there, although all headers said so.
    """
    plan = []
    for request in requests:
        bounds = request.bounds(variables[request.path].shape)
        plan.append((request, bounds, [x.stop - x.start for x in bounds]))
    sizes = [math.prod(shape) * np.dtype(request.dtype).itemsize for request, _, shape in plan]
    budget = _LOOK_AHEAD * max(sizes, default=0)
    readers = _REMOTE_READERS if remote else min(_LOCAL_READERS, os.cpu_count() or 1)
    pending: deque[tuple[np.ndarray, list[Future]]] = deque()
    held = 0
    with ThreadPoolExecutor(readers, "gpt-oss-read") as pool:
        try:
            for (request, bounds, shape), size in zip(plan, sizes, strict=True):
                while pending and held + size > budget:
                    yield _finished(*pending[0])
                    held -= pending.popleft()[0].nbytes
                out = allocate(shape, request.dtype)
                pending.append((out, [pool.submit(x) for x in reads(request.path, bounds, out)]))
                held += size
                del out
            while pending:
                yield _finished(*pending[0])
                pending.popleft()
        finally:
            pool.shutdown(cancel_futures=True)


def _finished(out: np.ndarray, jobs: list[Future]) -> np.ndarray:
    for job in jobs:
        job.result()
    return out
