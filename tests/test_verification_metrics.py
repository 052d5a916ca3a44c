from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.verification.metrics import Array, OutputFidelity, OutputMeter, cosine, sqnr_db


def measure(original: Array, result: Array, *, batch: int | None = None) -> OutputFidelity:
    meter = OutputMeter("y")
    step = batch or len(original)
    for low in range(0, len(original), step):
        part = original[low : low + step]
        meter.update(part, result[low : low + step], len(part))
    return meter.finish()


def test_known_numbers() -> None:
    original = np.array([[3.0, 4.0], [0.0, 1.0]])
    result = np.array([[3.0, 3.0], [0.0, 1.0]])
    found = measure(original, result)
    assert found.max_abs_error == 1.0
    assert found.mean_abs_error == 0.25
    assert found.sqnr_db == pytest.approx(10 * math.log10(26 / 1))
    assert found.cosine == pytest.approx(22 / math.sqrt(26 * 19))
    assert found.worst_sqnr_db == pytest.approx(10 * math.log10(25))
    assert found.worst_cosine == pytest.approx(21 / math.sqrt(25 * 18))
    assert found.worst_sample == 0
    assert found.equal_ratio == 0.75
    assert (found.samples, found.elements) == (2, 4)


def test_identical_outputs_have_infinite_sqnr_and_cosine_one() -> None:
    values = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    found = measure(values, values.copy())
    assert found.sqnr_db == math.inf
    assert found.cosine == pytest.approx(1.0, abs=1e-12)
    assert found.equal_ratio == 1.0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 10_000))
def test_batching_changes_nothing(batch: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    original = rng.normal(size=(rows, 3, 2))
    result = original + 0.1 * rng.normal(size=original.shape)
    whole, parts = measure(original, result), measure(original, result, batch=batch)
    assert parts.worst_sample == whole.worst_sample
    for name in ("sqnr_db", "cosine", "max_abs_error", "mean_abs_error", "worst_sqnr_db"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 10), st.integers(0, 10_000))
def test_cosine_ignores_scale_and_sqnr_does_not(scale: float, seed: int) -> None:
    original = np.random.default_rng(seed).normal(size=(4, 5))
    found = measure(original, scale * original)
    assert found.cosine == pytest.approx(1.0)
    if scale != 1.0:
        assert found.sqnr_db == pytest.approx(-20 * math.log10(abs(1 - scale)), abs=1e-6)


def test_nonfinite_values_are_counted_and_left_out() -> None:
    original = np.array([[1.0, np.nan, -np.inf, 2.0]])
    result = np.array([[1.0, np.nan, -np.inf, np.inf]])
    found = measure(original, result)
    assert found.nonfinite_original == 2
    assert found.nonfinite_result == 1
    assert found.sqnr_db == math.inf
    assert found.mean_abs_error == 0.0
    assert found.equal_ratio == 0.75


def test_nothing_finite_has_no_metrics() -> None:
    found = measure(np.full((2, 2), np.nan), np.zeros((2, 2)))
    assert found.sqnr_db is None
    assert found.cosine is None
    assert found.nonfinite_original == 4


def test_integer_outputs_have_no_cosine() -> None:
    found = measure(np.array([[1], [2], [3]]), np.array([[1], [2], [5]]))
    assert not found.is_float
    assert found.cosine is None
    assert found.sqnr_db is None
    assert found.equal_ratio == pytest.approx(2 / 3)
    assert found.max_abs_error == 2


def test_string_outputs_are_only_compared() -> None:
    found = measure(np.array(["a", "b"], dtype=object), np.array(["a", "c"], dtype=object))
    assert found.equal_ratio == 0.5
    assert found.max_abs_error is None


def test_an_output_without_sample_axis_counts_as_one_sample() -> None:
    meter = OutputMeter("state")
    state = np.ones((2, 1, 4))
    meter.update(state, state * 0.5, samples=3)
    found = meter.finish()
    assert found.samples == 3
    assert found.worst_sample == 0
    assert found.worst_cosine == pytest.approx(1.0)


def test_scalar_and_empty_outputs() -> None:
    scalar = OutputMeter("s")
    scalar.update(np.array(2.0), np.array(1.0), 1)
    assert scalar.finish().max_abs_error == 1.0
    empty = OutputMeter("e")
    empty.update(np.zeros((1, 0)), np.zeros((1, 0)), 1)
    assert empty.finish().equal_ratio == 1.0


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"output 'y' has shape \[2, 1\]"):
        OutputMeter("y").update(np.zeros((2, 2)), np.zeros((2, 1)), 2)


def test_float16_sums_do_not_overflow() -> None:
    values = np.full((1, 4096), 1000, dtype=np.float16)
    assert measure(values, values).cosine == pytest.approx(1.0)


def test_sqnr_and_cosine_of_zeros() -> None:
    assert sqnr_db(0.0, 0.0) == math.inf
    assert sqnr_db(0.0, 1.0) == -math.inf
    assert cosine(0.0, 0.0, 0.0) == 1.0
    assert cosine(0.0, 1.0, 0.0) == 0.0
