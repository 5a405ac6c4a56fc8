"""Three model sizes for tests, importable from any folder of tests.

`TINY` has a different size on every axis, so that a transposed or swapped axis cannot hide; nothing
divides it, so tests of sharding use `SHARDABLE`.
"""

from gpt_oss_jax.config import Config

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

# Text needs the released vocabulary; all else is as small as it gets.
WHOLE_VOCABULARY = Config(
    num_hidden_layers=2,
    num_experts=4,
    experts_per_token=2,
    vocab_size=201_088,
    hidden_size=32,
    intermediate_size=64,
    head_dim=16,
    num_attention_heads=4,
    num_key_value_heads=2,
    sliding_window=16,
)
