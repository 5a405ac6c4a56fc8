"""Orbax v1, imported without what its import does to the logging of the whole process.

It logs a line through absl, which gives the root logger a handler if it has none; a program's own
`logging.basicConfig` would then do nothing.
"""

import logging

_handlers = logging.root.handlers[:]
from orbax.checkpoint.experimental import v1 as ocp  # noqa: E402

logging.root.handlers[:] = _handlers

__all__ = ["ocp"]
