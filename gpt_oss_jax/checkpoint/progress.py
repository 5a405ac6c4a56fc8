"""One line on stderr that says how far a long operation is; nothing when stderr is no terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_GB = 1e9


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows bytes done and the rate.

    Args:
      what: "loading", say.
      total: Bytes to do.

    Yields:
      A function to call with the bytes of each step.
    """
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    start, done = time.perf_counter(), 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        rate = done / _GB / max(1e-9, time.perf_counter() - start)
        line = f"{what}: {done / _GB:.2f} of {total / _GB:.2f} GB, {rate:.2f} GB/s"
        sys.stderr.write(f"\r{line:<72}")
        sys.stderr.flush()

    try:
        yield step
    finally:
        sys.stderr.write("\n")
