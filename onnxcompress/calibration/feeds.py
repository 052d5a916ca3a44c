"""What a run of the augmented model is fed with beside its samples: which rows to take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from onnxcompress.calibration.arrays import Array


class RunFeeds:
    """Choices for one run, drawn once however many statistics ask.

    Args:
        count: Samples of this run.
        total: Samples of all runs.
        slack: Factor on what quantiles keep.
        random: Source of randomness.
    """

    def __init__(self, count: int, total: int, slack: float, random: np.random.Generator) -> None:
        self.count = count
        self.total = total
        self.slack = slack
        self._random = random
        self._rows: dict[tuple[int, int], npt.NDArray[np.int64]] = {}

    def quota(self, max_rows: int) -> int:
        """The share of this run in ``max_rows``, rounded up."""
        return math.ceil(max_rows * self.count / self.total)

    def uniform(self, length: int) -> npt.NDArray[np.float64]:
        """Numbers in [0, 1), multiples of 2⁻³².

        A product with a length below 2²¹ is exact in float64, so it never rounds up to the length.
        """
        return self._random.integers(0, 2**32, length) / 2.0**32

    def rows(self, per_sample: int, max_rows: int) -> npt.NDArray[np.int64]:
        """One row at random out of each of ``k`` equal strata of this run's rows; int64 [k].

        Stratum ``i`` is ``[i n / k, (i + 1) n / k)`` in integers, for ``n = count * per_sample``
        and ``k = min(n, quota)``, so no row is taken twice, and all are when ``k = n``.
        """
        key = (per_sample, max_rows)
        if key not in self._rows:
            there = self.count * per_sample
            number = min(there, self.quota(max_rows))
            bounds = np.arange(number + 1, dtype=np.int64) * there // number
            steps = self.uniform(number) * np.diff(bounds)
            self._rows[key] = bounds[:-1] + steps.astype(np.int64)
        return self._rows[key]


Feeder: TypeAlias = Callable[[RunFeeds], Array]


class ShapesDifferError(Exception):
    """A tensor does not have the shape that the graph declares; shapes must be read at run time."""
