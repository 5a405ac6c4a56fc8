"""From what a user names to a folder: local paths, the hub's cache, aliases, repositories.

The Hugging Face hub is reached only for a repository that is named, through `huggingface_hub`
(`pip install "gpt-oss-jax[hub]"`), which honours HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from gpt_oss_jax.checkpoint import tiny

ALIASES = {
    "20b": "openai/gpt-oss-20b",
    "120b": "openai/gpt-oss-120b",
    "gpt-oss:20b": "openai/gpt-oss-20b",
    "gpt-oss:120b": "openai/gpt-oss-120b",
}
# A repository holds the weights three times: in its root, in original/ and in metal/.
_OTHER_VARIANTS = ["original/*", "metal/*"]
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(path_or_id: str | os.PathLike, *, download: bool = True) -> str:
    """The folder or URL that is meant, downloaded if it is a repository of the hub.

    Args:
      path_or_id: What `load` takes.
      download: False takes a repository only from the hub's cache on this machine.

    Raises:
      ValueError: If it is nothing of the kind, or the download fails.
    """
    if not isinstance(path_or_id, str | os.PathLike):
        raise ValueError(f"a checkpoint's path or name is wanted, got {path_or_id!r}.")
    name = os.path.expanduser(path_or_id)
    if name == "tiny":
        return str(tiny.unpack())
    if name.startswith("synthetic:"):
        raise ValueError(f"{name} is made on the device and has no files; name a checkpoint.")
    if "://" in name:
        return name
    if os.path.isdir(name):
        return str(_variant(_snapshot(Path(name))))
    repository = ALIASES.get(name, name)
    # A slip in a path must not reach the network: then its first folder is there.
    slip = repository not in ALIASES.values() and os.path.exists(repository.split("/")[0])
    if _REPOSITORY.fullmatch(repository) and not slip:
        return _download(repository, download)
    raise ValueError(
        "a checkpoint folder, a repository such as openai/gpt-oss-20b, or one of "
        f"{', '.join(ALIASES)}, tiny is wanted; {name!r} is "
        + ("a file." if os.path.isfile(name) else "not there.")
    )


def _snapshot(path: Path) -> Path:
    """The current snapshot, of a repository's folder in the hub's cache."""
    revision = path / "refs" / "main"
    if not (path / "snapshots").is_dir() or not revision.is_file():
        return path
    return path / "snapshots" / revision.read_text().strip()


def _variant(path: Path) -> Path:
    """The folder itself if it holds a model; its original/ where only that was downloaded."""
    whole = any(path.glob("*.safetensors")) or (path / "orbax.checkpoint").exists()
    return path if whole or not (path / "original").is_dir() else path / "original"


def _download(repository: str, download: bool) -> str:
    by_hand = f"hf download {repository} --exclude 'original/*' --exclude 'metal/*' --local-dir DIR"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import tqdm
    except ImportError as error:
        raise ValueError(
            f"{repository} is no local folder, and to download it huggingface_hub is needed: "
            f'pip install "gpt-oss-jax[hub]". Or download it with\n  {by_hand}\nand name DIR.'
        ) from error

    class Bar(tqdm):
        """The hub's own bar, for terminals only."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": not sys.stderr.isatty()})

    try:
        folder = snapshot_download(
            repository,
            ignore_patterns=_OTHER_VARIANTS,
            tqdm_class=Bar,
            local_files_only=not download,
        )
    except Exception as error:  # Whatever its HTTP library raises today.
        if not download:
            raise ValueError(
                f"{repository} is not on this machine yet; download it with\n  {by_hand}"
            ) from error
        raise ValueError(
            f"{repository} is no local folder, and it could not be downloaded: {error}\n"
            f"Try again, it goes on where it was; or download it with\n  {by_hand}\nand name DIR."
        ) from error
    return str(_variant(Path(folder)))
