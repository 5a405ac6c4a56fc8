"""What is compared, in the order of computing, and how far apart two correct computations may be.

A tolerance is derived from three things: the unit roundoff of the compute type, the length of the
op's contraction, and what the op does to the errors of its inputs. docs/parity.md has the
derivation; nothing here was fitted to a measurement. Knows nothing of models or references.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping

import numpy as np

from gpt_oss_jax.config import Config

# How many standard deviations of accumulated rounding are allowed: by Hoeffding's inequality one
# value in 4e13 is further out, and a large comparison has 1e10.
DEVIATIONS = 8
_TINY = float(np.finfo(np.float32).tiny)
ACCUMULATOR = 2.0**-24  # unit roundoff of float32, in which every contraction is summed


@dataclasses.dataclass(frozen=True)
class Op:
    """One named value of the forward pass.

    Attributes:
      name: As in `capture=`, without the layer.
      inputs: Names that it is computed from.
      axes: Its dimensions after batch and time, in the letters of `model`; of the scores, which
        keep time last, those of a row.
    """

    name: str
    inputs: tuple[str, ...]
    axes: str


LAYER = (
    Op("attention_norm", ("input",), "D"),
    Op("attention.q", ("attention_norm",), "KGH"),
    Op("attention.k", ("attention_norm",), "KH"),
    Op("attention.v", ("attention_norm",), "KH"),
    Op("attention.q_rope", ("attention.q",), "KGH"),
    Op("attention.k_rope", ("attention.k",), "KH"),
    Op("attention.scores", ("attention.q_rope", "attention.k_rope"), "KGS"),
    Op("attention.heads", ("attention.q_rope", "attention.k_rope", "attention.v"), "KGH"),
    Op("attention.out", ("attention.heads",), "D"),
    Op("middle", ("input", "attention.out"), "D"),
    Op("mlp_norm", ("middle",), "D"),
    Op("mlp.router_logits", ("mlp_norm",), "E"),
    Op("mlp.experts", ("mlp.router_logits",), "X"),
    Op("mlp.expert_weights", ("mlp.router_logits",), "X"),
    Op("mlp.out", ("mlp_norm", "mlp.experts", "mlp.expert_weights"), "D"),
    Op("output", ("middle", "mlp.out"), "D"),
)
FIRST = (Op("embedding", (), "D"),)
LAST = (Op("final_norm", ("input",), "D"), Op("logits", ("final_norm",), "V"))
INPUT = Op("input", (), "D")


def stages(config: Config) -> list[tuple[str, tuple[Op, ...]]]:
    """Prefix and ops of the embedding, of each layer, and of the end."""
    layers = [(f"layers.{i}.", LAYER) for i in range(config.num_hidden_layers)]
    return [("", FIRST), *layers, ("", LAST)]


def sizes(op: Op, config: Config, length: int) -> tuple[int, ...]:
    """Sizes of an op's axes."""
    letters = {
        "D": config.hidden_size,
        "K": config.num_key_value_heads,
        "G": config.group_size,
        "H": config.head_dim,
        "E": config.num_experts,
        "X": config.experts_per_token,
        "V": config.vocab_size,
        "S": length,
    }
    return tuple(letters[x] for x in op.axes)


def roundoff(dtype) -> float:
    """Unit roundoff: half the distance from one to the next larger number."""
    return {"float32": 2.0**-24, "bfloat16": 2.0**-8}[np.dtype(dtype).name]


def tolerances(
    ops: Collection[Op],
    config: Config,
    dtype,
    ours: Mapping[str, np.ndarray],
    given: Collection[str] = (),
    before_T: np.ndarray | float = 0.0,
) -> dict[str, np.ndarray]:
    """Largest relative difference of each op that rounding explains, [T].

    Infinite where it is a whole row: there rounding may make any row another one, and the first
    order of its growth, which is what is derived, means nothing.

    Args:
      ops: Of one stage.
      config: Sizes.
      dtype: Of our activations.
      ours: Our values, [T, features], for the norms that some tolerances depend on.
      given: Names whose values both sides share: errors start anew behind them.
      before_T: What has gathered in the stage's input, unless that is given.
    """
    own = {op.name: _own(op, config, dtype, ours) for op in ops}
    inputs = {op.name: op.inputs for op in ops}

    def sources(name: str) -> set[str]:
        found = {name}
        for other in inputs.get(name, ()):
            if other not in given:
                found |= sources(other)
        return found

    own["input"] = before_T
    found = {op.name: sum(own[name] for name in sources(op.name)) for op in ops}
    return {name: np.where(x_T >= 1, np.inf, x_T) for name, x_T in found.items()}


def _own(op: Op, config: Config, dtype, ours: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the op itself adds, on equal inputs, relative to the size of its row."""
    positions_T = np.arange(len(next(iter(ours.values()))), dtype=np.float64)
    D, F, H, N = (
        config.hidden_size,
        config.intermediate_size,
        config.head_dim,
        config.num_attention_heads,
    )

    def noise(roundings, terms):
        return DEVIATIONS * (roundings * roundoff(dtype) + 2 * ACCUMULATOR * np.sqrt(terms))

    flat_T = np.zeros_like(positions_T)
    u = roundoff(dtype)
    if op.name.endswith("_rope"):
        # Four roundings, none of them summed, and an angle of p radians is off by its own rounding
        # and by those of the frequency. What is lost in a pair shows in its smaller element.
        x_TF = ours[op.name]
        largest_T = np.abs(x_TF).max(-1) / np.maximum(row_size(x_TF), _TINY)
        return 2**0.5 * largest_T * (4 * u + 3 * ACCUMULATOR * positions_T)
    if op.name in ("middle", "output"):
        # Both terms and their sum are rounded; where they cancel, the terms are the larger ones.
        sum_TD, branch_TD = ours[op.name], ours[op.inputs[1]]
        scale_TD = np.maximum(np.abs(sum_TD), row_size(sum_TD)[:, None])
        return u * (3 + 2 * (np.abs(branch_TD) / np.maximum(scale_TD, _TINY)).max(-1))
    if op.name == "attention.heads":
        # Before their rotation, so that a mistake in it does not excuse itself.
        q_TN, k_TN = (
            np.linalg.norm(ours[f"attention.{x}"].reshape(len(flat_T), -1, H), axis=-1)
            for x in "qk"
        )
        sharp = concentration(config) ** 2
        largest_T = sharp * q_TN.max(-1) * np.maximum.accumulate(k_TN.max(-1)) / H
        return noise(3, positions_T + 1) + noise(2, H) * largest_T
    if op.name == "mlp.expert_weights":
        logits_T = row_size(ours["mlp.router_logits"])
        return noise(2, config.experts_per_token) + 2 * noise(2, D) * logits_T
    if op.name == "mlp.out":
        # The slope of x sigmoid(1.702 x) is under 1.1, and the linear part at most limit + 1.
        slope = 1.1 * (config.swiglu_limit + 1)
        return flat_T + slope * noise(1, D) + noise(4, F + config.experts_per_token)
    roundings, terms = {
        "embedding": (1, 0),
        "attention.scores": (2, H),
        "attention.out": (2, N * H),
    }.get(op.name, (2, D))
    return flat_T + noise(roundings, terms)


def concentration(config: Config) -> float:
    """YaRN's factor on cos and sin, independent of the model's code (Peng et al. 2023, eq. 21)."""
    factor = config.rope_scaling_factor
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def row_size(x_TF: np.ndarray) -> np.ndarray:
    """Root of the mean square of each row, [T]; masked elements do not count."""
    finite = np.isfinite(x_TF)
    squares_T = np.square(np.where(finite, x_TF, 0), dtype=np.float32).sum(-1, dtype=np.float64)
    return np.sqrt(squares_T / np.maximum(1, finite.sum(-1))).astype(np.float32)
