"""Samples without their padding, where a mask says which positions do not count.

Token models are fed sequences of one length, filled up behind the last token; a mask input of ones
and zeros tells the model to ignore the rest. What it computes there is noise that nobody reads, yet
it takes part in every statistic: on sentences of 18 tokens in 128 positions, ranges, covariances
and errors describe the filling.

Whether an input is such a mask is not told by its name but tested: samples cut behind their last 1
must give the same outputs at the positions that are left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from onnxcompress.calibration.arrays import Array
from onnxcompress.calibration.checks import Layout
from onnxcompress.calibration.dataset import Dataset, Source
from onnxcompress.errors import OnnxCompressError
from onnxcompress.interface import TensorSpec

Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""Runs the model once: feeds to outputs."""

_WINDOW = 256
"""Samples among which those of one length are looked for, to run together."""

_PROBES = 4
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Padding:
    """Which inputs are filled up, and which one says how far.

    Attributes:
        mask: The input of ones, then zeros, along axis 1.
        padded: All inputs to cut along axis 1, the mask among them.
    """

    mask: str
    padded: tuple[str, ...]

    def length(self, feeds: Mapping[str, Array]) -> int:
        """Positions that count in the longest sample of ``feeds``."""
        used = np.flatnonzero(np.asarray(feeds[self.mask] != 0).any(axis=0))
        return int(used[-1]) + 1 if used.size else 1

    def cut(self, feeds: Mapping[str, Array], length: int) -> dict[str, Array]:
        """``feeds`` without the positions from ``length`` on."""
        return {n: a[:, :length] if n in self.padded else a for n, a in feeds.items()}


def without_padding(dataset: Dataset, load: Callable[[], Run]) -> Dataset | None:
    """``dataset`` with every sample cut behind its last position that counts.

    Args:
        dataset: Samples as the user gave them.
        load: Loads the model; called only where an input looks like a mask.

    Returns:
        The samples cut, one length per run; where they have no labels, those of one length come
        together, so that fewer runs are needed. None where no input is a mask, nothing is padded,
        or cutting changes what the model makes of the rest.
    """
    for mask in dataset.specs:
        padding = _padding(mask, dataset.specs)
        if padding is None or dataset.layout.whole or dataset.layout.group not in {None, 1}:
            continue
        if _is_mask(dataset, padding) and _harmless(dataset, padding, load()):
            cut = functools.partial(_Cut, padding, dataset.labels is not None)
            return dataset.through(cut, "padding left out")
    return None


def _padding(mask: TensorSpec, specs: tuple[TensorSpec, ...]) -> Padding | None:
    """The inputs that share the dynamic second axis of ``mask``, if that may be a mask."""
    shape = mask.shape
    if shape is None or len(shape) != 2 or not isinstance(shape[1], str) or len(specs) < 2:
        return None
    padded = tuple(
        s.name
        for s in specs
        if s.shape is not None and len(s.shape) >= 2 and s.shape[1] == shape[1]
    )
    return Padding(mask.name, padded) if len(padded) > 1 else None


def _is_mask(dataset: Dataset, padding: Padding) -> bool:
    """Whether every row is ones, then zeros, and some row has zeros."""
    shortened = False
    for feeds in dataset.batches(64):
        mask = np.asarray(feeds[padding.mask])
        lengths = {feeds[name].shape[1] for name in padding.padded}
        ordered = np.isin(mask, (0, 1)).all() and (np.diff(mask.astype(np.int8), axis=1) <= 0).all()
        if len(lengths) != 1 or not ordered or not (mask[:, 0] == 1).all():
            return False
        shortened = shortened or bool((mask == 0).any())
    return shortened


def _harmless(dataset: Dataset, padding: Padding, run: Run) -> bool:
    """Whether the first samples that are padded give the same without it."""
    tried = 0
    for feeds in dataset.batches(1):
        length = padding.length(feeds)
        full = feeds[padding.mask].shape[1]
        if length == full:
            continue
        try:
            whole, short = run(feeds), run(padding.cut(feeds, length))
        except OnnxCompressError:
            return False
        if not all(_agree(whole[n], short[n], length, full) for n in whole):
            return False
        tried += 1
        if tried == _PROBES:
            break
    return tried > 0


def _agree(whole: Array, short: Array, length: int, full: int) -> bool:
    """Whether two outputs are equal to rounding, as far as both reach."""
    if whole.shape != short.shape:
        if whole.ndim < 2 or whole.shape[1] != full:
            return False
        whole = whole[:, :length]
    if whole.shape != short.shape:
        return False
    if whole.dtype.kind != "f":
        return bool(np.array_equal(whole, short))
    a, b = whole.astype(np.float64), short.astype(np.float64)
    largest = float(np.abs(a).max(initial=0.0))
    return bool(np.abs(a - b).max(initial=0.0) <= _TOLERANCE * max(largest, 1e-30))


class _Cut:
    """Another source's samples without padding; each piece holds samples of one length."""

    def __init__(self, padding: Padding, in_order: bool, source: Source) -> None:
        self._source = source
        self._padding = padding
        self._in_order = in_order

    @property
    def sample_count(self) -> int:
        return self._source.sample_count

    @property
    def layout(self) -> Layout:
        return self._source.layout

    def pieces(self, start: int, stop: int, size: int) -> Iterator[dict[str, Array]]:
        """See :class:`~onnxcompress.calibration.dataset.Source`."""
        in_order = self._in_order or size == 1
        for piece in self._source.pieces(start, stop, size if in_order else max(size, _WINDOW)):
            count = len(piece[self._padding.mask])
            lengths = np.array(
                [
                    self._padding.length({n: a[i : i + 1] for n, a in piece.items()})
                    for i in range(count)
                ]
            )
            places = np.arange(count) if in_order else np.argsort(lengths, kind="stable")
            changes = np.flatnonzero(np.diff(lengths[places])) + 1
            for same in np.split(places, changes):
                for first in range(0, len(same), size):
                    rows = same[first : first + size]
                    part = {n: a[rows] for n, a in piece.items()}
                    yield self._padding.cut(part, int(lengths[rows[0]]))
