"""Picks an implementation of an operation: the named one, or the first that can."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

from gpt_oss_jax.kernels.target import platform

_log = logging.getLogger("gpt_oss_jax")
_PLATFORMS = {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu"}


@functools.cache
def say_once(message: str) -> None:
    """Logs a warning, however often it is called with it."""
    _log.warning(message)


def dispatch(
    operation: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls one implementation of an operation.

    Args:
      operation: Name for messages.
      implementations: Callables by name, fastest first; one raises NotImplementedError for what it
        cannot do (device, dtype, shape).
      implementation: A key, to have that one or its error; None for the first that can, which is
        logged once, with the reasons, when it is not the fastest for this kind of device.
      *args: Passed on.
      **kwargs: Passed on.

    Raises:
      ValueError: If there is no implementation of that name.
      NotImplementedError: If the named implementation cannot do it.
    """
    if implementation is not None:
        if implementation not in implementations:
            raise ValueError(
                f"implementation of {operation} must be None or one of "
                f"{', '.join(implementations)}, got {implementation!r}."
            )
        return implementations[implementation](*args, **kwargs)
    reasons = []
    for name, function in implementations.items():
        if _PLATFORMS.get(name, platform()) != platform():
            continue
        try:
            result = function(*args, **kwargs)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
            continue
        if reasons:
            say_once(f"{operation} runs on {name} ({'; '.join(reasons)})")
        return result
    raise NotImplementedError(f"no implementation of {operation}: {'; '.join(reasons)}.")
