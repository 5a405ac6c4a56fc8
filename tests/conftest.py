"""What every test shares: strict JAX settings, eight CPU devices and two model sizes."""

import gc
from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

from sizes import SHARDABLE, TINY  # noqa: E402  (the settings come before anything uses JAX)

from gpt_oss_jax.config import Config  # noqa: E402

# Nobody runs kernels for Hopper with an older JAX: it goes another way, and says so. Those for TPU
# are tested with it by themselves, in whole models with the newer one.
collect_ignore_glob = ["test_hopper_*.py", "test_tpu_model.py"]
if jax.__version_info__ >= (0, 11):
    collect_ignore_glob = []

# Linux gives a process 65,530 of them; each program that XLA compiles for CPUs takes some.
_MANY_MAPS = 30_000


@pytest.fixture(autouse=True, scope="module")
def compiles_quickly():
    """Most tests run for less time than their programs take to compile; others override this."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Programs of earlier tests are dropped before there is no room for more, which aborts."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > _MANY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def tiny() -> Config:
    return TINY


@pytest.fixture
def shardable() -> Config:
    return SHARDABLE
