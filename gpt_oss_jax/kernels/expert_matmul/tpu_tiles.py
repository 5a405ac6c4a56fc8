"""Sizes that the expert kernels for TPU work in, for each kind: by the compiler's own schedule.

Found by `benchmarks/tpu_experts.py`, which counts what the compiler makes of other sizes, too; what
it said is in benchmarks/results/2026-11-23-tpu-tiles.md. No TPU was at hand.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Of one kind of TPU.

    Attributes:
      lanes: Outputs that are worked on at a time, in registers of 128.
      few: Outputs of one step for few rows, of both parts together; `lanes` divides half of it.
      many: Outputs of one step for many rows; `lanes` divides it.
      rows: Of a tile at most, where there are many.
    """

    lanes: int = 256
    few: int = 1536
    many: int = 512
    rows: int = 256


TILES = {
    "TPU v5 lite": Tiles(lanes=512, few=3072),
    # Its two cores share out the steps, whose number so has to be even.
    "TPU v5": Tiles(lanes=384, few=1536, many=768),
    "TPU v6 lite": Tiles(lanes=512, few=3072),
    "TPU7x": Tiles(lanes=512, few=3072),
}


def tiles(kind: str) -> Tiles:
    """Those of a device kind as JAX spells it; of one that nobody asked about, the usual ones."""
    return TILES.get(kind, Tiles())
