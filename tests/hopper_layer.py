"""What the tests of the Hopper kernels share: a random expert layer, and lowering for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss_jax.kernels.expert_matmul.weights import ExpertWeights
from gpt_oss_jax.quant import MXArray


def layer(M, E=5, X=2, D=96, F=64, bias=np.float32, same=False):
    """Rows, experts, routing weights and expert weights, all random."""
    random = np.random.default_rng(M)

    def packed(*shape):
        blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // 32, 16))
        scales = random.integers(110, 124, (*shape[:-1], shape[-1] // 32))
        return MXArray(jnp.asarray(blocks, jnp.uint8), jnp.asarray(scales, jnp.uint8))

    w = ExpertWeights(
        packed(E, F, 2, D),
        jnp.asarray(random.normal(size=(E, F, 2)), bias),
        packed(E, D, F),
        jnp.asarray(random.normal(size=(E, D)), bias),
    )
    x = jnp.asarray(random.normal(size=(M, D)), jnp.bfloat16)
    chosen = np.stack([random.permutation(X if same else E)[:X] for _ in range(M)])
    weight = random.random((M, X))
    return x, jnp.asarray(chosen, jnp.int32), jnp.asarray(weight, jnp.float32), w


def kernels_for_cuda(function, *args):
    """How many Mosaic GPU kernels a function becomes."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("mosaic_gpu_v2")
