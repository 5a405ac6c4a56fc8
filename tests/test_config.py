"""Both spellings of config.json, and what is refused."""

import dataclasses
import json

import pytest

from gpt_oss_jax.config import GPT_OSS_20B, GPT_OSS_120B, Config

ORIGINAL_20B = {
    "num_hidden_layers": 24,
    "num_experts": 32,
    "experts_per_token": 4,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "swiglu_limit": 7.0,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1,
    "rope_ntk_beta": 32,
}


def test_original_config_of_20b():
    assert Config.from_dict(ORIGINAL_20B) == GPT_OSS_20B


def test_120b_differs_in_layers_and_experts_only():
    assert GPT_OSS_120B == dataclasses.replace(GPT_OSS_20B, num_hidden_layers=36, num_experts=128)


@pytest.mark.parametrize("name", ["to_hf_dict", "to_original_dict"])
def test_written_config_reads_back(tiny, name):
    written = json.loads(json.dumps(getattr(tiny, name)()))
    assert Config.from_dict(written) == tiny


def test_transformers_5_spelling():
    hf = GPT_OSS_20B.to_hf_dict()
    hf["rope_parameters"] = hf.pop("rope_scaling") | {"rope_theta": hf.pop("rope_theta")}
    assert Config.from_dict(hf) == GPT_OSS_20B


def test_num_experts_is_an_alias():
    hf = GPT_OSS_20B.to_hf_dict()
    hf["num_experts"] = hf.pop("num_local_experts")
    assert Config.from_dict(hf) == GPT_OSS_20B


def test_truncate_is_what_transformers_assumes_when_it_is_absent():
    hf = GPT_OSS_20B.to_hf_dict()
    del hf["rope_scaling"]["truncate"]
    assert Config.from_dict(hf).rope_truncate


def test_plain_rope_has_no_scaling():
    hf = GPT_OSS_20B.to_hf_dict() | {"rope_scaling": {"rope_type": "default"}}
    assert Config.from_dict(hf).rope_scaling_factor == 1


def test_without_scaling_it_is_that_of_the_released_models_as_in_transformers():
    hf = GPT_OSS_20B.to_hf_dict() | {"rope_scaling": None}
    assert Config.from_dict(hf) == GPT_OSS_20B
    del hf["rope_scaling"]
    assert Config.from_dict(hf) == GPT_OSS_20B


def test_even_layers_are_windowed():
    assert [GPT_OSS_20B.layer_window(i) for i in range(4)] == [128, None, 128, None]
    assert GPT_OSS_20B.max_context == 131072


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"layer_types": ["full_attention"] * 24}, "layer_types"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_size": 100}, "multiple of 32"),
        ({"hidden_size": None}, "lacks: hidden_size"),
        ({"head_dim": 63}, "head_dim must be even"),
        ({"num_attention_heads": 63}, "num_key_value_heads"),
        ({"num_experts_per_tok": 33}, "experts_per_token"),
        ({"rope_scaling": {"rope_type": "yarn", "attention_factor": 3.0}}, "attention_factor"),
        ({"hidden_act": "gelu"}, "hidden_act silu"),
        ({"num_hidden_layers": 12}, "layer_types"),
        ({"swiglu_limit": float("nan")}, "swiglu_limit must be a positive float"),
        ({"head_dim": True}, "head_dim must be a positive int"),
        ({"vocab_size": "many"}, "vocab_size must be a positive int"),
    ],
)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict(GPT_OSS_20B.to_hf_dict() | change)


def test_unknown_key_of_the_original_format_is_refused():
    with pytest.raises(ValueError, match="num_heads"):
        Config.from_dict(ORIGINAL_20B | {"num_heads": 64})


def test_what_the_original_format_cannot_hold_is_refused(tiny):
    with pytest.raises(ValueError, match="rms_norm_eps"):
        dataclasses.replace(tiny, rms_norm_eps=1e-6).to_original_dict()
