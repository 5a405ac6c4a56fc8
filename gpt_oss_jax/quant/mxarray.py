"""MXArray: a matrix held as MXFP4 blocks and scales, a pytree the kernels take."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gpt_oss_jax.quant import hopper_words, mxfp4, tpu_folded, tpu_words


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MXArray:
    """A float array whose last axis is packed, 4.25 bits a value; or folded, 8.25 bits.

    Attributes:
      blocks: uint8 [..., G, 16]; or int32, as in `tpu_words`; or uint8, as in `tpu_folded`.
      scales: uint8 [..., G]; or int32, as in `tpu_words`.
      words_of: None in checkpoint order; else the shape of the array it stands for.
      factors: float32 [E] if it is folded.
      native: Words are those of `tpu_words` for float4_e2m1fn.
      shuffled: Bits of the blocks are where `hopper_words` puts them.
    """

    blocks: jax.Array
    scales: jax.Array
    words_of: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    factors: jax.Array | None = None
    native: bool = dataclasses.field(default=False, metadata={"static": True})
    shuffled: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array it stands for, [..., 32 G]."""
        if self.words_of is not None:
            return self.words_of
        return (*self.scales.shape[:-1], mxfp4.BLOCK * self.scales.shape[-1])

    def __getitem__(self, index) -> MXArray:
        """Indexes the leading axes; the packed one stays whole."""
        if self.words_of is not None:
            return self.in_checkpoint_order()[index]
        return dataclasses.replace(self, blocks=self.blocks[index], scales=self.scales[index])

    def dequantize(self, dtype=jnp.bfloat16) -> jax.Array:
        """Decodes to `dtype` [..., 32 G], exactly."""
        own = self.in_checkpoint_order()
        return mxfp4.dequantize(own.blocks, own.scales, dtype)

    def in_words(self, native: bool = False) -> MXArray:
        """The same array, [E, N, D] or [E, N, 2, D], in the order that TPU kernels want.

        Args:
          native: For TPUs that know float4_e2m1fn.
        """
        if self.words_of is not None:
            return self
        own = self.in_checkpoint_order()
        words = tpu_words.to_words(own.blocks, own.scales, native)
        return MXArray(*words, words_of=self.shape, native=native)

    def shuffle(self) -> MXArray:
        """The same array in the order that Hopper's kernels want."""
        if self.shuffled:
            return self
        own = self.in_checkpoint_order()
        return MXArray(hopper_words.shuffle(own.blocks), own.scales, shuffled=True)

    def folds(self) -> jax.Array:
        """Whether `folded` would be the same array: bool []."""
        own = self.in_checkpoint_order()
        return tpu_folded.folds(own.blocks, own.scales)

    def folded(self) -> MXArray:
        """The same array, [E, N, D] or [E, N, 2, D], in numbers that TPUs multiply with."""
        if self.words_of is not None:
            return self
        own = self.in_checkpoint_order()
        blocks, scales, factors = tpu_folded.fold(own.blocks, own.scales)
        return MXArray(blocks, scales, self.shape, factors)

    def in_checkpoint_order(self) -> MXArray:
        """The same array, byte for byte as the checkpoints have it."""
        if self.shuffled:
            return MXArray(hopper_words.in_order(self.blocks), self.scales)
        if self.words_of is None:
            return self
        N, G = self.words_of[1], self.words_of[-1] // mxfp4.BLOCK
        if self.factors is not None:
            return MXArray(*tpu_folded.unfold(self.blocks, self.scales, self.factors, N))
        return MXArray(*tpu_words.from_words(self.blocks, self.scales, N, G, self.native))
