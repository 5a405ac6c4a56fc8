"""Folders of files, local or in a bucket, read by byte range into memory that the caller owns.

A local file is read with `preadv` straight into place. Anything with a scheme (gs://, file://,
s3://) is read through TensorStore, which comes with Orbax. Knows nothing of tensors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorstore as ts

_ALIGNMENT = 64


class LocalFolder:
    """A folder of this machine."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def __str__(self):
        return str(self.path)

    def names(self) -> list[str]:
        """Names of the files directly in it."""
        return sorted(x.name for x in self.path.iterdir() if x.is_file())

    def read(self, name: str) -> bytes:
        """All of a small file."""
        return (self.path / name).read_bytes()

    def ends_at(self, name: str, size: int) -> bool:
        """Whether a file has `size` bytes."""
        return (self.path / name).stat().st_size == size

    def read_into(self, name: str, offset: int, out: np.ndarray) -> None:
        """Fills `out`, contiguous, with the bytes from `offset` on. Safe to call from threads.

        Raises:
          ValueError: If the file ends before `out` is full.
        """
        rest = memoryview(out.reshape(-1).view(np.uint8))
        fd = os.open(self.path / name, os.O_RDONLY)
        try:
            while rest:
                count = os.preadv(fd, [rest], offset)
                if not count:
                    raise ValueError(f"{name} ends {len(rest)} bytes too early.")
                rest, offset = rest[count:], offset + count
        finally:
            os.close(fd)


class RemoteFolder:
    """A folder under a URL that TensorStore knows, such as gs://bucket/gpt-oss-20b.

    Tested with file://, which takes the same way; gs:// itself needs a bucket, and is not.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/") + "/"
        try:
            self._store = ts.KvStore.open(self.url).result()
        except ValueError as error:
            raise ValueError(f"TensorStore cannot open {url}: {error}") from error

    def __str__(self):
        return self.url

    def names(self) -> list[str]:
        """Names of the files directly in it.

        Raises:
          ValueError: If what the URL names has no list of files, as http has none.
        """
        try:
            keys = [key.decode() for key in self._store.list().result()]
        except NotImplementedError as error:
            raise ValueError(
                f"{self.url} cannot be listed; name a folder, gs://BUCKET/FOLDER or a repository "
                "such as openai/gpt-oss-20b."
            ) from error
        return sorted(key for key in keys if "/" not in key)

    def read(self, name: str) -> bytes:
        """All of a small file."""
        return self._range(name, None)

    def ends_at(self, name: str, size: int) -> bool:
        """Whether a file has `size` bytes: its last one can be read, and none behind it."""
        return self._has(name, size - 1) and not self._has(name, size)

    def read_into(self, name: str, offset: int, out: np.ndarray) -> None:
        """Fills `out`, contiguous, with the bytes from `offset` on. Safe to call from threads."""
        flat = out.reshape(-1).view(np.uint8)
        flat[:] = np.frombuffer(self._range(name, slice(offset, offset + flat.size)), np.uint8)

    def _has(self, name: str, offset: int) -> bool:
        try:
            return len(self._range(name, slice(offset, offset + 1))) == 1
        except ValueError:
            return False

    def _range(self, name: str, byte_range: slice | None) -> bytes:
        options = {} if byte_range is None else {"byte_range": byte_range}
        result = self._store.read(name, **options).result()
        if result.state != "value":
            raise FileNotFoundError(f"{self.url}{name} does not exist.")
        return result.value


Folder = LocalFolder | RemoteFolder


def open_folder(path: str | os.PathLike) -> Folder:
    """The folder at a path or URL; a local one must exist.

    Raises:
      ValueError: If it is not there, or TensorStore has no driver for the URL.
    """
    if "://" in str(path):
        return RemoteFolder(str(path))
    if not Path(path).is_dir():
        raise ValueError(f"a checkpoint folder is wanted, but {path} is not a folder.")
    return LocalFolder(path)


def allocate(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory, aligned so that JAX on a CPU takes it over without a copy."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)
