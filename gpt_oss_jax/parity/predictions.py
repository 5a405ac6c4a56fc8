"""Distributions over the next token, of all logits or of the likeliest ones and their sum."""

from __future__ import annotations

import dataclasses

import numpy as np

from gpt_oss_jax.parity.ops import row_size
from gpt_oss_jax.parity.report import Predictions
from gpt_oss_jax.parity.values import Values


@dataclasses.dataclass(frozen=True)
class TopLogits:
    """What a golden file keeps of logits.

    Attributes:
      ids: The likeliest tokens of each position, likeliest first, [T, k].
      logits: Theirs.
      logsumexp_T: Of all logits.
      next_T: Logit of the actual next token, [T - 1].
    """

    ids: np.ndarray
    logits: np.ndarray
    logsumexp_T: np.ndarray
    next_T: np.ndarray

    @classmethod
    def of(cls, logits_TV: np.ndarray, tokens_T: np.ndarray, count: int) -> TopLogits:
        """The `count` largest of all logits."""
        count = min(count, logits_TV.shape[1])
        ids = np.argpartition(-logits_TV, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(logits_TV, ids, 1), axis=1, kind="stable")
        ids = np.take_along_axis(ids, order, 1).astype(np.int32)
        return cls(
            ids,
            np.take_along_axis(logits_TV, ids, 1).astype(np.float32),
            np.array([_logsumexp(x) for x in logits_TV]),
            logits_TV[np.arange(len(tokens_T) - 1), tokens_T[1:]].astype(np.float32),
        )

    def beside(self, ours_TV: np.ndarray, tokens_T: np.ndarray) -> tuple[np.ndarray, Values]:
        """Ours and what is kept, [T, k + 2]; a log-sum-exp is off by no more than logits are."""
        own = TopLogits(
            self.ids,
            np.take_along_axis(ours_TV, self.ids, 1),
            np.array([_logsumexp(x) for x in ours_TV]),
            ours_TV[np.arange(len(tokens_T) - 1), tokens_T[1:]],
        )
        ours, theirs = (
            np.column_stack([x.logits, x.logsumexp_T, np.append(x.next_T, 0)]).astype(np.float32)
            for x in (own, self)
        )
        # Sizes of rows differ by no more than the rows do, and that of all logits is not kept.
        return ours, Values(row_size(ours_TV), theirs)


def predictions(
    ours_TV: np.ndarray, theirs: np.ndarray | TopLogits, tokens_T: np.ndarray
) -> Predictions:
    """Ours against all logits of a reference, or against what a golden file keeps of them."""
    bound = isinstance(theirs, TopLogits)
    top = theirs if bound else TopLogits.of(theirs, tokens_T, 10)
    ours_top = TopLogits.of(ours_TV, tokens_T, 10)
    if bound:
        kl_T = [_kl_of_top(x, top, t) for t, x in enumerate(ours_TV)]
    else:
        kl_T = [_kl(x, y) for x, y in zip(ours_TV, theirs, strict=True)]
    ten = top.ids[:, :10]
    shared = (ten[:, :, None] == ours_top.ids[:, None, :]).any(-1)
    return Predictions(
        kl_T=np.array(kl_T),
        top1_T=ten[:, 0] == ours_top.ids[:, 0],
        top10_T=shared.mean(-1),
        nll_T=ours_top.logsumexp_T[:-1] - ours_top.next_T,
        reference_nll_T=top.logsumexp_T[:-1] - top.next_T,
        is_bound=bound,
    )


def _logsumexp(x: np.ndarray) -> float:
    x = x.astype(np.float64)
    with np.errstate(invalid="ignore"):  # Infinity among them: the result is no number.
        return float(x.max() + np.log(np.exp(x - x.max()).sum()))


def _kl(ours_V: np.ndarray, theirs_V: np.ndarray) -> float:
    p = theirs_V.astype(np.float64) - _logsumexp(theirs_V)
    q = ours_V.astype(np.float64) - _logsumexp(ours_V)
    with np.errstate(invalid="ignore"):
        # Some write minus infinity for tokens that there are not; those add nothing.
        return float(np.where(p == -np.inf, 0, np.exp(p) * (p - q)).sum())


def _kl_of_top(ours_V: np.ndarray, top: TopLogits, t: int) -> float:
    p = top.logits[t].astype(np.float64) - top.logsumexp_T[t]
    q = ours_V[top.ids[t]].astype(np.float64) - _logsumexp(ours_V)
    kl = (np.exp(p) * (p - q)).sum()
    # Each side's other tokens as one; nothing where the rounding of the sums leaves nothing.
    p_rest, q_rest = (1 - np.exp(x).sum() for x in (p, q))
    if p_rest > 1e-9 and q_rest > 1e-9:
        kl += p_rest * np.log(p_rest / q_rest)
    return float(kl)
