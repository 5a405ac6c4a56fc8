"""What every test shares: strict JAX settings, eight CPU devices and two model sizes."""

import contextlib

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

from sizes import SHARDABLE, TINY  # noqa: E402  (the settings come before anything uses JAX)

from gpt_oss_jax.config import Config  # noqa: E402


@contextlib.contextmanager
def as_on_a_tpu(kind="TPU v5 lite"):
    """Kernels for TPU are chosen, and interpreted on the CPU."""
    mesh = AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=AbstractDevice(kind, 1, "tpu")
    )
    with jax.sharding.use_abstract_mesh(mesh), pltpu.force_tpu_interpret_mode():
        yield


@pytest.fixture
def tiny() -> Config:
    return TINY


@pytest.fixture
def shardable() -> Config:
    return SHARDABLE
