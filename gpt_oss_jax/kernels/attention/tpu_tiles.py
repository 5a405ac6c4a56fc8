"""Sizes that attention on TPU works in, for each kind: by the compiler's own schedule.

Found by `benchmarks/tpu_attention.py`, which counts what the compiler makes of other sizes, too;
what it said is in benchmarks/results/2026-11-28-tpu-attention.md. No TPU was at hand.
"""

from __future__ import annotations

import dataclasses
import math

LANES = 128


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
      keys: Of one query, those of all groups of a step together.
    """

    full: Block = Block(queries=128, keys=512, rows=1024)
    window: Block = Block(queries=128, keys=128, rows=256)
    groups: int = 4
    keys: int = 2048


_SMALL = Block(queries=128, keys=512, rows=256)
TILES = {
    "TPU v5 lite": Tiles(full=_SMALL),
    # Its two cores share out the steps, whose number so has to be even.
    "TPU v5": Tiles(full=_SMALL, groups=2),
}


def of_step(kind: str, T: int, S: int, groups: int, window: int | None) -> tuple[Block, int]:
    """What one step takes: queries and keys, no more than there are, and groups of heads.

    Args:
      kind: Of the device, as JAX spells it; one that nobody asked about has the usual sizes.
      T: Queries of a row.
      S: Keys of a row.
      groups: Of heads that there are.
      window: Keys that a query sees; None: all before it.
    """
    sizes = TILES.get(kind, Tiles())
    block = sizes.full if window is None else sizes.window
    if T > 1:
        queries = min(block.queries, 8 * math.ceil(T / 8))
        return dataclasses.replace(block, queries=queries, keys=_keys(S, block.keys)), 1
    # A step costs more than what it computes, and one query leaves room for more. Little is known
    # of it but that it sees most keys, in a window, too.
    together = math.gcd(groups, sizes.groups)
    keys = _keys(S, sizes.keys // together)
    return Block(queries=1, keys=keys, rows=block.rows), together


def _keys(S: int, most: int) -> int:
    """Keys of a step: a part of the cache that needs no padding, if there is one."""
    most = min(most, LANES * math.ceil(S / LANES))
    whole = [keys for keys in range(LANES, most + 1, LANES) if S % keys == 0]
    return max(whole, default=most)
