"""The gpt-oss transformer in Flax NNX.

Dimension key, used in variable suffixes, einsum strings and docstrings throughout the package:

  B batch                  T new positions           S cache slots
  D model width            N query heads             K key/value heads      G = N / K
  H head size              E experts                 X experts a token      F expert width
  M rows (B T)             R ring slots              V vocabulary
  Z pairs of row and expert (M X)                    P rows of one tile of pairs
  C parts of a fused projection: G + 2 heads of qkv, gate and linear of up

In quant/, where nothing is shared with these, G counts blocks of 32 values.
"""

from gpt_oss_jax.model.cache import Cache as Cache, init_cache as init_cache
from gpt_oss_jax.model.layers import Packed as Packed
from gpt_oss_jax.model.transformer import Transformer as Transformer
