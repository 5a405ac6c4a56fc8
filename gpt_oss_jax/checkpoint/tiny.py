"""The small trained model of the package, unpacked to a Hugging Face-layout folder.

The package stores the embedding and unembedding rows of the tokens that the model was trained on
and one row for all others. Here they become the full matrices, in the user's cache, once: from
there on the model is a checkpoint folder like any other. `examples/train_tiny.py` made the weights.
Knows nothing of loading.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  makes bfloat16 known to safetensors' numpy functions
import numpy as np
import safetensors.numpy

from gpt_oss_jax.directories import user_cache

_PACKED = Path(__file__).parents[1] / "data" / "tiny"
_MODEL = "model.safetensors"
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def unpack() -> Path:
    """The folder of the small model; written on the first call, whole or not at all.

    It lies in `$XDG_CACHE_HOME/gpt_oss_jax` (`~/.cache/gpt_oss_jax`) under a name that holds the
    SHA-256 of the packaged files, so a new version of the package makes a new folder. 157 MB.

    Raises:
      ValueError: If the folder cannot be written.
    """
    root = user_cache()
    folder = root / f"tiny-{_digest()}"
    if folder.is_dir():
        return folder
    unfinished = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".tiny-", dir=root))
        _write(unfinished)
        unfinished.chmod(0o755)
        os.rename(unfinished, folder)
    except OSError as error:
        # Another process may have been faster; its folder is as good.
        if not folder.is_dir():
            raise ValueError(
                f"the small model must be unpacked to {folder}, 157 MB, but that failed: {error}. "
                "Set XDG_CACHE_HOME to a folder that can be written."
            ) from error
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _expand(packed: Mapping[str, np.ndarray], vocab_size: int) -> dict[str, np.ndarray]:
    """The whole model's tensors, of the packaged ones.

    `rows` holds the token ids, int32 [R], of the first R rows of both tables; one more row follows,
    which all other tokens share.
    """
    tensors = dict(packed)
    rows = tensors.pop("rows")
    for name in _TABLES:
        table = np.repeat(packed[name][-1:], vocab_size, axis=0)
        table[rows] = packed[name][:-1]
        tensors[name] = table
    return tensors


def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(_PACKED.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _write(folder: Path) -> None:
    for path in _PACKED.iterdir():
        if path.name != _MODEL:
            shutil.copyfile(path, folder / path.name)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tensors = _expand(safetensors.numpy.load_file(_PACKED / _MODEL), vocab_size)
    safetensors.numpy.save_file(tensors, folder / _MODEL, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(x.nbytes for x in tensors.values())},
        "weight_map": dict.fromkeys(sorted(tensors), _MODEL),
    }
    (folder / f"{_MODEL}.index.json").write_text(json.dumps(index, indent=2) + "\n")
