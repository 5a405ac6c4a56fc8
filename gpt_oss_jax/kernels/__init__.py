"""Operations that have more than one implementation; one folder each, behind one signature."""

from gpt_oss_jax.kernels.attention.api import attention as attention
from gpt_oss_jax.kernels.contract import einsum as einsum
from gpt_oss_jax.kernels.expert_matmul.api import expert_mlp as expert_mlp
