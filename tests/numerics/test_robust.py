"""Means of a few measurements of which single ones are far off."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcompress.numerics.robust import trimmed_mean

VALUES = st.lists(st.floats(-10, 10), min_size=1, max_size=30)


@given(VALUES, st.floats(-5, 5))
def test_it_moves_with_the_values(values: list[float], shift: float) -> None:
    found, moved = trimmed_mean(values), trimmed_mean([v + shift for v in values])
    assert moved.value == pytest.approx(found.value + shift, abs=1e-9)
    assert moved.error == pytest.approx(found.error, abs=1e-9)
    assert min(values) - 1e-9 <= found.value <= max(values) + 1e-9
    assert found.error >= 0


def test_fewer_than_five_are_a_plain_mean() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    found = trimmed_mean(values)
    assert found.value == 4.0
    assert found.error == pytest.approx(np.std(values, ddof=1) / 2)
    assert trimmed_mean([3.0]).error == math.inf


@pytest.mark.parametrize("outlier", [50.0, 5000.0, -5000.0])
def test_one_in_five_may_be_anywhere(outlier: float) -> None:
    values = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, outlier]
    found = trimmed_mean(values)
    assert found.value == pytest.approx(1.0, abs=0.03)
    assert found.error < 0.05


@pytest.mark.parametrize("count", [5, 8, 12])
def test_the_error_says_how_far_means_scatter(count: int) -> None:
    random = np.random.default_rng(0)
    found = [trimmed_mean(list(random.normal(size=count))) for _ in range(2000)]
    scatter = float(np.std([each.value for each in found]))
    assert np.sqrt(np.mean([each.error**2 for each in found])) == pytest.approx(scatter, rel=0.15)
