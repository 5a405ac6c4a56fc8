"""The two PyTorch implementations of gpt-oss, made to speak with one voice.

`Official` is the model of OpenAI's `gpt-oss` package, `HuggingFace` the one of `transformers`. Both
load a checkpoint folder as they always do, take the tokens of one row and return numpy arrays
[T, ...] under the names that our `capture=` uses. Knows nothing of our model.
"""

import contextlib
from collections.abc import Callable, Iterator
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
# The released window; narrow, because the references hold all 4,097 x 4,097 scores of every head.
WINDOW_128 = Config(
    num_hidden_layers=3,
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

    def captured(self, tokens_T: np.ndarray) -> dict[str, np.ndarray]:
        seen = {}
        with _watching(seen) as watch:
            watch(self.model.embedding, "embedding")
            for i, block in enumerate(self.model.block):
                layer = f"layers.{i}."
                watch(block, layer + "input", lambda inputs, output: inputs[0])
                watch(block.attn.norm, layer + "attention_norm")
                watch(block.attn.qkv, layer + "attention.qkv")
                watch(block.attn.rope, layer + "attention.q_rope", lambda _, output: output[0])
                watch(block.attn.rope, layer + "attention.k_rope", lambda _, output: output[1])
                watch(block.attn.out, layer + "attention.out")
                watch(block.attn, layer + "middle")
                watch(block.mlp.norm, layer + "mlp_norm")
                watch(block.mlp.gate, layer + "mlp.router_logits")
                watch(block, layer + "output")
            watch(self.model.norm, "final_norm")
            watch(self.model.unembedding, "logits")
            self(tokens_T)
        attention = self.model.block[0].attn
        heads = np.cumsum([attention.num_attention_heads, attention.num_key_value_heads])
        for i in range(len(self.model.block)):
            split = np.split(seen.pop(f"layers.{i}.attention.qkv"), heads * attention.head_dim, 1)
            seen |= {f"layers.{i}.attention.{n}": x for n, x in zip("qkv", split, strict=True)}
        return seen


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

    def captured(self, tokens_T: np.ndarray) -> dict[str, np.ndarray]:
        seen = {}
        decoder = self.model.model
        row = lambda _, output: output[0]
        with _watching(seen) as watch:
            watch(decoder.embed_tokens, "embedding", row)
            for i, block in enumerate(decoder.layers):
                layer, attention = f"layers.{i}.", block.self_attn
                watch(block, layer + "input", lambda inputs, _: inputs[0][0])
                watch(block.input_layernorm, layer + "attention_norm", row)
                watch(attention.q_proj, layer + "attention.q", row)
                watch(attention.k_proj, layer + "attention.k", row)
                watch(attention.v_proj, layer + "attention.v", row)
                watch(attention, layer + "attention.weights", lambda _, output: output[1][0])
                watch(attention.o_proj, layer + "attention.out", row)
                after = block.post_attention_layernorm
                watch(after, layer + "middle", lambda inputs, _: inputs[0][0])
                watch(after, layer + "mlp_norm", row)
                watch(block.mlp.router, layer + "mlp.router_logits", row)
                watch(block.mlp.router, layer + "mlp.expert_weights", lambda _, output: output[1])
                watch(block.mlp.router, layer + "mlp.experts", lambda _, output: output[2])
                watch(block.mlp.experts, layer + "mlp.out")
                watch(block, layer + "output", row)
            watch(decoder.norm, "final_norm", row)
            watch(self.model.lm_head, "logits", row)
            self(tokens_T)
        return seen


@contextlib.contextmanager
def _watching(seen: dict[str, np.ndarray]) -> Iterator[Callable]:
    """Gives `watch(module, name, pick)`, which files what a module returns into `seen`."""
    hooks = []

    def watch(module, name, pick=lambda inputs, output: output):
        def hook(_, inputs, output):
            x = _numpy(pick(inputs, output))
            seen[name] = x.reshape(x.shape[0], -1)

        hooks.append(module.register_forward_hook(hook))

    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def _numpy(x: torch.Tensor) -> np.ndarray:
    return (x.float() if x.is_floating_point() else x).detach().numpy()
