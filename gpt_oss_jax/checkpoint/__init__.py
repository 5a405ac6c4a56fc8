"""Checkpoints in and out: Hugging Face's safetensors, the reference's `original/`, Orbax."""

from gpt_oss_jax.checkpoint.hub import resolve as resolve
from gpt_oss_jax.checkpoint.loading import (
    load as load,
    open_source as open_source,
    outline as outline,
    preparations as preparations,
)
from gpt_oss_jax.checkpoint.saving import convert as convert, export as export, save as save
