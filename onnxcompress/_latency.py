"""Compare the latency of two models fairly: in turns, warm, in ratios."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxcompress._session import Array, Session
from onnxcompress.progress import Progress, SilentProgress

_BLOCK_S = 0.002
"""Shortest stretch that is timed: the clock and one interrupt are then below a percent."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Latency of two models, a and b, on the same inputs.

    Attributes:
        ratio: Median over pairs of time a / time b; above 1, b is the faster one.
        ratio_low: 10th percentile of the ratios.
        ratio_high: 90th percentile of the ratios.
        a_ms: Median time of one run of a in milliseconds; it depends on the machine's load.
        b_ms: The same for b.
        runs: Pairs measured.
        threads: Threads inside one operator; 0 means all cores.
    """

    ratio: float
    ratio_low: float
    ratio_high: float
    a_ms: float
    b_ms: float
    runs: int
    threads: int


def compare_latency(
    a: Session,
    b: Session,
    feeds: Mapping[str, Array],
    *,
    repeats: int = 50,
    warmup: int = 3,
    max_seconds: float = 20.0,
    progress: Progress | None = None,
) -> Latency:
    """Time two models in turns (a b, b a, a b, ...).

    What slows the machine down slows both of a pair, so the ratio within a pair holds where
    absolute times do not. Each timing is a block of at least 2 ms of runs; before a block of
    several runs the model runs unclocked for as long, so that the other one's spinning threads and
    cache lines are gone.

    Args:
        a: The first model.
        b: The second model.
        feeds: Inputs of one run, for both.
        repeats: Pairs.
        warmup: Unclocked runs of each model at the start.
        max_seconds: Stop earlier, but not below 5 pairs, when this time is over.
        progress: Where to report progress.

    Raises:
        ModelError: If a model fails on ``feeds``.
    """
    for session in (a, b):
        for _ in range(warmup):
            session.run(feeds)
    counts = {id(session): _block_size(session, feeds) for session in (a, b)}
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    with (progress or SilentProgress()).task("timing", total=repeats) as task:
        for turn in range(repeats):
            order = (a, b) if turn % 2 == 0 else (b, a)
            pair = {id(s): _time_block(s, feeds, counts[id(s)]) for s in order}
            times.append((pair[id(a)], pair[id(b)]))
            task.advance()
            if len(times) >= min(5, repeats) and time.perf_counter() - start > max_seconds:
                break
    seconds = np.asarray(times, dtype=np.float64)
    low, middle, high = np.quantile(seconds[:, 0] / seconds[:, 1], [0.1, 0.5, 0.9])
    a_ms, b_ms = np.median(seconds, axis=0) * 1000
    return Latency(
        float(middle), float(low), float(high), float(a_ms), float(b_ms), len(times), a.threads
    )


def _block_size(session: Session, feeds: Mapping[str, Array]) -> int:
    """Runs that fill a block, from the fastest of three."""
    fastest = min(_clock(session, feeds, 1) for _ in range(3))
    return max(1, math.ceil(_BLOCK_S / max(fastest, 1e-7)))


def _time_block(session: Session, feeds: Mapping[str, Array], count: int) -> float:
    """Seconds per run. A model that fills the block by one run needs no settling."""
    if count > 1:
        _clock(session, feeds, count)
    return _clock(session, feeds, count) / count


def _clock(session: Session, feeds: Mapping[str, Array], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        session.run(feeds)
    return time.perf_counter() - start
