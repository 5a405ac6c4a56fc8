"""Orbax v1, imported when a checkpoint is written: nothing else has to wait for its half second."""

import functools
import logging


@functools.cache
def orbax_v1():
    """The module, imported without what its import does to the logging of the whole process.

    It logs a line through absl, which gives the root logger a handler if it has none; a program's
    own `logging.basicConfig` would then do nothing.
    """
    handlers = logging.root.handlers[:]
    from orbax.checkpoint.experimental import v1

    logging.root.handlers[:] = handlers
    return v1
