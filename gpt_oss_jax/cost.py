"""What a step of a model costs at least, in bytes and FLOPs: counted from sizes alone.

It knows no devices, no speeds and no time. `plan` counts with it what one device of a mesh has to
do, `bench` what it holds the measured times against.
"""

import math
from collections.abc import Mapping

from gpt_oss_jax.config import Config


def expected_experts(config: Config, rows: int) -> float:
    """Distinct experts of a layer that rows touch together, if they choose evenly and alone."""
    return config.num_experts * (1 - (1 - config.experts_per_token / config.num_experts) ** rows)


def visible_pairs(config: Config, start: int, stop: int) -> int:
    """Pairs of a query at the positions `start` to `stop` - 1 and a key that it sees, all layers.

    They are what attention computes for one of its heads; their keys are what it reads.
    """

    def up_to(end: int, window: int) -> int:
        inside = min(end, window)
        return inside * (inside + 1) // 2 + (end - inside) * window

    windows = (config.layer_window(i) or stop for i in range(config.num_hidden_layers))
    return sum(up_to(stop, window) - up_to(start, window) for window in windows)


def weight_bytes(config: Config, sizes: Mapping[tuple, int], experts: float) -> float:
    """Bytes of weights that a decode step reads: all but untouched experts and the embedding.

    Of the embedding one row each is read, which does not count, and of folded experts no scales.

    Args:
      config: Sizes of the model.
      sizes: Bytes of each variable, by its path.
      experts: Distinct ones of a layer that the step touches.
    """
    total = 0.0
    for path, size in sizes.items():
        is_kept_only = path[-1] == "scales" and (*path[:-1], "factors") in sizes
        if path[0] != "embedding" and not is_kept_only:
            total += size * experts / config.num_experts if _is_expert(path) else size
    return total


def weight_flops(config: Config, shapes: Mapping[tuple, tuple[int, ...]], logits: float) -> float:
    """FLOPs of one token's products with weights: two for each weight that it meets.

    Args:
      config: Sizes of the model.
      shapes: Of each variable, by its path; MXFP4 as in checkpoints.
      logits: Share of the tokens whose logits are computed.
    """
    meets = {"embedding": 0.0, "unembedding": logits}
    total = 0.0
    for path, shape in shapes.items():
        values = {"weight": 1, "blocks": 2}.get(path[-1], 0)  # In one element of the array.
        share = config.experts_per_token / config.num_experts if _is_expert(path) else 1.0
        total += 2 * values * math.prod(shape) * share * meets.get(path[0], 1.0)
    return total


def attention_flops(config: Config, pairs: float) -> float:
    """FLOPs of so many pairs of query and key, of all heads: the score, and its part of a value."""
    return 4 * config.num_attention_heads * config.head_dim * pairs


def _is_expert(path: tuple) -> bool:
    return bool({"up", "down"} & set(path))
