from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcompress.numerics.adam import Adam, Plain, rate_at


def _size(*sizes: float) -> Plain:
    return Plain(np.array(sizes, np.float32))


def test_steps_are_relative_to_the_size_of_each_channel() -> None:
    weights = {"w": np.zeros((2, 3), np.float32)}
    Adam(weights, {"w": Plain(np.array([[1.0], [10.0]], np.float32))}).step(
        {"w": np.ones((2, 3), np.float32)}, 0.1
    )
    assert weights["w"] == pytest.approx(np.array([[-0.1] * 3, [-1.0] * 3]), rel=1e-3)


def test_the_first_step_has_the_length_of_the_rate_whatever_the_gradient() -> None:
    weights = {"w": np.array([1.0, -2.0, 3.0], np.float32)}
    Adam(weights, {"w": _size(5.0)}).step({"w": np.array([1e-3, -1e3, 0.0], np.float32)}, 0.01)
    assert weights["w"] == pytest.approx([1.0 - 0.05, -2.0 + 0.05, 3.0], abs=1e-4)


def test_it_is_adam_as_published() -> None:
    """Against a plain transcription of the algorithm, in double precision."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((3, 4)).astype(np.float32)}
    expected = weights["w"].astype(np.float64)
    m, v = np.zeros((3, 4)), np.zeros((3, 4))
    adam = Adam(weights, {"w": _size(2.0)})
    for t in range(1, 20):
        g = rng.standard_normal((3, 4))
        adam.step({"w": g.astype(np.float32)}, 0.03)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        expected -= 0.03 * 2.0 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    assert weights["w"] == pytest.approx(expected, abs=1e-5)


def test_it_finds_the_minimum_of_a_badly_scaled_bowl() -> None:
    weights = {"a": np.full(4, 3.0, np.float32), "b": np.full(2, 300.0, np.float32)}
    adam = Adam(weights, {"a": _size(1.0), "b": _size(100.0)})
    for step in range(600):
        slopes = {"a": 1e4 * (weights["a"] - 1), "b": 1e-4 * (weights["b"] - 100)}
        adam.step(slopes, 0.05 * rate_at(step, 600))
    assert weights["a"] == pytest.approx([1.0] * 4, abs=1e-2)
    assert weights["b"] == pytest.approx([100.0] * 2, abs=1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradients_that_are_not_finite_make_no_step(bad: float) -> None:
    weights = {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}
    adam = Adam(weights, {"a": _size(1.0), "b": _size(1.0)})
    adam.step({"a": np.array([1, bad], np.float32), "b": np.ones(2, np.float32)}, 0.1)
    assert weights["a"].tolist() == [1, 1]
    assert weights["b"].tolist() == [1, 1]


@given(st.integers(1, 500))
def test_the_rate_rises_and_falls_to_nothing(steps: int) -> None:
    rates = [rate_at(step, steps) for step in range(steps)]
    top = int(np.argmax(rates))
    assert all(0 < r <= 1 for r in rates)
    assert np.all(np.diff(rates[: top + 1]) >= 0)
    assert np.all(np.diff(rates[top:]) <= 0)
    if steps > 20:
        assert max(rates) > 0.9
        assert rates[-1] < 0.01
