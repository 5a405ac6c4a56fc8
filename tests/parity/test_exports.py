"""What we write, Transformers and the reference load as it is, and mean the same by it."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from checkpoint_oracle import leaves, same_bits
from references import WINDOW_7, HuggingFace, Official

from gpt_oss_jax.checkpoint import convert, export, load, synthetic

TOKENS = (np.arange(24) * 37 % WINDOW_7.vocab_size).astype(np.int32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every format, by way of Orbax, from random weights in `original/`."""
    root = tmp_path_factory.mktemp("exports")
    synthetic.write(WINDOW_7, root / "source", "original")
    convert(root / "source", root / "orbax")
    for format in ("hf-mxfp4", "hf-bf16", "original"):
        export(root / "orbax", root / format, format)
    return root


@pytest.fixture(scope="module")
def logits(folders):
    return np.asarray(load(folders / "source", dtype=jnp.float32)(jnp.asarray(TOKENS)[None])[0])


def _load_bf16(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        pad_token_id=None,  # the released one is outside this vocabulary
    ).eval()


def test_transformers_loads_hf_mxfp4(folders, logits, check):
    check(logits, HuggingFace(folders / "hf-mxfp4")(TOKENS))


@torch.no_grad()
def test_transformers_loads_hf_bf16(folders, logits, check):
    model = _load_bf16(folders / "hf-bf16")
    assert model.dtype == torch.bfloat16
    check(logits, model.float()(torch.from_numpy(TOKENS)[None]).logits[0].numpy())


def test_the_reference_loads_original(folders, logits, check):
    check(logits, Official(folders / "original")(TOKENS))


def test_we_load_what_transformers_saves(folders, tmp_path):
    """Re-saved in bfloat16: transposed experts, several files, Transformers' own config."""
    model = _load_bf16(folders / "hf-bf16")
    model.generation_config.pad_token_id = None
    model.save_pretrained(tmp_path / "resaved", max_shard_size="300KB")
    assert len(list((tmp_path / "resaved").glob("*.safetensors"))) > 3
    resaved = load(tmp_path / "resaved", dtype=jnp.bfloat16)
    assert resaved.config == WINDOW_7
    same_bits(leaves(resaved), leaves(load(folders / "hf-bf16", dtype=jnp.bfloat16)))
