"""A model of random weights in a fraction of a second: drawn by numpy, nothing is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt_oss_jax.model import Transformer
from gpt_oss_jax.sharding import named_sharding


def random_model(config, *, seed=0, dtype=jnp.float32, experts="mxfp4", mesh=None) -> Transformer:
    """Weights that keep activations near one; on a mesh, if given, split as `load` splits them."""
    kind = {"dtype": dtype, "experts": experts, "mesh": mesh}
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), **kind))
    graphdef, state = nnx.split(abstract)
    rng = np.random.default_rng(seed)

    def draw(path, variable):
        if path[-1] == "blocks":
            return rng.integers(0, 256, variable.shape, np.uint8)
        if path[-1] == "scales":
            return rng.integers(121, 124, variable.shape, np.uint8)
        noise = rng.standard_normal(variable.shape, np.float32)
        if path[-1] == "scale":
            return 1 + 0.1 * noise
        return noise * variable.shape[-1] ** -0.5 if path[-1] == "weight" else 0.3 * noise

    def put(variable, value):
        value = value.astype(variable.dtype)
        if mesh is None:
            return jnp.asarray(value)
        return jax.device_put(value, named_sharding(mesh, variable.axes, variable.shape))

    flat = [(path, v.replace(put(v, draw(path, v)))) for path, v in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
