"""How PTX spells things."""

from __future__ import annotations

import struct


def literal(value: float) -> str:
    """A float32."""
    return f"0f{struct.pack('>f', value).hex()}"
