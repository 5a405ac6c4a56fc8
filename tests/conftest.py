"""What every test shares: strict JAX settings, eight CPU devices and two model sizes.

`TINY` has a different size on every axis, so that a transposed or swapped axis cannot hide; nothing
divides it, so tests of sharding use `SHARDABLE`.
"""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

from gpt_oss_jax.config import Config  # noqa: E402  (the settings come before anything uses JAX)

TINY = Config(
    num_hidden_layers=4,
    num_experts=11,
    experts_per_token=2,
    vocab_size=101,
    hidden_size=96,
    intermediate_size=160,
    head_dim=14,
    num_attention_heads=15,
    num_key_value_heads=3,
    sliding_window=7,
)

# Every axis that the table in sharding.py splits divides 2; experts divide 8, kv heads 4. The 10
# blocks of the expert width divide 2 only, as the 90 of the released models do.
SHARDABLE = Config(
    num_hidden_layers=2,
    num_experts=8,
    experts_per_token=2,
    vocab_size=112,
    hidden_size=192,
    intermediate_size=320,
    head_dim=10,
    num_attention_heads=12,
    num_key_value_heads=4,
    sliding_window=5,
)


@pytest.fixture
def tiny() -> Config:
    return TINY


@pytest.fixture
def shardable() -> Config:
    return SHARDABLE
