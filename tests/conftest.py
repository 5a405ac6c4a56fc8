"""What every test shares: strict JAX settings, eight CPU devices and two model sizes."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

from sizes import SHARDABLE, TINY  # noqa: E402  (the settings come before anything uses JAX)

from gpt_oss_jax.config import Config  # noqa: E402


@pytest.fixture
def tiny() -> Config:
    return TINY


@pytest.fixture
def shardable() -> Config:
    return SHARDABLE
