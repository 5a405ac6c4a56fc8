"""What a device reaches, measured: bytes a second by copying, FLOPs a second by multiplying.

They are what the speed of a model or of a kernel is held against. It knows neither.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

_QUEUED = 10  # Calls that are timed together.


@dataclasses.dataclass(frozen=True)
class Limits:
    """What devices reach together.

    Attributes:
      gb_per_second: Read and written when a large array is copied, in 1e9 bytes.
      tflop_per_second: Of a product of two large matrices.
    """

    gb_per_second: float
    tflop_per_second: float


def measure(device: jax.Device, dtype, devices: int = 1) -> Limits:
    """Measures one device, and takes the others to be like it.

    The fastest of a few tries counts: a limit is what can be reached.

    Args:
      device: To measure.
      dtype: Of the matrices.
      devices: How many there are.
    """
    return Limits(
        devices * copy_bandwidth(device) / 1e9, devices * matrix_rate(device, dtype) / 1e12
    )


def copy_bandwidth(device: jax.Device) -> float:
    """Bytes a second, read and written, when a large array is copied onto itself over and over.

    New memory would have to be mapped first, which takes a CPU longer than the copy.
    """
    stats = device.memory_stats() or {}
    free = stats.get("bytes_limit", 2**31) - stats.get("bytes_in_use", 0)
    count = min(2**30, max(2**26, free // 8)) // 4
    x = jax.device_put(jnp.zeros(count, jnp.uint32), device)
    size = x.nbytes
    return 2 * size / _fastest(jax.jit(lambda x: x + jnp.uint32(1), donate_argnums=0), x)


def matrix_rate(device: jax.Device, dtype) -> float:
    """FLOPs a second of products of two large matrices, those of float32 as exact as a model's.

    The values are random: zeros take a GPU less power, so it multiplies them faster.
    """
    size = 1024 if device.platform == "cpu" else 8192
    w = jax.device_put(jax.random.normal(jax.random.key(0), (size, size), dtype), device)
    # Of that size products of products stay near one.
    w *= jnp.asarray(size**-0.5, dtype)
    precision = "highest" if w.dtype == jnp.float32 else None
    product = jax.jit(functools.partial(jnp.matmul, precision=precision))
    return 2 * size**3 / _fastest(lambda x: product(x, w), w)


def _fastest(step: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Seconds of a step among several that are queued, each with what the one before it gave."""
    x = jax.block_until_ready(step(x))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(_QUEUED):
            x = step(x)
        x.block_until_ready()
        seconds.append((time.perf_counter() - start) / _QUEUED)
    return min(seconds)
