"""Accumulators against one-shot numpy, in any split and any order of merging."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcompress.calibration.accumulate import (
    CrossSums,
    MeanSums,
    RangeSums,
    TailSums,
)
from onnxcompress.calibration.statistics import FloatArray

Sums = TypeVar("Sums", RangeSums, MeanSums, CrossSums, TailSums)

splits = st.lists(st.integers(0, 40), max_size=5)
seeds = st.integers(0, 2**16)


def _data(seed: int, count: int = 40) -> FloatArray:
    random = np.random.default_rng(seed)
    # A large offset: naive sums of squares would lose half of the digits.
    return 1e4 + random.standard_normal((count, 3)) * random.uniform(0.1, 3, 3)


def _parts(data: FloatArray, cuts: Sequence[int]) -> list[FloatArray]:
    bounds = [0, *sorted(cuts), len(data)]
    return [data[a:b] for a, b in pairwise(bounds) if b > a]


def _mean(part: FloatArray, into: MeanSums) -> None:
    mean = part.mean(axis=0)
    into.update(mean, ((part - mean) ** 2).sum(axis=0), len(part))


def _cross(part: FloatArray, into: CrossSums) -> None:
    shift = part[0] + 0.1  # any shift must do
    moved = part - shift
    into.update_shifted(
        len(part),
        shift[None, :2],
        moved[None, :, :2].sum(axis=1),
        shift[None, 1:],
        moved[None, :, 1:].sum(axis=1),
        (moved[:, :2].T @ moved[:, 1:])[None],
    )


@given(seeds, splits)
def test_mean_of_any_split_is_the_mean_of_all(seed: int, cuts: list[int]) -> None:
    data, sums = _data(seed), MeanSums()
    for part in _parts(data, cuts):
        _mean(part, sums)
    result = sums.finish()
    np.testing.assert_allclose(result.mean, data.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(result.variance, data.var(axis=0), rtol=1e-10)
    assert result.count == len(data)


@given(seeds, splits)
def test_cross_covariance_of_any_split_is_that_of_all(seed: int, cuts: list[int]) -> None:
    data, sums = _data(seed), CrossSums()
    for part in _parts(data, cuts):
        _cross(part, sums)
    centred = data - data.mean(axis=0)
    expected = centred[:, :2].T @ centred[:, 1:]
    np.testing.assert_allclose(sums.products[0], expected, rtol=1e-9, atol=1e-8)
    np.testing.assert_allclose(sums.mean_x[0], data.mean(axis=0)[:2], rtol=1e-13)
    np.testing.assert_allclose(sums.mean_y[0], data.mean(axis=0)[1:], rtol=1e-13)


def _merged_both_ways(
    make: Callable[[], Sums], fill: Callable[[FloatArray, Sums], None], data: FloatArray
) -> tuple[Sums, Sums]:
    def filled() -> list[Sums]:
        out = []
        for part in np.array_split(data, 3):
            sums = make()
            fill(part, sums)
            out.append(sums)
        return out

    a, b, c = filled()
    a.merge(b)
    a.merge(c)
    left = a
    a, b, c = filled()
    b.merge(c)
    a.merge(b)
    return left, a


@given(seeds)
def test_merging_moments_is_associative(seed: int) -> None:
    left, right = _merged_both_ways(CrossSums, _cross, _data(seed))
    np.testing.assert_allclose(left.products, right.products, rtol=1e-9, atol=1e-8)
    np.testing.assert_allclose(left.mean_x, right.mean_x, rtol=1e-13)
    assert left.count == right.count == 40


@given(seeds)
def test_merging_means_is_associative(seed: int) -> None:
    left, right = _merged_both_ways(MeanSums, _mean, _data(seed))
    np.testing.assert_allclose(left.squares, right.squares, rtol=1e-9)
    np.testing.assert_allclose(left.mean, right.mean, rtol=1e-13)


@given(seeds)
def test_merging_ranges_is_associative(seed: int) -> None:
    data = _data(seed)

    def ranges(part: FloatArray, into: RangeSums) -> None:
        into.update(part.min(axis=0), part.max(axis=0), len(part))

    for result in _merged_both_ways(RangeSums, ranges, data):
        np.testing.assert_array_equal(result.finish().minimum, data.min(axis=0))
        np.testing.assert_array_equal(result.finish().maximum, data.max(axis=0))


def _tail(sums: TailSums, part: FloatArray, take: int, keep: int) -> None:
    ordered = np.sort(part.ravel())
    sums.update(ordered[:take], ordered[-take:], len(ordered), keep)


@given(seeds, splits, st.floats(0.001, 0.4))
def test_tail_of_any_split_is_the_quantile_of_all(
    seed: int, cuts: list[int], fraction: float
) -> None:
    data, sums = _data(seed), TailSums(fraction)
    keep = int(fraction * data.size) + 2
    for part in _parts(data, cuts):
        _tail(sums, part, min(part.size, keep), keep)
    assert sums.exact()
    result = sums.finish()
    assert result.low == pytest.approx(np.quantile(data, fraction), rel=1e-12)
    assert result.high == pytest.approx(np.quantile(data, 1 - fraction), rel=1e-12)


@given(seeds)
def test_merging_tails_is_associative(seed: int) -> None:
    data = _data(seed)
    for sums in _merged_both_ways(
        lambda: TailSums(0.1), lambda part, into: _tail(into, part, 15, 15), data
    ):
        assert sums.exact()
        assert sums.finish().low == pytest.approx(np.quantile(data, 0.1), rel=1e-12)


@given(seeds, st.integers(2, 12), st.integers(1, 6))
def test_tail_never_claims_an_inexact_quantile(seed: int, keep: int, parts: int) -> None:
    data, sums = _data(seed), TailSums(0.05)
    if seed % 2:
        data = np.sort(data, axis=0)  # all extremes in one batch
    for part in np.array_split(data, parts):
        _tail(sums, part, min(part.size, keep), keep)
    if sums.exact():
        assert sums.finish().low == pytest.approx(np.quantile(data, 0.05), rel=1e-12)
        assert sums.finish().high == pytest.approx(np.quantile(data, 0.95), rel=1e-12)


def test_tail_knows_when_too_little_was_kept() -> None:
    sums = TailSums(0.1)
    _tail(sums, np.arange(100.0), 3, 3)
    assert not sums.exact()


def test_nothing_seen_is_an_error() -> None:
    with pytest.raises(ValueError, match="no elements"):
        RangeSums().finish()
