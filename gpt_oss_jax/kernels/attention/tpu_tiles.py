"""Sizes that attention on TPU works in, for each kind: by the compiler's own schedule.

Found by `benchmarks/tpu_attention.py`, which counts what the compiler makes of other sizes, too;
what it said is in benchmarks/results/2026-11-28-tpu-attention.md. No TPU was at hand.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Block:
    """Of many queries with many keys.

    Attributes:
      queries: Of one step at most, a multiple of 8.
      keys: Of one step at most, a multiple of 128.
      rows: Pairs of a head and a query that are worked on at a time, at most.
    """

    queries: int
    keys: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Of one kind of TPU.

    Attributes:
      full: Where every query sees all keys before it.
      window: Where it sees the last ones.
      groups: Of heads, 128 lanes of keys each, that one step takes where there is one query.
    """

    full: Block = Block(queries=128, keys=512, rows=1024)
    window: Block = Block(queries=128, keys=128, rows=256)
    groups: int = 4


_SMALL = Block(queries=128, keys=512, rows=256)
TILES = {
    "TPU v5 lite": Tiles(full=_SMALL),
    # Its two cores share out the steps, whose number so has to be even.
    "TPU v5": Tiles(full=_SMALL, groups=2),
}


def tiles(kind: str) -> Tiles:
    """Those of a device kind as JAX spells it; of one that nobody asked about, the usual ones."""
    return TILES.get(kind, Tiles())
