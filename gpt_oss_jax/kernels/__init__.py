"""Operations that have more than one implementation; one folder each, behind one signature."""

from gpt_oss_jax.kernels.attention import api as _attention
from gpt_oss_jax.kernels.attention.api import attention as attention
from gpt_oss_jax.kernels.contract import einsum as einsum
from gpt_oss_jax.kernels.expert_matmul import api as _expert_matmul
from gpt_oss_jax.kernels.expert_matmul.api import expert_mlp as expert_mlp

IMPLEMENTATIONS = tuple(_attention.IMPLEMENTATIONS | _expert_matmul.IMPLEMENTATIONS)
