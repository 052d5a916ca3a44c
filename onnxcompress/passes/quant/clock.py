"""Which of several models is fastest, on a machine that may be busy with other things.

Models are run in turns, one thread each, and each turn is measured in *processor time of the
calling thread*, in which onnxruntime computes when it has one thread. Another process that takes
the processor away does not count, which it would on a wall clock: with four busy processes per
core, the wall clock called a quantized autoencoder slower than float (0.91x) that is faster
(1.10x). The lower quartile over the turns is taken, since what disturbs a run only makes it slower.

With several threads there is only the wall clock. The threads of the model that ran before spin for
a while, so each block is preceded by one that is not measured, and of a block the fastest run is
taken: on a busy machine most blocks are cut off somewhere. Ratios of a tiny keyword spotter between
sessions scattered by 13 % so and by 34 % with means of blocks (two threads, two busy cores).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onnxcompress.runtime import Array, Session

_BLOCK_SECONDS = 0.002
_MIN_ROUNDS = 7
_MAX_ROUNDS = 150
_WARMUP_RUNS = 3


def fine_clock(threads: int = 1) -> Callable[[], float]:
    """Processor time of this thread where it is fine enough, else the wall clock (Windows).

    Args:
        threads: Threads that compute; the wall clock for more than one.
    """
    if threads != 1:
        return time.perf_counter
    fine = time.get_clock_info("thread_time").resolution <= _BLOCK_SECONDS / 100
    return time.thread_time if fine else time.perf_counter


class Stopwatch:
    """Times models in turns.

    Attributes:
        clock: What measures.
        times: Seconds of one run in each turn, by model; models that dropped out have fewer turns.

    Args:
        sessions: Models, opened with ``threads`` threads.
        feeds: One run's inputs.
        threads: Threads that each computes with.
    """

    def __init__(
        self, sessions: Sequence[Session], feeds: Mapping[str, Array], *, threads: int = 1
    ) -> None:
        self.clock = fine_clock(threads)
        self._settles = threads != 1
        self.times: list[list[float]] = [[] for _ in sessions]
        self._sessions, self._feeds = sessions, feeds
        self._counts: list[int] = []
        self._turns = 0

    @property
    def seconds(self) -> list[float]:
        """Time of one run of each model: the lower quartile over the turns."""
        return [float(np.quantile(each, 0.25)) for each in self.times]

    def turn(self, places: Sequence[int]) -> None:
        """Measure some of the models once, in an order that changes."""
        if not self._counts:
            self._warm_up()
        for place in places if self._turns % 2 == 0 else reversed(places):
            self.times[place].append(self._time(place, self._counts[place]))
        self._turns += 1

    def run(
        self, *, seconds: float, clear: float | None = None, keep: Sequence[int] = ()
    ) -> list[int]:
        """Measure all of them for some processor time; see :func:`run_times`.

        Args:
            seconds: About how much processor time to spend, at most.
            clear: How many times as long as the fastest one those take that drop out.
            keep: Places that do not drop out.

        Returns:
            The places of those that did not drop out.
        """
        stop = self.clock() + seconds
        places = list(range(len(self._sessions)))
        for turn in range(_MAX_ROUNDS):
            late = self.clock() > stop
            if turn >= _MIN_ROUNDS and (late or (clear is not None and len(places) < 2)):
                break
            self.turn(places)
            if clear is not None and turn + 1 >= _MIN_ROUNDS:
                near = _in_the_race(self.times, places, clear)
                places = [place for place in places if place in near or place in keep]
        return places

    def _warm_up(self) -> None:
        for place in range(len(self._sessions)):
            for _ in range(_WARMUP_RUNS):
                if self._block(place, 1) > _BLOCK_SECONDS:
                    break
            once = max(self._block(place, 1), 1e-7)
            self._counts.append(max(1, int(_BLOCK_SECONDS / once)))

    def _time(self, place: int, count: int) -> float:
        if not self._settles:
            return self._block(place, count)
        if count > 1:  # a run that fills a block settles by itself
            self._block(place, count)
        return min(self._block(place, 1) for _ in range(count))

    def _block(self, place: int, count: int) -> float:
        session = self._sessions[place]
        start = self.clock()
        for _ in range(count):
            session.run(self._feeds)
        return (self.clock() - start) / count


def run_times(
    sessions: Sequence[Session],
    feeds: Mapping[str, Array],
    *,
    seconds: float,
    clear: float | None = None,
    threads: int = 1,
) -> list[float]:
    """Time of one run of each model, in seconds.

    Args:
        sessions: Models, opened with ``threads`` threads.
        feeds: One run's inputs.
        seconds: About how much time of the clock to spend on all of them, at most.
        clear: Measure only until one is left: a model that in three of four turns takes this many
            times as long as the fastest one, or longer, drops out. 1 only finds the fastest.
        threads: Threads that each computes with.
    """
    watch = Stopwatch(sessions, feeds, threads=threads)
    watch.run(seconds=seconds, clear=clear)
    return watch.seconds


def _in_the_race(
    times: Sequence[Sequence[float]], places: Sequence[int], clear: float
) -> list[int]:
    """Those that were not slower than the fastest by ``clear`` in three of four turns."""
    lead = min(places, key=lambda place: float(np.quantile(times[place], 0.25)))
    leading = np.asarray(times[lead])
    return [
        place
        for place in places
        if place == lead or np.quantile(np.asarray(times[place]) / leading, 0.25) < clear
    ]
