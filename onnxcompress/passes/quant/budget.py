"""The time that all searches of one run may take together.

It is processor time: other programs on the machine must not cut a search short.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onnxcompress.passes.quant.clock import fine_clock


class Budget:
    """Seconds of processor time, spent by one search after the other.

    Args:
        seconds: All that may be spent.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._spent = 0.0
        self._clock = fine_clock()

    @property
    def spent(self) -> float:
        """Seconds spent so far."""
        return self._spent

    @property
    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(self._seconds - self._spent, 0.0)

    @contextmanager
    def spend(self, share: float = 1.0) -> Iterator[float]:
        """Count the time of what is done inside.

        Args:
            share: How much of the whole budget may be spent here.

        Yields:
            Seconds that may be spent.
        """
        started = self._clock()
        try:
            yield min(self.left, share * self._seconds)
        finally:
            self._spent += self._clock() - started
