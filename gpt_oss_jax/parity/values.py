"""What is known of a reference's values: whole arrays, or the samples that a golden file keeps."""

from __future__ import annotations

import dataclasses

import numpy as np

from gpt_oss_jax.parity.ops import row_size


@dataclasses.dataclass(frozen=True)
class Values:
    """One op of a reference.

    Attributes:
      size_T: Root mean square of each row.
      values: Those that are known, [rows, columns].
      rows: Positions of them; None for all.
      columns: Their places in a row; None for all.
    """

    size_T: np.ndarray
    values: np.ndarray
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None

    @classmethod
    def whole(cls, values_TF: np.ndarray) -> Values:
        """All values."""
        return cls(row_size(values_TF), values_TF)

    def sample(self, rows: np.ndarray, columns: np.ndarray) -> Values:
        """Some of all values."""
        return Values(self.size_T, self.values[rows][:, columns], rows, columns)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing."""
        return self.rows is None

    def of(self, ours_TF: np.ndarray) -> np.ndarray:
        """Those of our values that are known of the reference."""
        return ours_TF if self.is_whole else ours_TF[self.rows][:, self.columns]


def difference(ours_TF: np.ndarray, theirs: Values) -> tuple[float, np.ndarray]:
    """Largest absolute difference, and the largest relative one of each position, [T]."""
    ours, values = theirs.of(ours_TF), theirs.values
    size_T = theirs.size_T.astype(np.float64)
    rows = slice(None) if theirs.is_whole else theirs.rows
    hidden = (ours == -np.inf) & (values == -np.inf)
    ours, values = np.where(hidden, 0, ours), np.where(hidden, 0, values)
    with np.errstate(invalid="ignore"):
        absolute = np.abs(ours - values)
    # Infinite or not a number on one side: no rounding does that.
    absolute = np.where(np.isfinite(absolute), absolute, np.inf)
    scale = np.maximum(np.abs(np.where(np.isfinite(values), values, 0)), size_T[rows, None])
    smallest = np.finfo(np.float32).tiny
    relative_T = np.full(len(size_T), np.nan)
    relative_T[rows] = (absolute / np.maximum(scale, smallest)).max(axis=-1)
    if not theirs.is_whole:
        # Sizes of rows differ by no more than the rows do.
        with np.errstate(invalid="ignore"):
            sizes_T = np.abs(row_size(ours_TF) - size_T) / np.maximum(size_T, smallest) / 2**0.5
        relative_T = np.fmax(relative_T, np.where(np.isnan(sizes_T), np.inf, sizes_T))
    return float(absolute.max(initial=0)), relative_T
