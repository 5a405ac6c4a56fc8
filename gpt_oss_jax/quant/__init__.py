"""MXFP4, the 4-bit block format of the released expert weights."""

from gpt_oss_jax.quant.mxarray import MXArray as MXArray
from gpt_oss_jax.quant.mxfp4 import dequantize as dequantize, quantize as quantize
