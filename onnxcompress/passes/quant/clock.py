"""Which of several models is fastest, on a machine that may be busy with other things.

Models are run in turns, one thread each, and each turn is measured in *processor time of the
calling thread*, in which onnxruntime computes when it has one thread. Another process that takes
the processor away does not count, which it would on a wall clock: with four busy processes per
core, the wall clock called a quantized autoencoder slower than float (0.91x) that is faster
(1.10x). The lower quartile over the turns is taken, since what disturbs a run only makes it slower.
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


def fine_clock() -> Callable[[], float]:
    """Processor time of this thread where it is fine enough, else the wall clock (Windows)."""
    fine = time.get_clock_info("thread_time").resolution <= _BLOCK_SECONDS / 100
    return time.thread_time if fine else time.perf_counter


def run_times(
    sessions: Sequence[Session],
    feeds: Mapping[str, Array],
    *,
    seconds: float,
    clear: float | None = None,
) -> list[float]:
    """Time of one run of each model, in seconds.

    Args:
        sessions: Models opened with one thread.
        feeds: One run's inputs.
        seconds: About how much processor time to spend on all of them, at most.
        clear: Measure only until one is left: a model that in three of four turns takes this many
            times as long as the fastest one, or longer, drops out. 1 only finds the fastest.
    """
    clock = fine_clock()
    stop = clock() + seconds
    counts = []
    for session in sessions:
        for _ in range(_WARMUP_RUNS):
            if _block(session, feeds, 1, clock) > _BLOCK_SECONDS:
                break
        counts.append(max(1, int(_BLOCK_SECONDS / max(_block(session, feeds, 1, clock), 1e-7))))
    times: list[list[float]] = [[] for _ in sessions]
    places = list(range(len(sessions)))
    for turn in range(_MAX_ROUNDS):
        if turn >= _MIN_ROUNDS and (clock() > stop or (clear is not None and len(places) < 2)):
            break
        for place in places if turn % 2 == 0 else reversed(places):
            times[place].append(_block(sessions[place], feeds, counts[place], clock))
        if clear is not None and turn + 1 >= _MIN_ROUNDS:
            places = _in_the_race(times, places, clear)
    return [float(np.quantile(each, 0.25)) for each in times]


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


def _block(
    session: Session, feeds: Mapping[str, Array], count: int, clock: Callable[[], float]
) -> float:
    start = clock()
    for _ in range(count):
        session.run(feeds)
    return (clock() - start) / count
