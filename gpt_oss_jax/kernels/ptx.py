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

# What memory is full of before a launch in which blocks wait for each other's results: as two bf16
# and as float32 a NaN that no arithmetic gives (0x7FFF, 0x7FFFFFFF).
EMPTY = -1

# Copies between memory and shared memory. A step reads more weights than L2 holds, most of them
# once: with the policy `ONCE` these make room for each other and leave the rest in place. Those
# that two blocks read at about the same time have it, too: with 32 rows that was faster.
COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
COPY_WEIGHTS = f"{COPY}.L2::cache_hint"
ONCE = ".reg .b64 once; createpolicy.fractional.L2::evict_first.b64 once, 1.0;"


def apart(pair: str, low: str, high: str) -> str:
    """Two bf16 of a register as float32, in registers of 32 bits."""
    return f"shl.b32 {low}, {pair}, 16; and.b32 {high}, {pair}, {0xFFFF0000};"


def literal(value: float) -> str:
    """A float32."""
    return f"0f{struct.pack('>f', value).hex()}"
