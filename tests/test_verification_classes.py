from __future__ import annotations

import numpy as np
import pytest

from onnxcompress.verification.classes import ClassMeter, paired_interval
from onnxcompress.verification.metrics import Array

RNG = np.random.default_rng(0)


def softmax(logits: Array) -> Array:
    values = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Array = values / values.sum(axis=-1, keepdims=True)
    return result


def metered(original: Array, result: Array, labels: Array | None = None) -> ClassMeter:
    meter = ClassMeter("y")
    half = len(original) // 2
    for part in (slice(0, half), slice(half, None)):
        own = None if labels is None else labels[part]
        meter.update(original[part], result[part], len(original[part]), own)
    return meter


def test_agreement_of_probabilities() -> None:
    original = softmax(RNG.normal(size=(8, 7)) * 3)
    result = original.copy()
    result[0] = np.roll(result[0], 1)
    found = metered(original, result).agreement()
    assert found is not None
    assert found.top1_ratio == 7 / 8
    assert found.because == "its rows are probabilities"
    assert found.classes == 7
    assert found.decisions == 8


def test_top5_counts_the_original_class_among_five() -> None:
    original = np.eye(8)[[0, 7]] * 1.0
    result = np.tile(np.array([8.0, 7, 6, 5, 4, 3, 2, 1]), (2, 1))
    found = metered(original, result).agreement()
    assert found is not None
    assert found.top5_ratio == 0.5


def test_five_classes_have_no_top5() -> None:
    found = metered(np.eye(5), np.eye(5)).agreement()
    assert found is not None
    assert found.top5_ratio is None


def test_confident_logits_are_a_classifier() -> None:
    logits = np.eye(10)[RNG.integers(0, 10, 20)] * 12.0 + RNG.normal(size=(20, 10))
    found = metered(logits, logits).agreement()
    assert found is not None
    assert "logits" in found.because


@pytest.mark.parametrize(
    "output",
    [
        RNG.normal(size=(20, 384)) * 0.5,
        RNG.normal(size=(20, 64)) * 0.1 + np.eye(64)[3] * 20,
        RNG.normal(size=(20, 8, 8, 3)) * 9,
        RNG.normal(size=(20, 1)),
        np.tile(softmax(np.arange(4.0)), (20, 1)),
    ],
    ids=["embedding", "embedding with one large position", "image", "one number", "constant"],
)
def test_other_outputs_are_not(output: Array) -> None:
    assert metered(output, output).agreement() is None


def test_token_probabilities_are_decisions_each() -> None:
    tokens = softmax(RNG.normal(size=(4, 5, 9)))
    found = metered(tokens, tokens).agreement()
    assert found is not None
    assert found.decisions == 20


def test_trailing_axes_of_length_one_do_not_count() -> None:
    logits = np.eye(4)[:, :, None, None]
    found = metered(logits, logits, np.arange(4)).accuracy()
    assert found is not None
    assert found.original_ratio == 1.0


def test_accuracy_is_paired() -> None:
    labels = np.array([0, 1, 2, 3, 0, 1, 2, 3, 0, 1])
    original = np.eye(4)[labels]
    result = original.copy()
    original[0] = np.eye(4)[1]
    result[1:4] = np.eye(4)[[0, 0, 0]]
    found = metered(original, result, labels).accuracy()
    assert found is not None
    assert (found.original_ratio, found.result_ratio) == (0.9, 0.7)
    assert found.difference_ratio == pytest.approx(-0.2)
    assert (found.only_original, found.only_result) == (3, 1)
    assert found.difference_low_ratio < -0.2 < found.difference_high_ratio


@pytest.mark.parametrize(
    "labels",
    [np.array([0, 4]), np.array([-1, 0]), np.array([0.5, 1.0]), np.array(["a", "b"])],
    ids=["too large", "negative", "fractions", "strings"],
)
def test_labels_that_fit_no_class(labels: Array) -> None:
    assert metered(np.eye(4)[:2], np.eye(4)[:2], labels).accuracy() is None


def test_whole_floating_point_labels_fit() -> None:
    found = metered(np.eye(4)[:2], np.eye(4)[:2], np.array([0.0, 1.0])).accuracy()
    assert found is not None
    assert found.original_ratio == 1.0


def test_interval_by_hand() -> None:
    low, high = paired_interval(8, 2, 98)
    p, q = 9 / 100, 3 / 100
    half = 1.959964 * np.sqrt((p + q - (q - p) ** 2) / 100)
    assert (low, high) == pytest.approx((q - p - half, q - p + half), abs=1e-6)


def test_interval_turns_around_and_has_a_width() -> None:
    low, high = paired_interval(5, 1, 50)
    assert paired_interval(1, 5, 50) == pytest.approx((-high, -low))
    low, high = paired_interval(0, 0, 50)
    assert low < 0 < high


def test_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    only_first, only_second, n = 0.08, 0.03, 120
    both = rng.multinomial(n, [only_first, only_second, 1 - only_first - only_second], size=2000)
    covered = 0
    for b, c, _ in both:
        low, high = paired_interval(int(b), int(c), n)
        covered += low <= only_second - only_first <= high
    assert 0.93 <= covered / 2000 <= 0.985


def test_interval_needs_samples() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        paired_interval(0, 0, 0)
