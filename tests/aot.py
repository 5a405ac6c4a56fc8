"""Compiling for TPUs that are not there, with the compiler of `libtpu`."""

import contextlib
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TOPOLOGIES = ("v5e:1x1", "v5p:2x2x1", "v6e:1x1", "tpu7x:2x2x1")


class Target:
    """The first chip of a topology."""

    def __init__(self, topology: str):
        # Without these libtpu asks the cloud where it runs.
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        one = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
        found = topologies.get_topology_desc(topology, platform="tpu", **one)
        self.mesh = Mesh(np.array(found.devices[:1]), ("x",))

    def array(self, shape, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(self.mesh, PartitionSpec())
        )

    def compile(self, function, *args, **options):
        with contextlib.ExitStack() as stack:
            stack.enter_context(jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh))
            return jax.jit(function, **options).trace(*args).lower().compile()
