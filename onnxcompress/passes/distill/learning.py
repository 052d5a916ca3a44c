"""The steps along the gradient."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from onnxcompress.context import PassContext
from onnxcompress.numerics.adam import Adam, Coordinates, rate_at
from onnxcompress.passes.distill.lesson import Lesson
from onnxcompress.passes.distill.samples import Runs

Floats = npt.NDArray[np.float64]

_WINDOWS = 20
"""How often the loss is looked at."""
_LEAST_WINDOW = 8
"""Steps whose mean loss says something."""
_RISE = 1.5
"""A loss above this part of the one at the start shows that steps are too long."""


def learn(
    lesson: Lesson,
    runs: Runs,
    energies: Floats,
    start: float,
    coordinates: Mapping[str, Coordinates],
    steps: int,
    rate: float,
    ctx: PassContext,
) -> float:
    """Move the weights of a lesson towards a smaller loss, in place.

    Where the loss rises instead, all begins anew from the old weights with half the rate: closed
    forms leave weights so close to an optimum that long steps can only lead away from it.

    Args:
        lesson: What learns.
        runs: The samples.
        energies: What errors are relative to, as in :meth:`Lesson.gradients`.
        start: The loss of the weights as they are.
        coordinates: In which each weight is moved.
        steps: How many.
        rate: The largest step.
        ctx: The job: its seed, and where progress is shown.

    Returns:
        The rate at last.
    """
    old = {name: array.copy() for name, array in lesson.weights.items()}
    zeros = {name: array == 0 for name, array in old.items() if array.ndim > 1}
    window = max(steps // _WINDOWS, _LEAST_WINDOW)
    rng = np.random.default_rng(ctx.seed)
    optimizer = Adam(lesson.weights, coordinates)
    batches = itertools.chain.from_iterable(runs.shuffled(rng) for _ in itertools.count())
    seen: list[float] = []
    with ctx.progress.task("distill: learning from the original", steps) as task:
        for step, feeds in enumerate(itertools.islice(batches, steps)):
            loss, gradients = lesson.gradients(feeds, energies)
            optimizer.step(gradients, rate * rate_at(step, steps))
            for name, gone in zeros.items():
                lesson.weights[name][gone] = 0
            seen.append(loss)
            if len(seen) == window:
                if not np.mean(seen) < _RISE * start:
                    for name, array in old.items():
                        lesson.weights[name][...] = array
                    optimizer = Adam(lesson.weights, coordinates)
                    rate /= 2
                seen.clear()
            task.advance()
    return rate
