"""How far to factorize behind other passes when the user has not said it.

The budget by default is for a model as it came. Behind a pass that lost something the pass keeps to
what :mod:`onnxcompress.passes.prune.lost` allows: the plan keeps least of all whose summed
predicted losses are allowed. What that really costs is measured once the chains are refitted; where
it is far from what is allowed, predictions are corrected by that and the plan is made once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcompress.context import PassContext
from onnxcompress.errors import OnnxCompressError
from onnxcompress.passes.prune.lost import Comparison, Lost, losses_for
from onnxcompress.passes.svd.emit import Written
from onnxcompress.passes.svd.options import DEFAULT_KEPT
from onnxcompress.passes.svd.planning import Plan, Planner
from onnxcompress.passes.svd.recover import Refit

_TOO_MUCH = 1.25
"""Loss beside what is allowed from which the plan is made again."""
_LITTLE = 0.6
"""Loss beside what is allowed up to which it is made again, where that can save more."""
_TRUST = 4.0
"""How far one measurement may correct predictions."""


@dataclass(frozen=True, slots=True)
class Factorized:
    """A model whose layers were replaced and refitted, and by what plan."""

    model: ir.Model
    plan: Plan
    written: Sequence[Written]
    refits: Sequence[Refit]


@dataclass(frozen=True, slots=True)
class Limit:
    """What the pass may add to what is lost already.

    Attributes:
        comparison: Compares with the original.
        lost: Before the pass.
    """

    comparison: Comparison
    lost: Lost

    @property
    def allowed(self) -> float:
        """The error that it may add."""
        return self.lost.allowed

    @property
    def nothing(self) -> str:
        """What to say where every chain costs too much."""
        return (
            f"Nothing was factorized: the passes before have left {_db(self.lost.error)} of the "
            "outputs and no chain costs little beside that. Set a budget to factorize all the same."
        )

    def kept_to(
        self, done: Factorized, planner: Planner, again: Callable[[Plan], Factorized]
    ) -> tuple[Factorized, str]:
        """The model, or one made with corrected predictions, and what to say about it.

        Args:
            done: As predicted.
            planner: Made its plan.
            again: Carries out another.
        """
        added = self._added(done.model)
        could_save_more = done.plan.loss > 0.9 * self.allowed  # else the budget was the limit
        wrong = added > _TOO_MUCH * self.allowed
        if wrong or (could_save_more and added < _LITTLE * self.allowed):
            factor = self.allowed / max(added, self.allowed / _TRUST)
            plan = planner.plan(done.plan.loss * max(factor, 1 / _TRUST))
            second = again(plan)
            then = self._added(second.model)
            if then <= _TOO_MUCH * self.allowed or then < added:
                done, added = second, then
        before, least, now = (_db(self.lost.error + more) for more in (0.0, self.allowed, added))
        return done, (
            f"No budget was set, and the passes before have left {before} of the outputs (held-out "
            f"samples): down to {least} were allowed, {now} are left. Alone the pass keeps "
            f"{DEFAULT_KEPT:g} of the parameters."
        )

    def _added(self, model: ir.Model) -> float:
        try:
            return max(self.comparison.of(model).error - self.lost.error, 0.0)
        except (OnnxCompressError, MemoryError):
            return 0.0  # what does not run is found out after the pass


def limit_of(model: ir.Model, ctx: PassContext) -> Limit | None:
    """The limit for a model that passes before have cost something; None for others."""
    found = losses_for(ctx, model)
    return None if found is None else Limit(*found)


def _db(error: float) -> str:
    return f"{-10 * np.log10(max(error, 1e-30)):.1f} dB"
