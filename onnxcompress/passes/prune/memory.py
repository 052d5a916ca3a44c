"""What one refit of a model found, for refits of the same model by other plans.

Plans are compared by refitting the same layers from the same samples, again and again. The
original's answers are the same each time, and so, nearly, is the ridge that suits a layer. So the
first plan's are kept: later plans need not run the original, nor try ridges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from onnxcompress.passes.prune.answers import Answers
from onnxcompress.passes.prune.jobs import Job, Refit

MOST_BYTES = 512 << 20
"""Answers of the original that are kept."""


@dataclass(slots=True)
class Memory:
    """What the first refit found. It fills up in that refit, and is only read after it.

    Attributes:
        filled: Whether the first refit is done.
    """

    filled: bool = False
    _answers: dict[tuple[str, int, int], Answers] = field(default_factory=dict)
    _ridges: dict[tuple[str, bool], tuple[float | None, ...]] = field(default_factory=dict)

    def knows(self, job: Job, max_rows: int) -> bool:
        """Whether the original need not be run for the rows of a layer."""
        found = self._answers.get(_key(job, max_rows))
        return self.filled and found is not None and found.whole

    def answers(self, job: Job, max_rows: int) -> Answers | None:
        """The original's answers for a layer, to be used or filled; None where there are none."""
        key = _key(job, max_rows)
        if self.filled:
            found = self._answers.get(key)
            return found if found is not None and found.whole else None
        if sum(a.nbytes for a in self._answers.values()) > MOST_BYTES:
            return None
        return self._answers.setdefault(key, Answers())

    def ridges(self, job: Job) -> Sequence[float | None]:
        """The ridges that suited a layer, each None where it has to be chosen."""
        found = self._ridges.get(_fate(job), ())
        if not self.filled or not found or any(r is None for r in found):
            return (None,) * job.consumer.groups
        return found

    def spares(self, job: Job) -> bool:
        """Whether a layer that lost no inputs was best left as it is."""
        found = self._ridges.get(_fate(job), ())
        lost = not job.inputs.all() or job.moved
        return self.filled and not lost and bool(found) and all(r is None for r in found)

    @property
    def without_answers(self) -> Memory:
        """What is good for other samples, too."""
        return Memory(self.filled, {}, self._ridges)

    def keep(self, job: Job, refit: Refit) -> None:
        """Remember the ridges that a layer got."""
        if not self.filled:
            self._ridges[_fate(job)] = refit.ridges


def _fate(job: Job) -> tuple[str, bool]:
    """A layer, and whether it lost inputs: one that lost none suits a larger ridge."""
    return job.consumer.node, bool(job.inputs.all())


def _key(job: Job, max_rows: int) -> tuple[str, int, int]:
    """What rows of the original depend on: they are drawn alike whatever is removed."""
    return job.target[0][0], job.consumer.target_axis, max_rows
