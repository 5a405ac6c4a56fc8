"""How fast a model reads prompts and writes tokens, and how near that is to the memory's limit.

Decoding reads every weight that a token needs from memory, so it cannot be faster than bandwidth
over bytes. The bandwidth is measured in the same run, by copying a large array: a limit that
programs do reach. Run it as `gpt-oss-jax bench MODEL`.
"""

import dataclasses
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt_oss_jax.generate import generate_batch
from gpt_oss_jax.model import Transformer
from gpt_oss_jax.plan import weights_of_a_step
from gpt_oss_jax.sampling import SamplingParams

_COPIES = 10


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Speed of one model at one shape; the names carry the units.

    Attributes:
      device: Kind of the devices.
      devices: How many of them hold the model.
      dtype: Of activations and cache.
      batch: Rows generated at once.
      prompt_tokens: Tokens of each prompt.
      new_tokens: Tokens generated in each row.
      compile_seconds: What the first run took more than the fastest one.
      prefill_tokens_per_second: Prompt tokens of all rows, over the time to the first new token.
      decode_tokens_per_second: New tokens of all rows after the first.
      decode_gb_per_step: Bytes that one decode step has to read, of weights and cache, in 1e9.
      bandwidth_gb_per_second: Of all the devices together, measured by copying.
      decode_percent_of_bandwidth: Of the decode speed at which memory would be the only limit.
    """

    device: str
    devices: int
    dtype: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    compile_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    decode_gb_per_step: float
    bandwidth_gb_per_second: float
    decode_percent_of_bandwidth: float


def measure(
    model: Transformer,
    *,
    batch: int = 1,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    repeats: int = 3,
    report: Callable[[str], None] = lambda line: None,
) -> Measurement:
    """Times greedy generation from random prompts and keeps the fastest of several runs.

    Args:
      model: The model; random weights do.
      batch: Rows at once.
      prompt_tokens: Tokens of each prompt.
      new_tokens: Tokens to generate in each row, at least 2.
      repeats: Timed runs, after one that compiles.
      report: Called with a line whenever a stage begins.

    Raises:
      ValueError: A number is too small, the tokens do not fit the model's context, or the timing
        is too noisy to mean anything.
    """
    if min(batch, prompt_tokens, repeats) < 1 or new_tokens < 2:
        raise ValueError(
            "wanted batch, prompt tokens and repeats of at least 1 and at least 2 new tokens, got "
            f"{batch=}, {prompt_tokens=}, {repeats=}, {new_tokens=}."
        )
    prompts = np.random.default_rng(0).integers(
        min(model.config.vocab_size, 199_998), size=(batch, prompt_tokens)
    )

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        generate_batch(
            model,
            prompts.tolist(),
            max_tokens=tokens,
            sampling=SamplingParams(temperature=0.0),
            stop_tokens=(),
        )
        return time.perf_counter() - start

    report("compiling")
    compiling = seconds(1) + seconds(new_tokens)
    report(f"timing {repeats} runs of {batch} x ({prompt_tokens} + {new_tokens}) tokens")
    first = min(seconds(1) for _ in range(repeats))
    whole = min(seconds(new_tokens) for _ in range(repeats))
    if whole <= first:
        raise ValueError(
            f"{new_tokens} new tokens took {whole:.4f} s, the first alone {first:.4f} s: other "
            "programs disturb the timing; ask for more new tokens or repeats."
        )
    steps_per_second = (new_tokens - 1) / (whole - first)

    report("measuring the memory's bandwidth")
    devices = sorted(jax.tree.leaves(nnx.state(model))[0].sharding.device_set, key=lambda d: d.id)
    bandwidth = copy_bandwidth(devices[0]) * len(devices)
    step_bytes = decode_bytes(model, batch, prompt_tokens + new_tokens // 2)
    return Measurement(
        device=devices[0].device_kind,
        devices=len(devices),
        dtype=jnp.dtype(model.dtype).name,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        compile_seconds=round(compiling - first - whole, 2),
        prefill_tokens_per_second=round(batch * prompt_tokens / first, 1),
        decode_tokens_per_second=round(batch * steps_per_second, 1),
        decode_gb_per_step=round(step_bytes / 1e9, 4),
        bandwidth_gb_per_second=round(bandwidth / 1e9, 1),
        decode_percent_of_bandwidth=round(100 * steps_per_second * step_bytes / bandwidth, 1),
    )


def decode_bytes(model: Transformer, batch: int, length: int) -> float:
    """Bytes that one decode step reads on all devices: see `plan.weights_of_a_step`; and the cache.

    Args:
      model: The model.
      batch: Rows.
      length: Positions in the cache of each row.
    """
    config = model.config
    sizes = {
        path: math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
        for path, x in nnx.to_flat_state(nnx.state(model))
    }
    row = 2 * config.num_key_value_heads * config.head_dim * jnp.dtype(model.dtype).itemsize
    windows = (config.layer_window(i) for i in range(config.num_hidden_layers))
    cache = batch * row * sum(min(length, window or length) for window in windows)
    return weights_of_a_step(config, sizes, batch) + cache


def copy_bandwidth(device: jax.Device) -> float:
    """Bytes a second, read and written, when a large array is copied over and over."""
    stats = device.memory_stats() or {}
    free = stats.get("bytes_limit", 2**31) - stats.get("bytes_in_use", 0)
    count = min(2**30, max(2**26, free // 8)) // 4
    x = jax.device_put(jnp.zeros(count, jnp.uint32), device)

    copy = jax.jit(lambda x: x + jnp.uint32(1))
    copy(x).block_until_ready()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(_COPIES):
            out = copy(x)
        out.block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * x.nbytes * _COPIES / min(seconds)
