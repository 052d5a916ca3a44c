"""What layers make of a hidden tensor, and how it moves."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.numerics.clipping import Bounds
from onnxcompress.numerics.hidden import Floats, Layer, made_of
from onnxcompress.numerics.places import Places

RELU = Bounds(low=0.0)


def drawn(pooled: int, seed: int = 0) -> tuple[Places, Floats, Layer, np.random.Generator]:
    rng = np.random.default_rng(seed)
    places = Places.of(rng.integers(0, 31, (20, 2, pooled)), 30)
    layer = Layer(rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=4).astype(np.float32))
    return places, rng.normal(size=(30, 3)).astype(np.float32), layer, rng


@pytest.mark.parametrize("pooled", [1, 3])
def test_values_move_as_the_slopes_say(pooled: int) -> None:
    places, x, layer, rng = drawn(pooled)
    weight, bias = rng.normal(size=(4, 3)), rng.normal(size=4)
    step = 1e-4
    moved = Layer(
        (layer.weight + step * weight).astype(np.float32),
        (layer.bias + step * bias).astype(np.float32),
    )
    before, after = (made_of(places, x, given, RELU) for given in (layer, moved))
    change = (x @ weight.T + bias).astype(np.float32)
    found = before.moved(places, change)
    np.testing.assert_allclose(found, (after.values - before.values) / step, atol=2e-2)


@pytest.mark.parametrize("pooled", [1, 3])
def test_what_comes_back_is_the_transpose_of_what_moves(pooled: int) -> None:
    places, x, layer, rng = drawn(pooled, seed=1)
    made = made_of(places, x, layer, RELU)
    change = rng.normal(size=(30, 4)).astype(np.float32)
    back = rng.normal(size=made.values.shape).astype(np.float32)
    there = float(np.sum(made.moved(places, change) * back))
    assert float(np.sum(made.returned(places, back) * change)) == pytest.approx(there, rel=1e-4)


def test_states_count_every_reading_of_a_place() -> None:
    places, x, layer, _ = drawn(1, seed=2)
    made = made_of(places, x, layer, RELU)
    slopes = places.spread(made.slopes).reshape(-1, 4)
    np.testing.assert_allclose(made.states(places), slopes.T @ slopes, rtol=1e-5)
