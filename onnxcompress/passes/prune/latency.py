"""A budget of time: how many multiply-accumulates may stay so that a run takes so long.

What a channel saves in time is known to the kernels alone: they compute in steps of their vector
width, and small layers are overhead. So the plan is made for multiply-accumulates, in aligned
steps, and the clock says which plan keeps the time: a bisection over cut copies of the model, each
timed in turns with the original on one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.calibration.sources import synthetic_dataset
from onnxcompress.context import PassContext
from onnxcompress.graph.coupling import Coupling
from onnxcompress.graph.surgery import remove
from onnxcompress.passes.quant.clock import run_times
from onnxcompress.runtime import SessionSettings, open_session

Removed = Mapping[int, npt.NDArray[np.int64]]

_STEPS = 6
"""Plans that are timed; the last differ by less than the clock resolves."""
_SECONDS = 1.0
"""About how long one plan is timed."""


class Clock:
    """Times a model with units removed against the model with all of them.

    Args:
        model: The model.
        coupling: Its groups.
        ctx: The job; without calibration data inputs are invented.
    """

    def __init__(self, model: ir.Model, coupling: Coupling, ctx: PassContext) -> None:
        self._model, self._coupling, self._ctx = model, coupling, ctx
        self._settings = SessionSettings(providers=ctx.session.providers, threads=1)
        data = ctx.calibration or synthetic_dataset(model, samples=1, seed=ctx.seed)
        self._feeds = data.first()
        self._whole = open_session(model, self._settings, work_dir=ctx.work_dir)

    def ratio(self, removed: Removed) -> float:
        """Time with ``removed`` cut / time of the whole model, one sample, one thread."""
        cut = model_io.clone(self._model)
        remove(cut, self._coupling, removed)
        session = open_session(cut, self._settings, work_dir=self._ctx.work_dir)
        before, after = run_times([self._whole, session], self._feeds, seconds=_SECONDS)
        return after / before


def plan_in_time(
    plan: Callable[[float], dict[int, npt.NDArray[np.int64]]],
    ratio: Callable[[Removed], float],
    kept: float,
) -> tuple[dict[int, npt.NDArray[np.int64]], float]:
    """The plan that removes least while a run takes no longer than ``kept`` of the original's time.

    Args:
        plan: From the fraction of the multiply-accumulates kept to the units removed.
        ratio: The time that is then left, as a fraction.
        kept: The budget.

    Returns:
        The plan and its time; if none of those tried keeps the budget, the fastest of them.
    """
    tried: list[tuple[float, float, dict[int, npt.NDArray[np.int64]]]] = []
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2 if tried else min(max(kept, 0.05), 0.99)
        units = plan(middle)
        time = ratio(units)
        tried.append((middle, time, units))
        if time <= kept:
            low = middle
        else:
            high = middle
    fitting = [entry for entry in tried if entry[1] <= kept]
    best = max(fitting, key=lambda e: e[0]) if fitting else min(tried, key=lambda e: e[1])
    return best[2], best[1]
