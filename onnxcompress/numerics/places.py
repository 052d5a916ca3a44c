"""Rows that read several places of a tensor, where many rows read the same place.

What lies at a place is computed once (``U`` places), spread to the rows that read it, and what
comes back from the rows is summed for each place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Places:
    """Which places rows read.

    Attributes:
        read: Number of the place, ``U`` where there is none, [k, T, P]: a row reads ``T`` groups of
            ``P`` places, of which pooling takes the largest.
        layers: What reads each place, divided so that no place comes twice in a layer: places and
            entries of the flattened ``read``.
        count: ``U``.
    """

    read: Indices
    layers: tuple[tuple[Indices, Indices], ...]
    count: int

    @classmethod
    def of(cls, read: Indices, count: int) -> Places:
        """Prepare to sum.

        Args:
            read: As :attr:`read`.
            count: ``U``.
        """
        flat = read.ravel()
        order = np.argsort(flat, kind="stable")
        order = order[: np.searchsorted(flat, count, sorter=order)]
        owners = flat[order]
        starts = np.searchsorted(owners, np.arange(count))
        rank = np.arange(len(order)) - starts[owners]
        most = int(rank.max(initial=-1)) + 1
        layers = tuple((owners[own], order[own]) for own in (rank == r for r in range(most)))
        return cls(read, layers, count)

    @classmethod
    def joined(cls, parts: Sequence[Places]) -> Places:
        """The rows of all parts, with the places of each behind those of the ones before."""
        ends = np.cumsum([part.count for part in parts])
        whole = int(ends[-1])
        read = [
            np.where(part.read < part.count, part.read + (end - part.count), whole)
            for part, end in zip(parts, ends, strict=True)
        ]
        return cls.of(np.concatenate(read), whole)

    def spread(self, values: Floats, none: float = 0.0) -> Floats:
        """What rows read, [k, T, P, H], from what lies at the places, [U, H].

        Args:
            values: What lies there.
            none: What is read where there is no place.
        """
        edge = np.full((1, values.shape[1]), none, np.float32)
        return np.concatenate([values, edge]).take(self.read, axis=0)

    def summed(self, values: Floats) -> Floats:
        """For each place the sum of what comes back from rows, [U, H].

        Args:
            values: For each group of places that a row reads, [k, T, P, H].
        """
        flat = values.reshape(-1, values.shape[3])
        found = np.zeros((self.count, flat.shape[1]), np.float32)
        for places, entries in self.layers:
            found[places] += flat[entries]
        return found

    @property
    def weights(self) -> Floats:
        """How many rows read each place, [U, 1]."""
        return self.summed(np.ones((*self.read.shape, 1), np.float32))
