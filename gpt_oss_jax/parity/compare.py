"""Ours against a reference, op by op, twice: on our own input and on the reference's inputs.

The core: it takes named arrays from anywhere, and knows no framework, file or command line.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from gpt_oss_jax.config import Config
from gpt_oss_jax.parity import traps
from gpt_oss_jax.parity.arrays import Known, Reference, by_stage, checked_tokens
from gpt_oss_jax.parity.ops import INPUT, row_size, tolerances
from gpt_oss_jax.parity.ours import Stage, flat, open_stages, unflat
from gpt_oss_jax.parity.predictions import TopLogits, predictions
from gpt_oss_jax.parity.report import Difference, Flip, OpResult, Report, Routing
from gpt_oss_jax.parity.values import Values, difference

_SCORES, _ROUTER, _EXPERTS = "attention.scores", "mlp.router_logits", "mlp.experts"
_CHOICE = (_EXPERTS, "mlp.expert_weights")
# Not given to ours: which experts it would choose is part of what is compared.
_NEVER_GIVEN = (_ROUTER, _SCORES)


def compare(model, reference: Reference, tokens=None) -> Report:
    """Compares a model with a reference on one text.

    Example:
      ```python
      report = compare(model, {"embedding": x_TD, "layers.0.attention.q": q_TNH}, ids)
      print(report.table())
      ```

    Args:
      model: A `Transformer`, or a `Streamed` one.
      reference: Arrays [T, ...] or [1, T, ...] by the names of `capture=`, as many as there are; or
        a function of the tokens that yields such dicts: of the embedding, each layer, the end; or a
        golden file.
      tokens: Ids, int [T]; None: those of the golden file.

    Returns:
      What was found.

    Raises:
      ValueError: If tokens, names, shapes or sizes do not fit.
    """
    tokens_T = checked_tokens(tokens, reference, model.config)
    walk = _Walk(model.config, jnp.dtype(model.dtype), tokens_T)
    ours = open_stages(model)
    for theirs in by_stage(reference, tokens_T, model.config):
        walk.take(next(ours), theirs)
    report = walk.report()
    if not (report.ops or report.routing):
        raise ValueError("the reference must hold a value that can be judged, got none.")
    return report


def assert_parity(model, reference: Reference, tokens=None) -> Report:
    """`compare`, for tests.

    Raises:
      AssertionError: With the sentence of the report, if rounding does not explain a difference.
    """
    report = compare(model, reference, tokens)
    if not report.ok:
        raise AssertionError(report.sentence)
    return report


class _Walk:
    """One comparison on its way: both residual streams, and what has been found."""

    def __init__(self, config: Config, dtype, tokens_T: np.ndarray):
        self.config, self.dtype, self.tokens_T = config, dtype, tokens_T
        self.own_x, self.their_x = jnp.asarray(tokens_T), None
        self.before_T = np.zeros(len(tokens_T))
        self.judged_T = np.ones(len(tokens_T), bool)
        self.ops: list[OpResult] = []
        self.routing: list[Routing] = []
        self.predictions = None
        self.first: str | None = None
        self.sentence = ""

    def take(self, stage: Stage, theirs: Known) -> None:
        """Compares one stage."""
        ops = {op.name: op for op in stage.ops}
        capture = tuple(name for name in ops if name != _SCORES or name in theirs)
        own = self._run(stage, ops, capture, self.own_x, {})
        own_T = self._tolerances(ops, own, (), self.before_T)
        given = _given(ops, theirs, self.their_x)
        local, local_T = self._local(stage, ops, capture, given)
        if "logits" in theirs:
            self._predict(own["logits"], theirs["logits"])

        settled_T = np.ones(len(self.tokens_T), bool)
        for name in own:
            known = theirs.get(name)
            if known is None:
                continue
            if isinstance(known, TopLogits):
                own[name], known = known.beside(own[name], self.tokens_T)
            has_local = name in local_T
            if name == _EXPERTS:
                found = self._route(stage.prefix + name, theirs, own, own_T, local, local_T)
                self.routing.append(found)
                self._stop_judging(found.own)
                if name not in given:
                    settled_T[[flip.position for flip in found.local or ()]] = False
            else:
                found = OpResult(
                    stage.prefix + name,
                    Difference(*difference(own[name], known), own_T[name], self.judged_T),
                    Difference(*difference(local[name], known), local_T[name], settled_T)
                    if has_local
                    else None,
                )
                self.ops.append(found)
            if not found.ok and self.first is None:
                ours, inputs = (local, local | given) if has_local else (own, own)
                if "embedding" not in ops:
                    inputs = {"input": flat(self.own_x, INPUT)} | inputs
                self.first = found.name
                self.sentence = found.sentence() + traps.cause(
                    stage, name, found, inputs, ours[name], known, self.config, self.dtype
                )

        if (x := own.get("output", own.get("embedding"))) is not None:
            self.own_x = unflat(x, INPUT, self.config).astype(self.dtype)
        self.before_T = own_T.get("output", self.before_T)
        x = theirs.get("output", theirs.get("embedding"))
        self.their_x = x.values if isinstance(x, Values) and x.is_whole else None

    def _run(self, stage: Stage, ops, capture, x, patch) -> dict[str, np.ndarray]:
        patch = {name: unflat(value, ops[name], self.config) for name, value in patch.items()}
        seen = stage.run(x, patch, capture)
        return {name: flat(seen[name], ops[name]) for name in capture}

    def _tolerances(self, ops, ours, given, before_T) -> dict[str, np.ndarray]:
        found = [ops[name] for name in ours]
        return tolerances(found, self.config, self.dtype, ours, given, before_T)

    def _local(self, stage: Stage, ops, capture, given):
        """Ours on what is given, and the tolerances of the ops whose inputs are."""
        if not given or "embedding" in ops:
            return {}, {}
        known = "input" in given
        x = unflat(given["input"], INPUT, self.config) if known else self.own_x
        patch = {name: value for name, value in given.items() if name != "input"}
        local = self._run(stage, ops, capture, x.astype(self.dtype), patch)
        before_T = np.full(len(self.tokens_T), 0.0 if known else np.nan)
        found = self._tolerances(ops, local, given, before_T)
        return local, {name: x for name, x in found.items() if not np.isnan(x).any()}

    def _route(self, name, theirs, own, own_T, local, local_T) -> Routing:
        chosen, logits = theirs[_EXPERTS].values, theirs.get(_ROUTER)
        logits = logits.values if logits is not None and logits.is_whole else None

        def flips(ours, tolerance_T):
            shown = ours[_ROUTER] if logits is None else logits
            return _flips(ours[_EXPERTS], chosen, shown, tolerance_T)

        found = flips(own, own_T[_ROUTER])
        local = flips(local, local_T[_ROUTER]) if _ROUTER in local_T else None
        return Routing(name, len(chosen), found, local, self.judged_T)

    def _stop_judging(self, flips: tuple[Flip, ...]) -> None:
        """From a token with other experts on, its row and those that attend to it are others."""
        first = min((flip.position for flip in flips), default=len(self.judged_T))
        self.judged_T = self.judged_T & (np.arange(len(self.judged_T)) < first)

    def _predict(self, ours_TV, theirs) -> None:
        theirs = theirs if isinstance(theirs, TopLogits) else theirs.values
        self.predictions = predictions(ours_TV, theirs, self.tokens_T)

    def report(self) -> Report:
        """What was found."""
        count = len(self.ops) + len(self.routing)
        blind = sum(op.judged.is_blind for op in self.ops)
        well = f"No divergence: rounding explains every difference in {count} values" + (
            f"; {blind} of them cannot be judged at some position, where rounding may do anything."
            if blind
            else "."
        )
        return Report(
            self.tokens_T,
            self.dtype.name,
            tuple(self.ops),
            tuple(self.routing),
            self.predictions,
            self.first,
            self.sentence or well,
        )


def _given(ops, theirs: Known, their_x: np.ndarray | None) -> dict[str, np.ndarray]:
    """What of the reference ours can be given: whole values, and the input of the stage."""
    whole = {name: x.values for name, x in theirs.items() if isinstance(x, Values) and x.is_whole}
    given = {name: x for name, x in whole.items() if name in ops and name not in _NEVER_GIVEN}
    if not all(name in given for name in _CHOICE):
        given = {name: x for name, x in given.items() if name not in _CHOICE}
    their_x = whole.get("input", their_x)
    return given if their_x is None else given | {"input": their_x}


def _flips(ours_TX, theirs_TX, logits_TE, tolerance_T) -> tuple[Flip, ...]:
    size_T = row_size(logits_TE)
    found = []
    for t, (ours, theirs) in enumerate(zip(ours_TX, theirs_TX, strict=True)):
        gained, lost = np.setdiff1d(ours, theirs), np.setdiff1d(theirs, ours)
        if gained.size:
            # Every expert gained has overtaken every one lost; on our own logits, the reverse.
            gap = logits_TE[t, lost].max() - logits_TE[t, gained].min()
            gap = max(gap, logits_TE[t, gained].max() - logits_TE[t, lost].min())
            largest = np.abs(logits_TE[t]).max()
            # Each of the two logits may be off by its tolerance.
            allowed = 2 * tolerance_T[t] * max(1.0, largest / size_T[t])
            found.append(Flip(t, float(gap / size_T[t]), float(allowed)))
    return tuple(found)
