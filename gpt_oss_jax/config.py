"""The sizes of a gpt-oss model, and the two ways its checkpoints spell them.

Knows nothing of meshes, kernels, caches or sampling: those are arguments where they are used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

_HF_NAMES = {
    "num_hidden_layers": "num_hidden_layers",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "head_dim": "head_dim",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "sliding_window": "sliding_window",
    "swiglu_limit": "swiglu_limit",
    "rms_norm_eps": "rms_norm_eps",
}
_YARN_NAMES = {
    "rope_scaling_factor": "factor",
    "rope_ntk_alpha": "beta_slow",
    "rope_ntk_beta": "beta_fast",
    "rope_truncate": "truncate",
}
_RELEASED_ROPE = {"rope_type": "yarn", "truncate": False}
_TOKEN_IDS = {"eos_token_id": 200002, "pad_token_id": 199999}
_ONLY = {"tie_word_embeddings": False, "attention_bias": True, "hidden_act": "silu"}
_NOT_IN_YARN = ("attention_factor", "mscale", "mscale_all_dim")
_NOT_IN_ORIGINAL = ("rms_norm_eps", "rope_truncate")


@dataclasses.dataclass(frozen=True)
class Config:
    """Architecture of one gpt-oss model.

    Field names are those of the released `original/config.json`.

    Attributes:
      num_hidden_layers: Transformer blocks; even ones attend through the sliding window.
      num_experts: Experts per block (E).
      experts_per_token: Experts each token is routed to (X).
      vocab_size: Rows of the embedding and of the unembedding (V).
      hidden_size: Width of the residual stream (D), a multiple of 32.
      intermediate_size: Width of one expert (F), a multiple of 32.
      head_dim: Size of one attention head (H), even.
      num_attention_heads: Query heads (N), a multiple of `num_key_value_heads`.
      num_key_value_heads: Key and value heads (K).
      sliding_window: Keys a query sees in a windowed block, itself included.
      initial_context_length: Context before YaRN scaling, in tokens.
      rope_theta: Base of the rotary frequencies.
      rope_scaling_factor: YaRN context extension; 1 switches YaRN off.
      rope_ntk_alpha: Rotations over the initial context below which a frequency is interpolated
        fully (Hugging Face: `beta_slow`).
      rope_ntk_beta: Rotations above which a frequency is left alone (Hugging Face: `beta_fast`).
      rope_truncate: Round the bounds of the YaRN ramp to integers; the released models do not.
      swiglu_limit: Clamp of the expert activations.
      rms_norm_eps: Added to the mean square before its root.
    """

    num_hidden_layers: int
    num_experts: int
    experts_per_token: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    head_dim: int
    num_attention_heads: int
    num_key_value_heads: int
    sliding_window: int
    initial_context_length: int = 4096
    rope_theta: float = 150000.0
    rope_scaling_factor: float = 32.0
    rope_ntk_alpha: float = 1.0
    rope_ntk_beta: float = 32.0
    rope_truncate: bool = False
    swiglu_limit: float = 7.0
    rms_norm_eps: float = 1e-5

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = {"int": int, "float": (int, float), "bool": bool}[field.type]
            good = isinstance(value, kind) and isinstance(value, bool) == (field.type == "bool")
            if not good or (field.type != "bool" and not 0 < value < math.inf):
                raise ValueError(f"{field.name} must be a positive {field.type}, got {value!r}.")
            if field.type == "float":
                object.__setattr__(self, field.name, float(value))
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % 32:
                raise ValueError(
                    f"{name} must be a multiple of 32, the MXFP4 block, got {getattr(self, name)}."
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads, got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even to be rotated, got {self.head_dim}.")
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token must be at most num_experts, got {self.experts_per_token} "
                f"of {self.num_experts}."
            )

    @property
    def group_size(self) -> int:
        """Query heads per key/value head (G)."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def max_context(self) -> int:
        """Longest context the rotary scaling was made for, in tokens."""
        return int(self.initial_context_length * self.rope_scaling_factor)

    def layer_window(self, layer: int) -> int | None:
        """Window of a block's attention in tokens, None where it sees the whole context."""
        return self.sliding_window if layer % 2 == 0 else None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Reads a parsed `config.json`, Hugging Face's (4 or 5) or the `original/` one.

        Raises:
          ValueError: If a size is missing, or the file describes another architecture.
        """
        if "model_type" in values or "num_local_experts" in values:
            values = _from_hf(values)
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"config.json has keys that gpt-oss does not: {', '.join(unknown)}.")
        required = {
            field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING
        }
        if missing := sorted(required - set(values)):
            raise ValueError(f"config.json of a gpt-oss model lacks: {', '.join(missing)}.")
        return cls(**values)

    def to_original_dict(self) -> dict[str, Any]:
        """The `original/config.json` of this model.

        Raises:
          ValueError: If a value differs from the released models' that this format cannot hold.
        """
        values = dataclasses.asdict(self)
        for name in _NOT_IN_ORIGINAL:
            default = type(self).__dataclass_fields__[name].default
            if values.pop(name) != default:
                raise ValueError(
                    f"the original format cannot hold {name}={getattr(self, name)!r}, only "
                    f"{default!r}; export to a Hugging Face format instead."
                )
        return values

    def to_hf_dict(self) -> dict[str, Any]:
        """The Hugging Face `config.json` of this model, without `quantization_config`."""
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            **{theirs: getattr(self, ours) for ours, theirs in _HF_NAMES.items()},
            "experts_per_token": self.experts_per_token,
            "initial_context_length": self.initial_context_length,
            "max_position_embeddings": self.max_context,
            "rope_theta": self.rope_theta,
            "rope_scaling": {
                "rope_type": "yarn",
                "original_max_position_embeddings": self.initial_context_length,
                **{theirs: getattr(self, ours) for ours, theirs in _YARN_NAMES.items()},
            },
            "layer_types": _layer_types(self.num_hidden_layers),
            "attention_bias": True,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "use_cache": True,
            # Transformers refuses ids that the embedding has no row for.
            **{name: i for name, i in _TOKEN_IDS.items() if i < self.vocab_size},
        }


def _layer_types(num_layers: int) -> list[str]:
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(num_layers)]


def _from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Field values from a Hugging Face config; refuses what the forward pass does not do."""
    if (found := hf.get("model_type", "gpt_oss")) != "gpt_oss":
        raise ValueError(f'config.json must have model_type "gpt_oss", got {found!r}.')
    for name, wanted in _ONLY.items():
        if hf.get(name, wanted) != wanted:
            raise ValueError(f"config.json must have {name} {wanted}, got {hf[name]!r}.")
    hf = dict(hf)
    hf.setdefault("num_local_experts", hf.get("num_experts"))
    hf.setdefault("num_experts_per_tok", hf.get("experts_per_token"))
    values = {ours: hf[theirs] for ours, theirs in _HF_NAMES.items() if hf.get(theirs) is not None}

    # Transformers 5 saves `rope_parameters`, which includes the base; 4 saved them apart.
    # Where neither is given it takes the released models' scaling.
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or _RELEASED_ROPE
    if (theta := rope.get("rope_theta", hf.get("rope_theta"))) is not None:
        values["rope_theta"] = theta
    kind = rope.get("rope_type", rope.get("type"))
    if kind == "default":
        values["rope_scaling_factor"] = 1.0
    elif kind != "yarn":
        raise ValueError(f'config.json must have rope_type "yarn" or "default", got {kind!r}.')
    if odd := [name for name in _NOT_IN_YARN if rope.get(name) is not None]:
        raise ValueError(f"config.json must not have {', '.join(odd)} in its rope scaling.")
    values |= {ours: rope[theirs] for ours, theirs in _YARN_NAMES.items() if theirs in rope}
    if kind == "yarn":
        # Transformers rounds the ramp's bounds unless the file says not to.
        values.setdefault("rope_truncate", True)
    initial = rope.get("original_max_position_embeddings", hf.get("initial_context_length"))
    if initial is not None:
        values["initial_context_length"] = initial

    types = hf.get("layer_types")
    if types is not None and list(types) != _layer_types(values.get("num_hidden_layers", 0)):
        raise ValueError(
            "config.json must alternate sliding_attention and full_attention in layer_types, "
            f"starting with sliding_attention, got {types}."
        )
    return values


GPT_OSS_20B = Config(
    num_hidden_layers=24,
    num_experts=32,
    experts_per_token=4,
    vocab_size=201088,
    hidden_size=2880,
    intermediate_size=2880,
    head_dim=64,
    num_attention_heads=64,
    num_key_value_heads=8,
    sliding_window=128,
)
GPT_OSS_120B = dataclasses.replace(GPT_OSS_20B, num_hidden_layers=36, num_experts=128)
