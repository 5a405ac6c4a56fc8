"""How PTX spells things.

A kernel may start while the one before it still runs (programmatic dependent launch): until it has
waited it may read weights, and nothing that a kernel of the same program writes.
"""

from __future__ import annotations

import struct

# Every program of `launch` says `NEXT` and `WAIT` once. What it reads or writes comes after `WAIT`,
# but for a matrix that may be read early.
NEXT = "griddepcontrol.launch_dependents;"  # The kernel after this one may start.
WAIT = "griddepcontrol.wait;"  # Until those before it have ended.


def literal(value: float) -> str:
    """A float32."""
    return f"0f{struct.pack('>f', value).hex()}"
