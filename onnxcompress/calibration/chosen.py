"""Some of the samples of a source, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from onnxcompress.calibration.arrays import Array
from onnxcompress.calibration.checks import Layout
from onnxcompress.calibration.items import ItemSource


class _Source(Protocol):
    @property
    def sample_count(self) -> int: ...

    @property
    def layout(self) -> Layout: ...

    def pieces(self, start: int, stop: int, size: int) -> Iterator[dict[str, Array]]: ...


class ChosenSource:
    """A choice of samples.

    Args:
        source: The samples.
        indices: Which of them, increasing, int64 [n].
    """

    def __init__(self, source: _Source, indices: npt.NDArray[np.int64]) -> None:
        self._source = source
        self._indices = indices
        self.layout = source.layout
        self.sample_count = len(indices)

    def pieces(self, start: int, stop: int, size: int) -> Iterator[dict[str, Array]]:
        """See :class:`onnxcompress.calibration.dataset.Source`."""
        held: list[dict[str, Array]] = []
        for sample in self._single(start, stop):
            if held and (len(held) >= size or _differ(held[0], sample)):
                yield _stacked(held)
                held = []
            held.append(sample)
        if held:
            yield _stacked(held)

    def _single(self, start: int, stop: int) -> Iterator[dict[str, Array]]:
        """The samples one by one."""
        wanted = self._indices[start:stop]
        if not len(wanted):
            return
        if not isinstance(self._source, ItemSource):
            for index in wanted.tolist():
                yield from self._source.pieces(index, index + 1, 1)
            return
        # Items can only be read from the first one on.
        chosen, position = set(wanted.tolist()), int(wanted[0])
        for piece in self._source.pieces(position, int(wanted[-1]) + 1, 64):
            for row in range(len(next(iter(piece.values())))):
                if position in chosen:
                    yield {name: array[row : row + 1] for name, array in piece.items()}
                position += 1


def _stacked(held: list[dict[str, Array]]) -> dict[str, Array]:
    return {name: np.concatenate([sample[name] for sample in held]) for name in held[0]}


def _differ(held: dict[str, Array], sample: dict[str, Array]) -> bool:
    return any(held[n].shape[1:] != a.shape[1:] for n, a in sample.items())
