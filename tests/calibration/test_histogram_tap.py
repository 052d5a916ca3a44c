"""Histograms of tensors inside a model, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.calibration.statistics import HistogramRequest, MovingRangeRequest
from onnxcompress.errors import DataError
from tests.calibration.builders import gather, identity


def _normal(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_all_elements_are_counted_however_they_are_batched(batch_size: int) -> None:
    x = _normal(8, 4, 6)
    request = HistogramRequest("x", bins=256)
    found = gather(identity(3), [request], {"x": x}, batch_size=batch_size)[request]
    assert found.histogram.count == x.size
    assert (found.minimum, found.maximum) == (float(x.min()), float(x.max()))
    edges = (np.arange(257) - 128) * found.histogram.width
    expected, _ = np.histogram(x.astype(np.float64), edges)
    np.testing.assert_array_equal(found.histogram.counts, expected)


def test_a_part_of_a_large_tensor_gives_its_distribution_and_exact_extremes() -> None:
    x = _normal(16, 40, 50)
    x[3, 7, 11] = 1e4
    request = HistogramRequest("x", max_elements=x.size // 8)
    found = gather(identity(3), [request], {"x": x}, batch_size=4)[request]
    assert found.histogram.count == pytest.approx(x.size / 9, rel=0.02)  # an odd step
    assert (found.minimum, found.maximum) == (float(x.min()), 1e4)
    low, high = np.quantile(x, [0.3, 0.7])
    step = found.histogram.width
    assert low - 0.1 - step <= found.histogram.quantile(0.3) <= low + 0.1 + step
    assert high - 0.1 - step <= found.histogram.quantile(0.7) <= high + 0.1 + step


def test_nan_in_an_element_that_is_not_counted_is_found() -> None:
    x = _normal(4, 40, 50)
    x[2, 5, 5:9] = np.nan
    request = HistogramRequest("x", max_elements=100)
    with pytest.raises(DataError, match="NaN"):
        gather(identity(3), [request], {"x": x}, batch_size=2)


@pytest.mark.parametrize(("bins", "elements"), [(6, None), (0, None), (8, 0)])
def test_impossible_requests_are_refused(bins: int, elements: int | None) -> None:
    with pytest.raises(ValueError, match="'x'"):
        HistogramRequest("x", bins=bins, max_elements=elements)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("memory", [1, 4, 100])
def test_a_moving_average_takes_the_samples_one_by_one(batch_size: int, memory: int) -> None:
    x = _normal(10, 3, 5)
    low = high = 0.0
    for seen, sample in enumerate(x.astype(np.float64), 1):
        low += (sample.min() - low) / min(seen, memory)
        high += (sample.max() - high) / min(seen, memory)
    request = MovingRangeRequest("x", memory=memory)
    found = gather(identity(3), [request], {"x": x}, batch_size=batch_size)[request]
    assert float(found.minimum) == pytest.approx(low, rel=1e-6)
    assert float(found.maximum) == pytest.approx(high, rel=1e-6)
    assert found.count == x.size
