"""Keep compiled programs between runs, in a local directory of the user.

The command line calls `enable`; nothing else in the package does, so importing and loading leave
JAX's settings alone. It knows nothing about models.
"""

import hashlib
import platform
from pathlib import Path

import jax

from gpt_oss_jax.directories import user_cache


def default_directory() -> Path:
    """Where compiled programs go unless the user says otherwise: one directory per kind of host.

    XLA's key for a CPU program does not hold the processor's features, so a home directory shared
    by different machines would hand one of them another's instructions.
    """
    return user_cache() / "xla" / f"{platform.machine()}-{processor_digest()}"


def processor_digest() -> str:
    """Eight hex digits that differ between processors of different features."""
    features = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        features = next((x for x in lines if x.lower().startswith(("flags", "features"))), features)
    return hashlib.sha256(features.encode()).hexdigest()[:8]


def enable() -> Path:
    """Turn JAX's persistent compilation cache on and return its directory.

    A directory that the user set (`JAX_COMPILATION_CACHE_DIR`, or `jax.config`) stays, with the
    user's thresholds. Programs that compile fast are kept too: there are hundreds, and they add up.

    Raises:
      OSError: the default directory cannot be made.
    """
    if jax.__version_info__ < (0, 11):
        # There they put the name of the directory into that of every program, which nobody who has
        # another directory would find.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    if jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    directory = default_directory()
    directory.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return directory
