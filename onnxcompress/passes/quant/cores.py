"""Whether a model is slower than float with the threads that it will run on.

Placements are timed with one thread, in processor time that other programs hardly disturb. Users
run with all cores, where gains shrink: work that onnxruntime does not divide weighs more, and each
kernel waits for its threads. So a result is timed beside float on several threads, too, on the wall
clock, which is a far noisier one. A *heat* is a short race in two new sessions and gives

    r = ln(time of float / time of the result)

from the lower quartiles of the times. Single heats are far off when another program comes between
(0.5 and 5.4 instead of 2.4 for a small ResNet on two busy cores), so their trimmed mean counts, and
its error holds all that turns, sessions and other programs scatter. Heats go on until the mean is
clear of the limit by two and a half errors. What stays open is not held against the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxcompress._threads import usable_cores
from onnxcompress.numerics.robust import trimmed_mean
from onnxcompress.passes.quant.clock import Stopwatch
from onnxcompress.runtime import Array, Session, SessionSettings

MAY_BE_SLOWER = "The result may be slower than float"
"""How the note begins that several threads left that open."""

_Z = 2.5
"""Errors that a mean must be clear of a limit by."""

_TURNS = 12
"""Turns of one heat: its lower quartile is then the third of twelve times."""

_FEWEST_TURNS = 3
"""Turns of a heat of models that take long."""

_FEWEST_TO_PASS = 3
_FEWEST_TO_FAIL = 5
"""Heats before a verdict. With five, of which three count, a mean is 2.5 errors off by chance in 6
of 100 cases (t distribution, one side); a verdict against is heard twice."""

_LEAST_ERROR = 0.005

_SECONDS = 3.0
_HEARINGS = 2
"""How often a verdict against a model is heard."""

_SHARE_TO_OPEN = 0.1
"""Sessions that take longer to open than this part of the time are kept for all heats."""


def thread_counts(asked: int) -> tuple[int, ...]:
    """Numbers of threads with which a result must not be slower than float.

    Args:
        asked: Threads that the user wants; 0 for no wish.

    Returns:
        What was asked for; else one thread, and all cores where there are more.
    """
    if asked:
        return (asked,)
    cores = usable_cores()
    return (1, cores) if cores > 1 else (1,)


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a model is beside float.

    Attributes:
        heats: ``ln(time of float / time of the model)`` of each heat.
        seconds: Seconds on the wall clock that it took to measure.
    """

    heats: tuple[float, ...]
    seconds: float

    @property
    def ratio(self) -> float:
        """Time of float / time of the model."""
        return math.exp(trimmed_mean(self.heats).value)

    @property
    def error(self) -> float:
        """Standard error of the logarithm of ``ratio``."""
        return max(trimmed_mean(self.heats).error, _LEAST_ERROR)

    def is_below(self, limit: float) -> bool:
        """Whether the ratio is clearly below ``limit``."""
        enough = len(self.heats) >= _FEWEST_TO_FAIL
        return enough and math.log(self.ratio / limit) < -_Z * self.error

    def is_above(self, limit: float) -> bool:
        """Whether the ratio is clearly above ``limit``."""
        enough = len(self.heats) >= _FEWEST_TO_PASS
        return enough and math.log(self.ratio / limit) > _Z * self.error


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found about a result with several threads.

    Attributes:
        threads: Threads that it computes with.
        speed: How fast it is beside float.
        limit: The ratio of times that was asked about.
    """

    threads: int
    speed: Speed
    limit: float

    @property
    def slower(self) -> bool:
        """Whether it is clearly slower than allowed."""
        return self.speed.is_below(self.limit)

    def __str__(self) -> str:
        return (
            f"{self.threads} threads: {self.speed.ratio:.3f} times the speed of float "
            f"± {self.speed.error:.3f} in {len(self.speed.heats)} heats"
        )

    @property
    def figures(self) -> dict[str, float | int | str]:
        """For the report."""
        return {
            "cores_timed": self.threads,
            "cores_speed_ratio": round(self.speed.ratio, 3),
            "cores_seconds": round(self.speed.seconds, 1),
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """For the report: that it may be slower, where the clock left that open."""
        if self.slower or self.speed.ratio >= self.limit:
            return ()
        return (
            f"{MAY_BE_SLOWER} with {self.threads} threads: {self.speed.ratio:.2f} times its speed, "
            f"with an error of {100 * self.speed.error:.0f} %, too much to tell.",
        )


@dataclass(frozen=True, slots=True)
class Arena:
    """Where a model is timed beside float.

    Attributes:
        threads: Threads that both compute with.
        limit: The ratio of times that is asked about.
        seconds: About how many seconds on the wall clock one hearing may take.
        clock: The wall clock.
    """

    threads: int
    limit: float
    seconds: float = _SECONDS
    clock: Callable[[], float] = field(default=time.perf_counter)

    def hear(
        self,
        open_float: Callable[[SessionSettings], Session],
        open_result: Callable[[SessionSettings], Session],
        feeds: Mapping[str, Array],
    ) -> Verdict:
        """Time a result beside float; what is against it is heard once more, anew.

        Args:
            open_float: Opens the float model in a new session.
            open_result: Opens the result in a new session.
            feeds: One run's inputs.
        """
        started = self.clock()
        for _ in range(_HEARINGS):
            found = self._hearing(open_float, open_result, feeds)
            if not found.is_below(self.limit):
                break
        return Verdict(self.threads, Speed(found.heats, self.clock() - started), self.limit)

    def _hearing(
        self,
        open_float: Callable[[SessionSettings], Session],
        open_result: Callable[[SessionSettings], Session],
        feeds: Mapping[str, Array],
    ) -> Speed:
        settings = SessionSettings(threads=self.threads)
        started, heats = self.clock(), list[float]()
        watch: Stopwatch | None = None
        opening = 0.0
        while True:
            begun = self.clock()
            if watch is None or opening < _SHARE_TO_OPEN * self.seconds:
                # In turns: what is closed leaves its memory to the next.
                first, second = (open_float, open_result)[:: 1 - 2 * (len(heats) % 2)]
                pair = [first(settings), second(settings)][:: 1 - 2 * (len(heats) % 2)]
                watch = Stopwatch(pair, feeds, threads=self.threads)
                opening = self.clock() - begun
            heats.append(self._heat(watch, begun))
            spent = self.clock() - started
            found = Speed(tuple(heats), spent)
            late = spent > self.seconds and len(heats) >= _FEWEST_TO_PASS
            if late or found.is_above(self.limit) or found.is_below(self.limit):
                return found

    def _heat(self, watch: Stopwatch, begun: float) -> float:
        """One heat with the sessions of ``watch``, which may have run others; it began then."""
        before = len(watch.times[0])
        for turn in range(_TURNS):
            late = self.clock() - begun > self.seconds / _FEWEST_TO_PASS
            if late and turn >= _FEWEST_TURNS:
                break
            watch.turn((0, 1))
        base, result = (float(np.quantile(each[before:], 0.25)) for each in watch.times)
        return math.log(base / result)
