"""Names the likely cause of a difference, where it is a known trap.

At the worst position of the first op that differs, both sides have the same inputs. There each
trap's formula is evaluated beside the right one: where one side is what the right formula gives and
the other what a trap gives, the trap is the cause.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from gpt_oss_jax.config import Config
from gpt_oss_jax.parity import formulas
from gpt_oss_jax.parity.ours import Stage
from gpt_oss_jax.parity.report import OpResult, Routing
from gpt_oss_jax.parity.values import Values

_SHARE = 0.1  # A trap must explain all but this much of the difference.


def cause(
    stage: Stage,
    name: str,
    found: OpResult | Routing,
    inputs: Mapping[str, np.ndarray],
    ours_TF: np.ndarray,
    theirs: Values,
    config: Config,
) -> str:
    """A sentence, with a blank before it; empty if no trap explains the difference.

    Args:
      stage: Whose op it is, with its weights.
      name: Of the op, without the layer.
      found: The difference.
      inputs: All values of the stage that ours was computed from, [T, features].
      ours_TF: Ours.
      theirs: What is known of the reference's.
      config: Sizes.
    """
    if not isinstance(found, OpResult):
        return ""
    rows = np.arange(len(ours_TF)) if theirs.is_whole else theirs.rows
    at = int(found.judged.excess_T[rows].argmax())
    t, columns = int(rows[at]), slice(None) if theirs.is_whole else theirs.columns
    ours, reference = (x.astype(np.float64) for x in (ours_TF[t][columns], theirs.values[at]))
    with np.errstate(invalid="ignore"):
        gap = np.abs(ours - reference).max(initial=0)
    if not 0 < gap < np.inf:
        return ""
    sides = (("ours", ours, reference), ("the reference", reference, ours))
    for who, row, other in sides:
        if _is_bfloat16(row) and not _is_bfloat16(other):
            return f" Likely cause: {who} is rounded to bfloat16 here."
    found = formulas.of(stage.modules, name, t, inputs, config)
    right, *wrong = [(text, row.reshape(-1)[columns]) for text, row in found] or [(None, None)]
    off = lambda a, b: float(np.abs(a - b).max())
    for who, row, other in sides:
        if wrong and off(other, right[1]) < _SHARE * gap:
            best, text = min((off(row, x), text) for text, x in wrong)
            if best < _SHARE * gap:
                return f" Likely cause: {who} is what the formula gives with {text}."
    return ""


def _is_bfloat16(x: np.ndarray) -> bool:
    return bool((x == x.astype(ml_dtypes.bfloat16).astype(np.float64)).all())
