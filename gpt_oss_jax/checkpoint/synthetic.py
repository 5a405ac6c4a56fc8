"""Random weights of realistic size and range, for tests and benchmarks: on disk, or on the device.

On disk everything is cut from a few megabytes of random values, so that a full-size checkpoint is
written as fast as the disk takes it. On the device each array is made by one jitted call, in its
shards.
"""

from __future__ import annotations

import functools
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss_jax.checkpoint import names, writer
from gpt_oss_jax.checkpoint.names import BF16, Variable
from gpt_oss_jax.checkpoint.progress import progress
from gpt_oss_jax.checkpoint.stream import Request
from gpt_oss_jax.config import GPT_OSS_20B, GPT_OSS_120B, Config

PREFIX = "synthetic:"
_CONFIGS = {"20b": GPT_OSS_20B, "120b": GPT_OSS_120B}
# Odd, so that the rows of a matrix, all of even length, fall on different values for long.
_POOL = (16 << 20) + 1
_SCALES = (119, 124)


def config_of(name: str) -> Config:
    """The config of "synthetic:20b" or "synthetic:120b".

    Raises:
      ValueError: For another name.
    """
    size = name.removeprefix(PREFIX)
    if size not in _CONFIGS:
        known = ", ".join(PREFIX + x for x in _CONFIGS)
        raise ValueError(f"a synthetic model must be one of {known}, got {name!r}.")
    return _CONFIGS[size]


def write(
    config: Config,
    folder: str | os.PathLike,
    layout: str = "hf",
    seed: int = 0,
    experts: str = "mxfp4",
) -> Path:
    """Writes a checkpoint folder with random weights.

    Args:
      config: Sizes.
      folder: To make.
      layout: "hf" or "original".
      seed: Same seed, same bytes, in either layout.
      experts: "mxfp4", or "dense" for bfloat16 experts (in the layout "hf" only).

    Returns:
      The folder.

    Raises:
      ValueError: If the folder exists or the layout cannot hold the experts.
    """
    if layout not in names.LAYOUTS or (layout == "original" and experts == "dense"):
        raise ValueError(f'layout must be "hf", or "original" with mxfp4, got {layout!r}.')
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists; a new folder is wanted.")
    source = _RandomSource(config, seed, experts)
    format = {"hf": "hf-bf16" if experts == "dense" else "hf-mxfp4"}.get(layout, layout)
    folder.mkdir(parents=True)
    with progress("writing", sum(x.nbytes for x in source.variables.values())) as step:
        writer.write_tensors(source, folder, format, step)
    for name, content in writer.config_files(config, format).items():
        (folder / name).write_bytes(content)
    return folder


def arrays(
    config: Config, targets: Mapping[str, jax.ShapeDtypeStruct], seed: int = 0
) -> Iterator[tuple[str, jax.Array]]:
    """Makes random weights where the targets' shardings want them; nothing passes the host."""
    key = jax.random.key(seed, impl="unsafe_rbg")
    # The largest ones first: what making one takes beside itself is more than the last ones leave.
    for path, target in sorted(targets.items(), key=lambda x: -math.prod(x[1].shape)):
        make = _maker(_moments(path, config), target.shape, target.dtype, target.sharding)
        yield path, make(jax.random.fold_in(key, zlib.crc32(path.encode())))


def _moments(path: str, config: Config) -> tuple[float, float] | str:
    """Mean and deviation of a variable's values, or which bytes they are."""
    *_, module, name = path.split("/")
    if name in ("blocks", "scales"):
        return name
    if name == "scale":
        return 1.0, 0.1
    if name == "sinks" or module == "embedding":
        return 0.0, 1.0
    if name == "bias":
        return 0.0, 0.1
    wide = {"out": config.num_attention_heads * config.head_dim, "down": config.intermediate_size}
    return 0.0, wide.get(module, config.hidden_size) ** -0.5


@functools.cache
def _maker(moments, shape, dtype, sharding):
    def make(key):
        if isinstance(moments, str):
            values = jax.random.bits(key, shape, jnp.uint8)
            span = jnp.uint8(_SCALES[1] - _SCALES[0])
            return values if moments == "blocks" else _SCALES[0] + values % span
        mean, deviation = moments
        return (mean + deviation * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return jax.jit(make, out_shardings=sharding)


class _RandomSource:
    """A source of random variables, cut from pools of random values."""

    def __init__(self, config: Config, seed: int, experts: str):
        self.config = config
        self.variables = {x.path: x for x in names.variables(config, experts)}
        self._seed = seed
        self._pools: dict[Any, np.ndarray] = {}
        self._memory = np.empty(max(x.nbytes for x in self.variables.values()), np.uint8)

    def stream(self, requests: Iterable[Request]) -> Iterator[np.ndarray]:
        """Whole variables, in order, all in the same memory."""
        for request in requests:
            yield self._cut(self.variables[request.path])

    def _cut(self, variable: Variable) -> np.ndarray:
        moments = _moments(variable.path, self.config)
        if moments not in self._pools:
            self._pools[moments] = self._pool(moments)
        pool, size = self._pools[moments], math.prod(variable.shape)
        out = self._memory[: variable.nbytes].view(variable.dtype)
        start = zlib.crc32(variable.path.encode()) % pool.size
        at = 0
        while at < size:
            run = pool[start : start + size - at]
            out[at : at + run.size] = run
            at, start = at + run.size, 0
        return out.reshape(variable.shape)

    def _pool(self, moments) -> np.ndarray:
        size = min(_POOL, 1 + 2 * max(math.prod(x.shape) for x in self.variables.values()))
        rng = np.random.default_rng([self._seed, zlib.crc32(repr(moments).encode())])
        if moments == "blocks":
            return rng.integers(0, 256, size, np.uint8)
        if moments == "scales":
            return rng.integers(*_SCALES, size, np.uint8)
        mean, deviation = moments
        return (mean + deviation * rng.standard_normal(size, np.float32)).astype(BF16)
