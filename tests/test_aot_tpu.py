"""The kernels for TPU through the real compiler: they build, and nothing copies weights."""

import functools

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("libtpu", reason="libtpu is not installed: nothing compiles for TPU here")

import aot

from gpt_oss_jax.config import GPT_OSS_20B, GPT_OSS_120B
from gpt_oss_jax.kernels import attention, expert_mlp
from gpt_oss_jax.kernels.expert_matmul.weights import ExpertWeights
from gpt_oss_jax.quant import MXArray

target = functools.cache(aot.Target)


def expert_program(topology, E, X, D, F, M, dtype=jnp.bfloat16):
    """The compiled expert layer, and the bytes of its weights."""
    t = target(topology)

    def words(*shape):
        scales = jax.ShapeDtypeStruct((*shape[:-1], shape[-1] // 32), jnp.uint8)
        blocks = jax.ShapeDtypeStruct((*scales.shape, 16), jnp.uint8)
        m = jax.eval_shape(MXArray.in_words, MXArray(blocks, scales))
        return jax.tree.map(lambda x: t.array(x.shape, x.dtype), m)

    w = ExpertWeights(
        words(E, F, 2, D),
        t.array((E, F, 2), dtype),
        words(E, D, F),
        t.array((E, D), dtype),
    )
    run = functools.partial(expert_mlp, limit=7.0, implementation="mosaic_tpu")
    program = t.compile(
        run, t.array((M, D), dtype), t.array((M, X), jnp.int32), t.array((M, X), jnp.float32), w
    )
    return program, 4 * sum(m.blocks.size + m.scales.size for m in (w.up, w.down))


@pytest.mark.parametrize("config", [GPT_OSS_20B, GPT_OSS_120B], ids=["20b", "120b"])
@pytest.mark.parametrize("topology", aot.TOPOLOGIES)
def test_experts_of_one_row_are_read_in_place(topology, config):
    program, weights = expert_program(
        topology,
        config.num_experts,
        config.experts_per_token,
        config.hidden_size,
        config.intermediate_size,
        1,
    )
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < weights / 1000
    # The tiles add nothing but a 45th part of the outputs, and six groups of scales.
    assert memory.argument_size_in_bytes < 1.04 * 3 * 2880 * 2880 * config.num_experts * 17 / 32


@pytest.mark.parametrize("topology", aot.TOPOLOGIES)
@pytest.mark.parametrize(("M", "dtype"), [(5, jnp.float32), (40, jnp.bfloat16)])
def test_other_programs_build(topology, M, dtype):
    expert_program(topology, 8, 4, 320, 576, M, dtype)


@pytest.mark.parametrize("topology", aot.TOPOLOGIES)
@pytest.mark.parametrize(
    ("T", "S", "window", "dtype"),
    [
        (1, 32768, None, jnp.bfloat16),
        (1, 128, 128, jnp.bfloat16),
        (16, 640, 128, jnp.bfloat16),
        (1, 384, None, jnp.float32),
    ],
)
def test_attention_reads_the_cache_in_place(topology, T, S, window, dtype):
    t, K, G, H = target(topology), 8, 8, 64

    def run(q, k, v, sinks, q_pos, k_pos):
        where = {"q_pos_BT": q_pos, "k_pos_BS": k_pos, "window": window}
        k, v = (x.reshape(1, S, K, H) for x in (k, v))  # As out of the cache.
        return attention(q, k, v, sinks, **where, implementation="mosaic_tpu")

    program = t.compile(
        run,
        t.array((1, T, K, G, H), dtype),
        t.array((1, S, K * H), dtype),
        t.array((1, S, K * H), dtype),
        t.array((K, G), dtype),
        t.array((1, T), jnp.int32),
        t.array((1, S), jnp.int32),
    )
    memory = program.memory_analysis()
    cache = 2 * S * K * H * jnp.dtype(dtype).itemsize
    assert memory.argument_size_in_bytes < 1.1 * cache + (1 << 20)
    assert memory.temp_size_in_bytes < cache / 100 + (3 << 20)
