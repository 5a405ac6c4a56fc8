"""The folders of the user in which this package keeps something."""

import os
from pathlib import Path


def user_cache() -> Path:
    """What can be made again: `$XDG_CACHE_HOME/gpt_oss_jax`, or `~/.cache/gpt_oss_jax`.

    Raises:
      OSError: There is no home directory.
    """
    return _folder("XDG_CACHE_HOME", ".cache")


def user_state() -> Path:
    """What was typed: `$XDG_STATE_HOME/gpt_oss_jax`, or `~/.local/state/gpt_oss_jax`.

    Raises:
      OSError: There is no home directory.
    """
    return _folder("XDG_STATE_HOME", ".local/state")


def _folder(variable: str, default: str) -> Path:
    try:
        root = os.environ.get(variable) or Path.home() / default
    except RuntimeError as error:
        raise OSError(f"this user has no home directory: set {variable}.") from error
    return Path(root) / "gpt_oss_jax"
