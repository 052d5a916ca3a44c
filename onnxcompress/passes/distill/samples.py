"""Calibration samples in memory, in another order each time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from onnxcompress.calibration.dataset import Dataset

Array = npt.NDArray[np.generic]
Feeds = dict[str, Array]

_MOST_BYTES = 1 << 30
"""Samples that are kept."""


class Runs:
    """Runs of one shape over the samples of a dataset.

    Args:
        data: The samples. Of very many, as many as fit into memory, spread over all.
        size: Samples per run, unless the model says how many.

    Attributes:
        size: Samples per run.
        first: The feeds of a run.
        left_out: Samples that have not the shape that most have, or that fill no run.

    Raises:
        DataError: If a sample cannot be read.
    """

    def __init__(self, data: Dataset, size: int) -> None:
        group = data.layout.group
        one = data.first()
        bytes_each = sum(a.nbytes for a in one.values()) // (group or 1)
        data = data.spread(max(_MOST_BYTES // max(bytes_each, 1), group or size))
        # Where the model fixes the batch, a run is a unit; else a sample is.
        units: dict[tuple[tuple[int, ...], ...], list[Feeds]] = {}
        for feeds in data.batches(1):
            units.setdefault(tuple(array.shape for array in feeds.values()), []).append(feeds)
        self._units = max(units.values(), key=len)
        self._joined = 1 if group else min(size, len(self._units))
        self.size = group or self._joined
        self.first: Feeds = self._stacked(np.arange(self._joined))
        used = len(self._units) // self._joined * self.size
        self.left_out = data.sample_count - used

    def __len__(self) -> int:
        """Runs that cover the samples."""
        return len(self._units) // self._joined

    def some(self, samples: int) -> Iterator[Feeds]:
        """Runs of the same samples each time, spread over all."""
        count = min(max(samples // self.size, 1), len(self))
        yield from self._in_order(
            np.arange(count * self._joined) * len(self._units) // (count * self._joined)
        )

    def shuffled(self, rng: np.random.Generator) -> Iterator[Feeds]:
        """Every sample once, but for those that fill no run at the end."""
        yield from self._in_order(rng.permutation(len(self._units)))

    def _in_order(self, order: npt.NDArray[np.int64]) -> Iterator[Feeds]:
        for start in range(0, len(order) - self._joined + 1, self._joined):
            yield self._stacked(order[start : start + self._joined])

    def _stacked(self, places: npt.NDArray[np.int64]) -> Feeds:
        units: list[Feeds] = [self._units[int(place)] for place in places]
        if len(units) == 1:
            return units[0]
        return {n: np.concatenate([u[n] for u in units]) for n in units[0]}
