"""How fast a model reads prompts and writes tokens, and how near that is to what its devices allow.

Decoding reads every weight that a token needs, so it cannot be faster than memory over bytes;
prompts cannot be read faster than the matrix units multiply. Both limits are measured in the same
run, by copying a large array and multiplying large matrices; what is counted against them is in
`cost`. The weights need not be real, and the text is not. Run it as `gpt-oss-jax bench MODEL`.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt_oss_jax import cost, limits
from gpt_oss_jax.config import Config
from gpt_oss_jax.generate import device, loop
from gpt_oss_jax.model import Transformer
from gpt_oss_jax.model.cache import MIN_SLOTS, bucket
from gpt_oss_jax.plan import variables
from gpt_oss_jax.sampling import SamplingParams
from gpt_oss_jax.sharding import spelled

_COUNTED = 2**14  # Tokens of all rows, of a call that counts experts.


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Speed of one model at one shape; the names carry the units. Speeds are medians of the runs.

    Attributes:
      device: Kind of the devices.
      devices: How many of them hold the model.
      mesh: Its sizes as `--mesh` takes them, "none" for one device.
      jax: Its version.
      dtype: Of activations and cache.
      batch: Rows generated at once.
      prompt_tokens: Tokens of each prompt.
      new_tokens: Tokens generated in each row.
      repeats: Timed runs.
      gb_per_second_limit: See `limits.Limits`.
      tflop_per_second_limit: See `limits.Limits`.
      compile_seconds: What the first run took more than the others.
      first_token_ms: From the prompts to the first new token of every row.
      first_token_ms_range: Of the fastest and the slowest run.
      prefill_tokens_per_second: Prompt tokens of all rows, over the time to the first new token.
      prefill_gflop_per_token: That a prompt token costs, attention included.
      prefill_percent_of_limit: Of the speed at which products would be the only limit.
      decode_tokens_per_second: New tokens of all rows after the first.
      decode_tokens_per_second_range: Of the slowest and the fastest run.
      decode_ms_per_step: Between two tokens of a row.
      decode_experts: Distinct ones that a step's rows went through, counted, mean of all layers and
        steps after the first.
      decode_experts_if_uniform: What independent and even choices would give.
      decode_gb_per_step: That a step has to read, of weights and cache.
      decode_gflop_per_step: Of all rows, attention included.
      decode_limit: "memory" or "products", whichever takes longer.
      decode_tokens_per_second_limit: If that alone took time.
      decode_percent_of_limit: Of that speed.
    """

    device: str
    devices: int
    mesh: str
    jax: str
    dtype: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    gb_per_second_limit: float
    tflop_per_second_limit: float
    compile_seconds: float
    first_token_ms: float
    first_token_ms_range: tuple[float, float]
    prefill_tokens_per_second: float
    prefill_gflop_per_token: float
    prefill_percent_of_limit: float
    decode_tokens_per_second: float
    decode_tokens_per_second_range: tuple[float, float]
    decode_ms_per_step: float
    decode_experts: float
    decode_experts_if_uniform: float
    decode_gb_per_step: float
    decode_gflop_per_step: float
    decode_limit: str
    decode_tokens_per_second_limit: float
    decode_percent_of_limit: float


def measure(
    model: Transformer,
    shapes: Sequence[tuple[int, int]] = ((1, 512),),
    *,
    new_tokens: int = 128,
    repeats: int = 5,
    report: Callable[[str], None] = lambda line: None,
) -> Iterator[Measurement]:
    """Times greedy generation from random prompts, one shape after the other.

    Args:
      model: The model; random weights do.
      shapes: Rows at once and tokens of each prompt.
      new_tokens: Tokens to generate in each row, at least 2.
      repeats: Timed runs of a shape, after one that compiles.
      report: Called with a line whenever a stage begins.

    Returns:
      An iterator over the measurements, each as soon as it is done.

    Raises:
      ValueError: A number is too small, or the tokens do not fit the model's context. The call
        raises, not the iterator.
    """
    for batch, prompt_tokens in shapes:
        if min(batch, prompt_tokens, repeats) < 1 or new_tokens < 2:
            raise ValueError(
                "wanted batch, prompt tokens and repeats of at least 1 and at least 2 new tokens, "
                f"got {batch=}, {prompt_tokens=}, {repeats=}, {new_tokens=}."
            )
        if prompt_tokens + new_tokens > model.config.max_context:
            raise ValueError(
                f"the model's context is {model.config.max_context:,} tokens, got {prompt_tokens=} "
                f"and {new_tokens=}."
            )

    def measurements():
        report("measuring the limits: copies and products")
        devices = _devices(model)
        own = next(x for x in devices if x.process_index == jax.process_index())
        reached = limits.measure(own, model.dtype, len(devices))
        for shape in shapes:
            yield _measured(model, reached, *shape, new_tokens, repeats, report)

    return measurements()


def _measured(model, reached, batch, prompt_tokens, new_tokens, repeats, report) -> Measurement:
    vocabulary = min(model.config.vocab_size, 199_998)
    shape = (batch, prompt_tokens)
    prompts = np.random.default_rng(0).integers(vocabulary, size=shape, dtype=np.int32)

    report(f"compiling for {batch} x ({prompt_tokens:,} + {new_tokens:,}) tokens")
    compiling = sum(_timed(model, prompts, new_tokens)[:2])
    report(f"timing {repeats} runs of {batch} x ({prompt_tokens:,} + {new_tokens:,}) tokens")
    runs = [_timed(model, prompts, new_tokens) for _ in range(repeats)]
    firsts, rests, (tokens, *_) = zip(*runs, strict=True)
    first = statistics.median(firsts)
    step = statistics.median(rests) / (new_tokens - 1)

    report("counting the experts")
    # The last token is drawn, and goes nowhere.
    sequences = np.concatenate([prompts, tokens[:, :-1]], axis=1)
    experts = distinct_experts(model, sequences, prompt_tokens).mean()
    step_bytes, step_flops = decode_cost(model, batch, prompt_tokens, new_tokens, experts)
    prompt_flops = prefill_flops(model.config, prompt_tokens)
    memory = step_bytes / reached.gb_per_second / 1e9
    products = step_flops / reached.tflop_per_second / 1e12
    devices = _devices(model)
    values = Measurement(
        device=devices[0].device_kind,
        devices=len(devices),
        mesh="none" if model.mesh is None else spelled(model.mesh.shape),
        jax=jax.__version__,
        dtype=jnp.dtype(model.dtype).name,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        gb_per_second_limit=reached.gb_per_second,
        tflop_per_second_limit=reached.tflop_per_second,
        compile_seconds=max(0.0, compiling - first - step * (new_tokens - 1)),
        first_token_ms=1e3 * first,
        first_token_ms_range=(1e3 * min(firsts), 1e3 * max(firsts)),
        prefill_tokens_per_second=batch * prompt_tokens / first,
        prefill_gflop_per_token=prompt_flops / prompt_tokens / 1e9,
        prefill_percent_of_limit=batch * prompt_flops / reached.tflop_per_second / first / 1e10,
        decode_tokens_per_second=batch / step,
        decode_tokens_per_second_range=tuple(
            batch * (new_tokens - 1) / rest for rest in (max(rests), min(rests))
        ),
        decode_ms_per_step=1e3 * step,
        decode_experts=experts,
        decode_experts_if_uniform=cost.expected_experts(model.config, batch),
        decode_gb_per_step=step_bytes / 1e9,
        decode_gflop_per_step=step_flops / 1e9,
        decode_limit="memory" if memory >= products else "products",
        decode_tokens_per_second_limit=batch / max(memory, products),
        decode_percent_of_limit=100 * max(memory, products) / step,
    )
    return dataclasses.replace(
        values, **{name: _rounded(value) for name, value in dataclasses.asdict(values).items()}
    )


def _timed(model, prompts, new_tokens) -> tuple[float, float, np.ndarray]:
    """Seconds to the first tokens, and from there to the last; the tokens [rows, new_tokens].

    It is the loop of `generate` and `generate_batch`. Both times come from one run: the difference
    of two would hold the noise of two prompts, which take longer than what is to be measured.
    """
    rows, length = prompts.shape
    lasts, greedy = [length + new_tokens - 1] * rows, SamplingParams(temperature=0.0)
    times, tokens = [time.perf_counter()], []
    for block_RC, _ in loop.run(model, list(prompts), lasts, 1, greedy, frozenset()):
        times.append(time.perf_counter())
        tokens.append(block_RC[:, block_RC[0] >= 0])
    tokens = np.concatenate(tokens, axis=1)
    return times[1] - times[0], times[-1] - times[1], tokens


def distinct_experts(model: Transformer, tokens_RS: np.ndarray, start: int) -> np.ndarray:
    """Counts the experts of a layer that a decode step touches, all its rows together.

    The tokens go through the model once more, many a call, and what its routers chose is captured.

    Args:
      model: The model.
      tokens_RS: Prompts and what followed them, int32 [rows, positions].
      start: Position of the first step; each takes the tokens of one position.

    Returns:
      int64 [layers, steps].
    """
    rows, length = tokens_RS.shape
    size = bucket(rows)
    call = min(1024, bucket(length), max(1, _COUNTED // size))
    skeleton, leaves = device.split(model)
    cache = device.empty_cache(leaves[0], skeleton, size, bucket(length, MIN_SLOTS))
    shape = (size, -(-length // call) * call)
    tokens, positions = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
    tokens[:rows, :length], positions[:rows, :length] = tokens_RS, np.arange(length)
    counts = []
    for at in range(0, length, call):
        part = np.s_[:, at : at + call]
        cache, counts_LT = _routed(leaves, cache, tokens[part], positions[part], skeleton)
        counts.append(counts_LT)
    return np.concatenate(counts, axis=1)[:, start:length]


@functools.partial(jax.jit, static_argnums=4, donate_argnums=1)
def _routed(leaves, cache, tokens_BT, positions_BT, skeleton):
    """The cache after a call, and how many experts each layer and position went through."""
    model = skeleton.model(leaves)
    _, cache, seen = model.forward(
        tokens_BT, positions_BT, cache, capture=("layers.*.mlp.experts",)
    )
    L, E = model.config.num_hidden_layers, model.config.num_experts
    experts_LBTX = jnp.stack([seen[f"layers.{i}.mlp.experts"] for i in range(L)])
    # Padding goes to an expert that there is not.
    experts_LBTX = jnp.where(positions_BT[None, ..., None] >= 0, experts_LBTX, E)
    touched_LTE = jax.nn.one_hot(experts_LBTX, E, dtype=jnp.bool_).any(axis=(1, 3))
    return skeleton.placed(cache), skeleton.whole(touched_LTE.sum(axis=-1))


def decode_cost(
    model: Transformer, batch: int, prompt_tokens: int, new_tokens: int, experts: float
) -> tuple[float, float]:
    """Bytes that a step reads on all devices, of weights and cache, and FLOPs of all rows.

    They are the mean of the steps after the first. A copy of a weight does not count: on a mesh
    that splits the batch, where all weights are copies, the limit is too high.

    Args:
      model: The model.
      batch: Rows.
      prompt_tokens: Of each prompt.
      new_tokens: Of each row.
      experts: Distinct ones of a layer that a step touches.
    """
    config, itemsize = model.config, jnp.dtype(model.dtype).itemsize
    sizes = {
        path: math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
        for path, x in nnx.to_flat_state(nnx.state(model))
    }
    end = prompt_tokens + new_tokens - 1
    pairs = batch * cost.visible_pairs(config, prompt_tokens, end) / (new_tokens - 1)
    cache = pairs * 2 * config.num_key_value_heads * config.head_dim * itemsize
    flops = batch * cost.weight_flops(config, _shapes(config), logits=1)
    return (
        cost.weight_bytes(config, sizes, experts) + cache,
        flops + cost.attention_flops(config, pairs),
    )


def prefill_flops(config: Config, tokens: int) -> float:
    """FLOPs from a prompt to its first new token: only the last position has logits."""
    weights = tokens * cost.weight_flops(config, _shapes(config), logits=1 / tokens)
    return weights + cost.attention_flops(config, cost.visible_pairs(config, 0, tokens))


def _shapes(config: Config) -> dict[tuple, tuple[int, ...]]:
    # Not those of the model, whose experts may lie in words.
    return {path: x.shape for path, x in variables(config, jnp.float32, "mxfp4").items()}


def _devices(model: Transformer) -> list[jax.Device]:
    first, *_ = jax.tree.leaves(nnx.state(model))
    return sorted(first.sharding.device_set, key=lambda device: device.id)


def _rounded(value):
    """Four digits, which is more than a run repeats."""
    if isinstance(value, tuple):
        return tuple(map(_rounded, value))
    return value if isinstance(value, int | str) else float(f"{value:.4g}")
