"""MXArray: a matrix held as MXFP4 blocks and scales, a pytree the kernels take."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gpt_oss_jax.quant import mxfp4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MXArray:
    """A float array whose last axis is packed, 4.25 bits a value.

    Attributes:
      blocks: uint8 [..., G, 16].
      scales: uint8 [..., G].
    """

    blocks: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array it stands for, [..., 32 G]."""
        return (*self.scales.shape[:-1], mxfp4.BLOCK * self.scales.shape[-1])

    def __getitem__(self, index) -> MXArray:
        """Indexes the leading axes; the packed one stays whole."""
        return MXArray(self.blocks[index], self.scales[index])

    def dequantize(self, dtype=jnp.bfloat16) -> jax.Array:
        """Decodes to `dtype` [..., 32 G], exactly."""
        return mxfp4.dequantize(self.blocks, self.scales, dtype)
