"""Names the likely cause of a difference, where it is a known trap.

At the worst position of the first op that differs, both sides have the same inputs. There each
trap's formula is evaluated beside the right one: where one side is what the right formula gives and
the other what a trap gives, the trap is the cause.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
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
    dtype: np.dtype,
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
      dtype: Our compute type.
    """
    if not isinstance(found, OpResult):
        return ""
    excess_T = found.judged.excess_T
    rows = np.arange(len(ours_TF)) if theirs.is_whole else theirs.rows
    columns = slice(None) if theirs.is_whole else theirs.columns
    # Some traps look alike at the worst position; the last one that is off tells them apart.
    over = [i for i, t in enumerate(rows) if excess_T[t] > 1] or [0]
    fits: dict[str, float] = {}
    for at in (max(over, key=lambda i: excess_T[rows[i]]), over[-1]):
        t = int(rows[at])
        variants = [
            (text, row.reshape(-1)[columns])
            for text, row in formulas.of(stage.modules, name, t, inputs, config)
        ]
        ours, reference = (x.astype(np.float64) for x in (ours_TF[t][columns], theirs.values[at]))
        here = _explanations(ours, reference, variants)
        both = {text: off + here[text] for text, off in fits.items() if text in here}
        fits = both or fits or here
    if fits:
        return f" Likely cause: {min(fits, key=fits.get)}."
    # Both sides' embeddings are the checkpoint's bfloat16 numbers.
    if (
        name != "embedding"
        and dtype == np.float32
        and (who := _coarse(theirs.of(ours_TF)[over], theirs.values[over]))
    ):
        return f" Likely cause: {who} computes this in bfloat16; all of its values are."
    return ""


def _explanations(ours: np.ndarray, reference: np.ndarray, variants: list) -> dict[str, float]:
    """What may have happened at one position, and how much of the difference that leaves."""
    if not variants or not np.isfinite(ours - reference).all():
        return {}
    gap = float(np.abs(ours - reference).max(initial=0))
    if not gap:
        return {}
    (_, right), *wrong = variants
    off = lambda a, b: float(np.abs(a - b).max()) / gap
    sides = (("ours", ours, reference), ("the reference", reference, ours))
    return {
        f"{who} is what the formula gives with {text}": off(row, x)
        for who, row, other in sides
        if off(other, right) < _SHARE
        for text, x in wrong
        if off(row, x) < _SHARE
    }


def _coarse(ours: np.ndarray, reference: np.ndarray) -> str:
    """Which side alone has nothing but bfloat16 numbers, if one has."""
    coarse = [np.array_equal(x, x.astype(jnp.bfloat16)) for x in (ours, reference)]
    return {(True, False): "ours", (False, True): "the reference"}.get(tuple(coarse), "")
