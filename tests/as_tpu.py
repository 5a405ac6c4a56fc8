"""A test as on a TPU; importable from any folder of tests."""

import contextlib

import jax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType


@contextlib.contextmanager
def as_on_a_tpu(kind="TPU v5 lite"):
    """Kernels for TPU are chosen, and interpreted on the CPU."""
    mesh = AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=AbstractDevice(kind, 1, "tpu")
    )
    with jax.sharding.use_abstract_mesh(mesh), pltpu.force_tpu_interpret_mode():
        yield
