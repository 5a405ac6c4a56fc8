"""Where this package keeps what it can make again, in a folder of the user."""

import os
from pathlib import Path


def user_cache() -> Path:
    """`$XDG_CACHE_HOME/gpt_oss_jax`, `~/.cache/gpt_oss_jax` if that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt_oss_jax"
