"""Rows that read several places."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.numerics.places import Places


def drawn(seed: int, shape: tuple[int, int, int], count: int) -> tuple[Places, np.random.Generator]:
    rng = np.random.default_rng(seed)
    return Places.of(rng.integers(0, count + 1, shape), count), rng


@settings(deadline=None)
@given(
    st.integers(0, 2**31),
    st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3)),
    st.integers(0, 9),
)
def test_sums_are_the_transpose_of_what_is_spread(
    seed: int, shape: tuple[int, int, int], count: int
) -> None:
    places, rng = drawn(seed, shape, count)
    values = rng.normal(size=(count, 2)).astype(np.float32)
    back = rng.normal(size=(*shape, 2)).astype(np.float32)
    spread, summed = places.spread(values), places.summed(back)
    for row, place in np.ndenumerate(places.read):
        np.testing.assert_array_equal(spread[row], values[place] if place < count else 0)
    assert float(np.sum(spread * back)) == pytest.approx(float(np.sum(values * summed)), abs=1e-4)
    assert places.weights.sum() == np.count_nonzero(places.read < count)


def test_what_is_read_where_no_place_is_can_be_chosen() -> None:
    places = Places.of(np.array([[[0, 2]], [[2, 1]]]), 2)
    found = places.spread(np.array([[3.0], [4.0]], np.float32), -np.inf)
    np.testing.assert_array_equal(found[..., 0], [[[3, -np.inf]], [[-np.inf, 4]]])


def test_rows_of_several_parts_read_the_places_of_their_own() -> None:
    parts = [drawn(seed, (3, 2, 2), 3 + seed)[0] for seed in range(3)]
    values = [np.full((p.count, 1), i + 1, np.float32) for i, p in enumerate(parts)]
    whole = Places.joined(parts)
    assert whole.count == sum(p.count for p in parts)
    found = whole.spread(np.concatenate(values))
    wanted = [p.spread(v) for p, v in zip(parts, values, strict=True)]
    np.testing.assert_array_equal(found, np.concatenate(wanted))
