"""The two PyTorch implementations of gpt-oss, made to speak with one voice.

`Official` is the model of OpenAI's `gpt-oss` package, `HuggingFace` the one of `transformers`. Both
load a checkpoint folder as they always do, take the tokens of one row and return logits [T, V] as
numpy arrays. Knows nothing of our model.
"""

from pathlib import Path

import gpt_oss.torch.model
import numpy as np
import torch
import transformers

from gpt_oss_jax.config import Config

# Every size differs from every other, so that no swapped axis can hide. The reference asserts that
# YaRN's ramp lies inside the head, which takes a head of at least 8.
WINDOW_7 = Config(
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
# The released window; narrow, because the references hold all 4,097 x 4,097 scores of every head,
# and one layer of either kind, because that many tokens take their time.
WINDOW_128 = Config(
    num_hidden_layers=2,
    num_experts=9,
    experts_per_token=3,
    vocab_size=211,
    hidden_size=64,
    intermediate_size=96,
    head_dim=10,
    num_attention_heads=8,
    num_key_value_heads=2,
    sliding_window=128,
)


class Official:
    """`gpt_oss.torch.model.Transformer`, from an `original/` folder."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        self.model = gpt_oss.torch.model.Transformer.from_checkpoint(str(folder), device="cpu")
        if dtype == torch.float32:
            self.model.float()

    @torch.no_grad()
    def __call__(self, tokens_T: np.ndarray) -> np.ndarray:
        return _numpy(self.model(torch.from_numpy(tokens_T)))


class HuggingFace:
    """`transformers.GptOssForCausalLM`, from a Hugging Face folder, experts dequantised."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=transformers.Mxfp4Config(dequantize=True),
            dtype=dtype,
            attn_implementation="eager",
            pad_token_id=None,  # the released one is outside these vocabularies
        ).eval()
        if dtype == torch.float32:
            self.model.float()  # the dequantised experts are bf16 whatever was asked for

    @torch.no_grad()
    def __call__(self, tokens_T: np.ndarray) -> np.ndarray:
        return _numpy(self.model(torch.from_numpy(tokens_T)[None]).logits[0])

    @torch.no_grad()
    def attention_weights(self, tokens_T: np.ndarray) -> list[np.ndarray]:
        """Of each layer after the softmax, without the sink, [N, T, S]."""
        found = self.model(torch.from_numpy(tokens_T)[None], output_attentions=True).attentions
        return [_numpy(x[0]) for x in found]


def _numpy(x: torch.Tensor) -> np.ndarray:
    return (x.float() if x.is_floating_point() else x).detach().numpy()
