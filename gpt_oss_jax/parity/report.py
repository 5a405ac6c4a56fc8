"""What a comparison found: figures, and one sentence for where the numbers part."""

from __future__ import annotations

import dataclasses

import numpy as np

from gpt_oss_jax.parity.ops import roundoff

_SHOWN_FLIPS = _SHOWN_POSITIONS = 10


@dataclasses.dataclass(frozen=True)
class Difference:
    """Ours against the reference in one op.

    Attributes:
      largest: Largest absolute difference.
      relative_T: Largest difference of each position, of the size of its row (root mean square) or
        of the element where that is larger; NaN where nothing is known of a position.
      tolerance_T: What rounding explains; infinite where that is anything.
      judged_T: False where an allowed routing flip before it leaves nothing to compare.
    """

    largest: float
    relative_T: np.ndarray
    tolerance_T: np.ndarray
    judged_T: np.ndarray

    @property
    def excess_T(self) -> np.ndarray:
        """Difference over tolerance of each position; 0 where not judged or not known."""
        known = self.judged_T & ~np.isnan(self.relative_T)
        with np.errstate(invalid="ignore", divide="ignore"):
            # A row of zeros is allowed nothing, and needs nothing.
            excess_T = np.where(
                known & (self.relative_T != 0), self.relative_T / self.tolerance_T, 0.0
            )
        # No rounding makes what is not a number, whatever else it may do.
        return np.where(known & np.isinf(self.relative_T), np.inf, excess_T)

    @property
    def worst(self) -> int:
        """The position that is furthest over its tolerance, or nearest to it."""
        return int(self.excess_T.argmax())

    @property
    def relative(self) -> float:
        """Largest relative difference of all positions."""
        known = self.relative_T[~np.isnan(self.relative_T)]
        return float(known.max()) if known.size else 0.0

    @property
    def ok(self) -> bool:
        """Whether rounding explains all of it."""
        return bool((self.excess_T <= 1).all())

    @property
    def is_blind(self) -> bool:
        """Whether rounding may do anything at some position that would be judged."""
        return bool((np.isinf(self.tolerance_T) & self.judged_T).any())


@dataclasses.dataclass(frozen=True)
class OpResult:
    """One op.

    Attributes:
      name: As in `capture=`.
      own: Ours on our own input, from the tokens on.
      local: Ours on the reference's inputs of this very op; None where the reference lacks them.
    """

    name: str
    own: Difference
    local: Difference | None

    @property
    def judged(self) -> Difference:
        """The comparison that counts: the local one where there is one."""
        return self.local or self.own

    @property
    def ok(self) -> bool:
        """Whether rounding explains what counts."""
        return self.judged.ok

    def sentence(self) -> str:
        """Where and by how much the numbers part."""
        x = self.judged
        on = "its own input" if self.local is None else "the reference's inputs"
        return (
            f"First divergence: {self.name}, at position {x.worst}: on {on} ours is off by "
            f"{x.relative_T[x.worst]:.1e} of the row's size, where rounding explains "
            f"{x.tolerance_T[x.worst]:.1e}."
        )


@dataclasses.dataclass(frozen=True)
class Flip:
    """A token that ours sends to other experts.

    Attributes:
      position: Of the token.
      margin: By how much the reference preferred its experts, of the size of the router's logits.
      allowed: Margin that rounding can turn.
    """

    position: int
    margin: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether rounding explains it."""
        return bool(self.margin <= self.allowed)


@dataclasses.dataclass(frozen=True)
class Routing:
    """Chosen experts of one layer.

    Attributes:
      name: As in `capture=`.
      positions: How many tokens were compared.
      own: Flips on our own input.
      local: Flips on the reference's input of the router; None where that is not known.
      judged_T: Where flips on our own input are judged.
    """

    name: str
    positions: int
    own: tuple[Flip, ...]
    local: tuple[Flip, ...] | None
    judged_T: np.ndarray

    @property
    def wrong(self) -> tuple[Flip, ...]:
        """Flips that rounding does not explain."""
        if self.local is not None:
            return tuple(x for x in self.local if not x.ok)
        return tuple(x for x in self.own if not x.ok and self.judged_T[x.position])

    @property
    def ok(self) -> bool:
        """Whether rounding explains the flips that count."""
        return not self.wrong

    def sentence(self) -> str:
        """Where and by how much the choices part."""
        worst = max(self.wrong, key=lambda flip: flip.margin)
        return (
            f"First divergence: {self.name}, at position {worst.position}: ours chooses other "
            f"experts although the reference's lead by {worst.margin:.1e} of the size of its "
            f"logits, where rounding turns {worst.allowed:.1e}."
        )

    @property
    def agreement(self) -> float:
        """Share of tokens sent to the same experts, on our own input."""
        return 1 - len(self.own) / self.positions


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Our distributions over the next token against the reference's, on our own input.

    Attributes:
      kl_T: Kullback-Leibler divergence from the reference to ours, nats.
      top1_T: Whether the likeliest token is the same.
      top10_T: Share of the reference's ten likeliest tokens among ours.
      nll_T: Of the actual next token, nats: ours, [T - 1].
      reference_nll_T: The reference's.
      is_bound: The reference is known at its likeliest tokens only; the divergence is then that of
        those and of all others taken as one, which is a lower bound.
    """

    kl_T: np.ndarray
    top1_T: np.ndarray
    top10_T: np.ndarray
    nll_T: np.ndarray
    reference_nll_T: np.ndarray
    is_bound: bool

    def worst(self, count: int) -> np.ndarray:
        """Positions of the largest divergences, the largest first."""
        return np.argsort(-np.nan_to_num(self.kl_T, nan=np.inf), kind="stable")[:count]


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that `compare` found.

    Attributes:
      tokens_T: Ids that both read.
      dtype: Our compute type.
      ops: In the order of computing.
      routing: A layer each, where the reference says which experts it chose.
      predictions: None where the reference has no logits.
      first: Name of the first op that is over its tolerance; None if all is well.
      sentence: The verdict in one sentence.
    """

    tokens_T: np.ndarray
    dtype: str
    ops: tuple[OpResult, ...]
    routing: tuple[Routing, ...]
    predictions: Predictions | None
    first: str | None
    sentence: str

    @property
    def ok(self) -> bool:
        """Whether rounding explains every difference."""
        return self.first is None

    def table(self) -> str:
        """All of it as text."""
        lines = [
            "Local: each op on the reference's inputs. Own: ours from the tokens on. Differences "
            "are relative to the size of a row;",
            f"ulps are those of {self.dtype}. A verdict compares with the tolerance: the local "
            "difference, or the own one where there is none.",
            "",
            f"{'op':<34}{'max':>9}{'local':>10}{'ulps':>10}{'own':>10}{'ulps':>10}"
            f"{'tolerance':>11}{'position':>10}",
            *(self._row(op) for op in self.ops),
            "",
            *self._routing_lines(),
            *self._prediction_lines(),
            self.sentence,
        ]
        return "\n".join(lines) + "\n"

    def _row(self, op: OpResult) -> str:
        ulp, judged = 2 * roundoff(self.dtype), op.judged

        def pair(x: Difference | None) -> str:
            if x is None:
                return f"{'-':>10}{'-':>10}"
            return f"{x.relative:>10.1e}{x.relative / ulp:>10,.1f}"

        return (
            f"{op.name:<34}{judged.largest:>9.1e}{pair(op.local)}{pair(op.own)}"
            f"{judged.tolerance_T[judged.worst]:>11.1e}{judged.worst:>10}"
            f"{'' if judged.ok else '  OVER'}"
        )

    def _routing_lines(self) -> list[str]:
        if not self.routing:
            return []
        shares = [x.agreement for x in self.routing]
        flips = [(x.name, "own", f) for x in self.routing for f in x.own]
        flips += [(x.name, "local", f) for x in self.routing for f in x.local or ()]
        lines = [
            f"Experts: {100 * np.mean(shares):.3f}% of the tokens of a layer go to the same ones, "
            f"{100 * min(shares):.3f}% in the worst layer; {len(flips)} flips."
        ]
        lines += [
            f"  {name}, position {f.position}, on {kind} input: margin {f.margin:.1e}, rounding "
            f"turns {f.allowed:.1e}"
            for name, kind, f in flips[:_SHOWN_FLIPS]
        ]
        more = [f"  and {len(flips) - _SHOWN_FLIPS} more"] if len(flips) > _SHOWN_FLIPS else []
        return [*lines, *more, ""]

    def _prediction_lines(self) -> list[str]:
        x = self.predictions
        if x is None:
            return []
        bound = "at least " if x.is_bound else ""
        lines = [
            f"Divergence from the reference, nats a token: mean {bound}{x.kl_T.mean():.1e}, median "
            f"{np.median(x.kl_T):.1e}, largest {x.kl_T.max():.1e} at position {x.kl_T.argmax()}.",
            f"Same likeliest token: {100 * x.top1_T.mean():.2f}%; ten likeliest in common: "
            f"{100 * x.top10_T.mean():.2f}%.",
        ]
        if x.nll_T.size:
            off = np.abs(x.nll_T - x.reference_nll_T)
            lines.append(
                f"Negative log-likelihood, nats a token: ours {x.nll_T.mean():.6f}, the "
                f"reference's {x.reference_nll_T.mean():.6f}; largest difference {off.max():.1e} "
                f"at position {off.argmax()}."
            )
        lines.append(
            f"{'position':>10}{'token':>10}{'KL, nats':>10}{'NLL, ours':>12}{'theirs':>12}"
        )
        for t in x.worst(_SHOWN_POSITIONS):
            nll = [x.nll_T[t], x.reference_nll_T[t]] if t < x.nll_T.size else []
            lines.append(
                f"{t:>10}{self.tokens_T[t]:>10}{x.kl_T[t]:>10.1e}"
                + "".join(f"{value:>12.6f}" for value in nll)
                + ("" if x.top1_T[t] else "  other likeliest token")
            )
        more = len(x.kl_T) - _SHOWN_POSITIONS
        return [*lines, *([f"  and {more} more, less far apart"] if more > 0 else []), ""]
