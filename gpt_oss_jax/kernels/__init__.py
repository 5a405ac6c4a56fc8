"""Operations that have more than one implementation; one folder each, behind one signature."""

from gpt_oss_jax.kernels.attention import api as _attention
from gpt_oss_jax.kernels.attention.api import (
    attention as attention,
    store_and_attend as store_and_attend,
)
from gpt_oss_jax.kernels.contract import einsum as einsum
from gpt_oss_jax.kernels.expert_matmul import api as _expert_matmul
from gpt_oss_jax.kernels.expert_matmul.api import expert_mlp as expert_mlp
from gpt_oss_jax.kernels.routing.api import choose as choose

# What a whole model can be asked to run on: what every operation has.
IMPLEMENTATIONS = tuple(
    n for n in _expert_matmul.IMPLEMENTATIONS if n in _attention.IMPLEMENTATIONS
)
