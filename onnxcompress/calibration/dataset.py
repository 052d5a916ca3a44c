"""Samples that fit a model, in batches, as often as needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from onnxcompress.calibration.arrays import Array, LazyArray
from onnxcompress.calibration.checks import LABELS, Layout, check_dtype, converted, layout_of
from onnxcompress.calibration.chosen import ChosenSource
from onnxcompress.errors import DataError
from onnxcompress.interface import TensorSpec


class Source(Protocol):
    """Samples in a fixed order, readable any number of times."""

    @property
    def sample_count(self) -> int:
        """Number of samples, at least one."""

    @property
    def layout(self) -> Layout:
        """How samples lie in the arrays that :meth:`pieces` gives."""

    def pieces(self, start: int, stop: int, size: int) -> Iterator[dict[str, Array]]:
        """Samples ``start`` to ``stop`` in pieces of at most ``size``, stacked on the first axis.

        All samples of a piece have one shape. Pieces other than the last are smaller than ``size``
        only where the shape changes.
        """


class Samples(Protocol):
    """What a run over samples needs; :class:`Dataset` is the usual one."""

    @property
    def sample_count(self) -> int:
        """Number of samples."""

    @property
    def layout(self) -> Layout:
        """How samples lie in the arrays."""

    def counted_batches(self, batch_size: int) -> Iterator[tuple[int, dict[str, Array]]]:
        """Feeds for one run after the other, each with its number of samples."""

    def first(self) -> dict[str, Array]:
        """Feeds of the smallest run."""


class ArraySource:
    """Samples from arrays, in memory or on disk.

    Args:
        arrays: One array per input, by input name.
        specs: The model's inputs.
        label: What to call the data in messages.

    Raises:
        DataError: If the arrays do not fit the inputs.
    """

    def __init__(
        self, arrays: Mapping[str, LazyArray], specs: Sequence[TensorSpec], label: str
    ) -> None:
        for spec in specs:
            check_dtype(spec, arrays[spec.name].dtype, label)
        self.layout, self.sample_count = layout_of(arrays, specs, label)
        self._arrays = dict(arrays)

    def pieces(self, start: int, stop: int, size: int) -> Iterator[dict[str, Array]]:
        """See :class:`Source`."""
        for low in range(start, stop, size):
            rows = slice(low, min(low + size, stop))
            yield {name: array[rows] for name, array in self._arrays.items()}


class Dataset:
    """Samples checked against a model's inputs, read lazily and as often as needed.

    Args:
        source: Where the samples come from.
        specs: The model's inputs.
        description: One line for reports: what the data are, and what was done to them.
        labels: One class number (or other target) per sample; None without.
        synthetic: Whether the samples are invented.
        start: First sample of the source to use.
        stop: One past the last; all when None.

    Raises:
        DataError: If there are no samples, or not as many labels as samples.
    """

    def __init__(
        self,
        source: Source,
        specs: Sequence[TensorSpec],
        description: str,
        *,
        labels: Array | None = None,
        synthetic: bool = False,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        group = source.layout.group or 1
        stop = source.sample_count if stop is None else min(stop, source.sample_count)
        count = max(0, stop - start)
        self.sample_count = count // group * group
        if not self.sample_count:
            raise DataError(
                f"{description}: {count} samples left, the model needs at least {group}",
                hint="Use more samples, or a smaller limit.",
            )
        if labels is not None and len(labels) != source.sample_count:
            raise DataError(
                f"{description}: {len(labels)} labels for {source.sample_count} samples",
                hint=f"'{LABELS}' needs one entry per sample, in the same order.",
            )
        self.specs = tuple(specs)
        self.description = description
        if self.sample_count < count:
            self.description += (
                f"; {count - self.sample_count} left out because the model takes {group} at once"
            )
        self.synthetic = synthetic
        self._source = source
        self._source_description = description
        self._all_labels = labels
        self._start = start
        self._stop = start + self.sample_count

    @property
    def labels(self) -> Array | None:
        """One entry per sample; None without labels."""
        return None if self._all_labels is None else self._all_labels[self._start : self._stop]

    @property
    def layout(self) -> Layout:
        """How samples lie in the arrays of the source."""
        return self._source.layout

    @property
    def stored(self) -> bool:
        """Whether the samples are arrays, so that reading them costs no more than the reading."""
        return isinstance(self._source, ArraySource)

    def batches(self, batch_size: int) -> Iterator[dict[str, Array]]:
        """Feeds for one run after the other, of at most ``batch_size`` samples each.

        A fixed batch axis, or inputs given whole, decide the number of samples instead. The last
        batch may be smaller.

        Raises:
            DataError: If a sample cannot be read, or holds NaN, infinite or unfitting values.
        """
        for _, feeds in self.counted_batches(batch_size):
            yield feeds

    def counted_batches(self, batch_size: int) -> Iterator[tuple[int, dict[str, Array]]]:
        """As :meth:`batches`, each with its number of samples.

        Raises:
            DataError: As :meth:`batches`.
        """
        size = self.layout.group or max(1, batch_size)
        position = self._start
        for piece in self._source.pieces(self._start, self._stop, size):
            count = len(piece[self.specs[0].name]) if self.specs else 1
            yield (
                count,
                {spec.name: self._feed(spec, piece[spec.name], position) for spec in self.specs},
            )
            position += count

    def _feed(self, spec: TensorSpec, samples: Array, position: int) -> Array:
        checked = converted(spec, samples, position, self._source_description)
        return checked[0, ...] if spec.name in self.layout.whole else checked

    def check(self) -> None:
        """Read every sample once, so that bad values show before any work is done.

        Raises:
            DataError: As :meth:`batches`.
        """
        for _ in self.batches(8):
            pass

    def first(self) -> dict[str, Array]:
        """Feeds of the smallest run: one sample, or as many as a fixed batch axis takes.

        Raises:
            DataError: As :meth:`batches`.
        """
        return next(self.batches(1))

    def take(self, count: int) -> Dataset:
        """The first ``count`` samples (all when there are fewer).

        Raises:
            DataError: If that leaves less than one run.
        """
        return self._window(self._start, min(self._stop, self._start + max(0, count)))

    def skip(self, count: int) -> Dataset:
        """All samples but the first ``count``.

        Raises:
            DataError: If that leaves less than one run.
        """
        return self._window(self._start + max(0, count), self._stop)

    def through(self, wrap: Callable[[Source], Source], note: str) -> Dataset:
        """The same samples read through another source.

        Args:
            wrap: From the source of the samples to the one to read; number and order stay.
            note: What that does, for the description.
        """
        return Dataset(
            wrap(self._source),
            self.specs,
            f"{self._source_description} ({note})",
            labels=self._all_labels,
            synthetic=self.synthetic,
            start=self._start,
            stop=self._stop,
        )

    def spread(self, count: int) -> Dataset:
        """``count`` samples at even distances over the whole set (all when there are fewer).

        The first ones alone would be of few kinds where a set is sorted by class.

        Raises:
            DataError: If that leaves less than one run.
        """
        count = min(max(0, count), self.sample_count)
        return self._chosen(np.arange(count, dtype=np.int64) * self.sample_count // max(count, 1))

    def divide(self, every: int, place: int = -1) -> tuple[Dataset, Dataset]:
        """All samples but one of each ``every``, and these.

        Args:
            every: How many samples there are for each one that is set apart.
            place: Which of them that is; the last one by default.

        Raises:
            DataError: If either is less than one run.
        """
        index = np.arange(self.sample_count, dtype=np.int64)
        apart = index % every == place % every
        return self._chosen(index[~apart]), self._chosen(index[apart])

    def _chosen(self, index: npt.NDArray[np.int64]) -> Dataset:
        if len(index) == self.sample_count:
            return self
        labels = self.labels
        return Dataset(
            ChosenSource(self._source, index + self._start),
            self.specs,
            self._source_description,
            labels=None if labels is None else labels[index],
            synthetic=self.synthetic,
        )

    def with_labels(self, labels: Array) -> Dataset:
        """The same samples with other labels, one per sample of this dataset.

        Raises:
            DataError: If there are not as many labels as samples.
        """
        total = self._source.sample_count
        if len(labels) != total and len(labels) != self.sample_count:
            raise DataError(
                f"{len(labels)} labels for {self.sample_count} samples of {self.description}",
                hint="Labels need one entry per sample, in the same order.",
            )
        if len(labels) != total:
            padded = np.zeros((total, *labels.shape[1:]), labels.dtype)
            padded[self._start : self._stop] = labels
            labels = padded
        made = self._window(self._start, self._stop)
        made._all_labels = labels
        return made

    def _window(self, start: int, stop: int) -> Dataset:
        return Dataset(
            self._source,
            self.specs,
            self._source_description,
            labels=self._all_labels,
            synthetic=self.synthetic,
            start=start,
            stop=stop,
        )

    def __repr__(self) -> str:
        return f"Dataset({self.sample_count} samples, {self.description})"
