"""Functions of one number as tables."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.numerics.clipping import Bounds
from onnxcompress.numerics.scalar_function import Composed, ScalarFunction, Tabled


def test_a_table_gives_a_smooth_function_and_its_slope() -> None:
    at = np.linspace(-4, 4, 4001)
    table = Tabled(-4.0, float(at[1] - at[0]), np.tanh(at).astype(np.float32))
    z = np.random.default_rng(0).uniform(-4, 4, (50, 3)).astype(np.float32)
    np.testing.assert_allclose(table.value(z), np.tanh(z), atol=1e-5)
    np.testing.assert_allclose(table.slope(z), 1 - np.tanh(z) ** 2, atol=5e-3)


def test_beyond_the_table_it_goes_on_straight() -> None:
    table = Tabled(0.0, 1.0, np.array([0.0, 1.0, 4.0], np.float32))
    z = np.array([-2.0, 0.5, 1.5, 5.0], np.float32)
    np.testing.assert_allclose(table.value(z), [-2.0, 0.5, 2.5, 13.0])
    np.testing.assert_allclose(table.slope(z), [1.0, 1.0, 3.0, 3.0])


@pytest.mark.parametrize("bounds", [Bounds(low=0.0), Bounds(-1.0, 1.0), Bounds()], ids=str)
def test_bounds_are_such_a_function(bounds: Bounds) -> None:
    function: ScalarFunction = bounds
    z = np.linspace(-2, 2, 9, dtype=np.float32) + np.float32(0.1)
    step = np.float32(1e-3)
    slope = (function.value(z + step) - function.value(z)) / step
    np.testing.assert_allclose(function.slope(z), slope, atol=1e-3)


def test_functions_are_applied_one_after_the_other() -> None:
    at = np.linspace(-4, 4, 4001)
    table = Tabled(-4.0, float(at[1] - at[0]), np.tanh(at).astype(np.float32))
    function = Composed((Bounds(low=0.0), table, Bounds(high=0.5)))
    z = np.random.default_rng(1).uniform(-2, 2, (50, 3)).astype(np.float32)
    np.testing.assert_allclose(
        function.value(z), np.minimum(np.tanh(np.maximum(z, 0)), 0.5), atol=1e-5
    )
    step = np.float32(1e-3)
    smooth = np.minimum(np.abs(z), np.abs(np.tanh(z) - 0.5)) > 0.01
    slope = (function.value(z + step) - function.value(z - step)) / (2 * step)
    np.testing.assert_allclose(function.slope(z)[smooth], slope[smooth], atol=1e-2)
