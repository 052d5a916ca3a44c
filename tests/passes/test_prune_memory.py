"""What one refit remembers for the next: the original's answers and the ridges."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.calibration.statistics import AxisUnfold
from onnxcompress.passes.prune.consumers import Consumer
from onnxcompress.passes.prune.jobs import Job, Refit
from onnxcompress.passes.prune.memory import Memory


def job(node: str = "layer", *, lost: bool = True) -> Job:
    consumer = Consumer(
        node, "Gemm", "x", AxisUnfold(), "w", (3, 2), False, 1.0, "b", "y", 1, shared=()
    )
    inputs = np.array([not lost, True])
    return Job(consumer, "x", (("reference/y", 1.0),), inputs, np.ones(3, np.bool_), None)


def test_answers_are_used_once_all_runs_are_there() -> None:
    memory = Memory()
    answers = memory.answers(job(), 10)
    assert answers is not None
    answers.add(4, np.zeros((2, 3), np.float32))
    assert not memory.knows(job(), 10)
    memory.filled = True
    assert memory.answers(job(), 10) is None  # a run is missing
    answers.whole = True
    assert memory.knows(job(), 10)
    assert memory.answers(job(), 10) is answers
    assert not memory.knows(job(), 11)  # other rows
    assert memory.answers(job(), 11) is None
    assert not memory.without_answers.knows(job(), 10)


def test_no_more_answers_are_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcompress.passes.prune.memory.MOST_BYTES", 20)
    memory = Memory()
    answers = memory.answers(job(), 10)
    assert answers is not None
    answers.add(4, np.zeros((2, 3), np.float32))
    assert memory.answers(job(), 11) is None


@pytest.mark.parametrize(
    ("found", "known"), [(0.1, (0.1,)), (np.inf, (np.inf,)), (None, (None,))], ids=str
)
def test_ridges_serve_layers_that_met_the_same_fate(
    found: float | None, known: tuple[float | None, ...]
) -> None:
    memory = Memory()
    memory.keep(job(), Refit(job().consumer, (found,), 20.0))
    assert memory.ridges(job()) == (None,)  # the first refit looks for itself
    memory.filled = True
    assert memory.ridges(job()) == known
    assert memory.ridges(job(lost=False)) == (None,)
    assert memory.ridges(job("another")) == (None,)
    assert memory.without_answers.ridges(job()) == known
    memory.keep(job("another"), Refit(job().consumer, (0.5,), 20.0))
    assert memory.ridges(job("another")) == (None,)


def test_layers_that_were_left_as_they_are_are_left_again() -> None:
    memory = Memory()
    for lost in (True, False):
        memory.keep(job(lost=lost), Refit(job().consumer, (None,), 20.0))
    assert not memory.spares(job(lost=False))
    memory.filled = True
    assert memory.spares(job(lost=False))
    assert not memory.spares(job())  # what lost inputs may need others in another plan
    assert not memory.spares(job("another", lost=False))
