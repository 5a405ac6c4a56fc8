"""Which of Hopper's expert kernels, and which tile: a table, measured by `benchmarks/tune.py`.

Keys are the compute capability and multiprocessors of a device, then the shape of the experts, then
rows. What the table does not have, a rule decides; nothing is measured at run time.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from gpt_oss_jax.kernels.expert_matmul.rows_ptx import MAX_SORTED

TABLE = Path(__file__).with_name("tuning.json")
MAX_FEW_ROWS = 128
_MIN_TILE, _MAX_TILE = 8, 128
# From ten rows an expert on, decoding and multiplying take longer than reading.
_FEW_PAIRS = 10


def expert_tile(
    rows: int, experts: tuple[int, int, int], choices: int, multiprocessors: int
) -> int | None:
    """Rows of a tile for `many_rows`; None where `few_rows` is faster.

    Args:
      rows: Rows of the layer.
      experts: Their number, hidden size and width.
      choices: Experts of a row.
      multiprocessors: Of the device, of compute capability 9.0.
    """
    measured = _table().get(device_key(multiprocessors), {}).get(shape_key(experts, choices))
    if not measured:
        return default_tile(rows, experts[0], choices)
    # Its own entry or the next larger one: rows come in powers of two.
    larger = [n for n in measured if n >= rows]
    return measured[min(larger) if larger else max(measured)]


def default_tile(rows: int, experts: int, choices: int) -> int | None:
    """`expert_tile` of a device and shape that nobody measured."""
    pairs = rows * choices
    few = rows <= MAX_FEW_ROWS and pairs <= min(_FEW_PAIRS * experts, MAX_SORTED)
    return None if few else tile_rows(pairs, experts)


def tile_rows(pairs: int, experts: int) -> int:
    """As a power of two, what an expert gets on average and half as much again.

    Most experts then have one tile, and their weights are decoded once.
    """
    most = -(-3 * pairs // (2 * experts))
    return min(_MAX_TILE, max(_MIN_TILE, 1 << (most - 1).bit_length()))


def device_key(multiprocessors: int) -> str:
    """As in the table."""
    return f"9.0, {multiprocessors} multiprocessors"


def shape_key(experts: tuple[int, int, int], choices: int) -> str:
    """As in the table."""
    return f"{' x '.join(map(str, experts))}, {choices} of them"


@functools.cache
def _table() -> dict[str, dict[str, dict[int, int | None]]]:
    found = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    return {
        device: {
            shape: {int(rows): tile for rows, tile in measured.items()}
            for shape, measured in shapes.items()
        }
        for device, shapes in found.items()
    }
