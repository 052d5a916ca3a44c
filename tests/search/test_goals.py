"""Limits as goals: how far above a limit a version has to be on a few samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcompress.interface import TensorSpec
from onnxcompress.search.goals import MARGIN_DB, Goals, wilson_low
from onnxcompress.search.reference import noise_ratio, worst_sqnr_db
from onnxcompress.verification.compare import Comparison, ComparisonMeter
from onnxcompress.verification.gates import Gates

X = (TensorSpec("x", np.dtype(np.float32), ("N", 3)),)
Y = (TensorSpec("y", np.dtype(np.float32), ("N", 4)),)


def _compared(
    noise_db: float = np.inf, wrong: int = 0, count: int = 100, *, labels: bool = False
) -> Comparison:
    """One-hot outputs of ``count`` samples, ``wrong`` of them with another class, and noise."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 4, count)
    wanted = np.eye(4, dtype=np.float32)[classes]
    got = wanted.copy()
    got[:wrong] = np.roll(got[:wrong], 1, axis=1)
    if np.isfinite(noise_db):
        error = rng.normal(size=wanted.shape)
        error *= np.sqrt((wanted**2).sum() / (error**2).sum() * 10 ** (-noise_db / 10))
        got = (got + error).astype(np.float32)
    meter = ComparisonMeter(X, Y)
    meter.update({"y": wanted}, {"y": got}, count, classes if labels else None)
    return meter.finish()


@pytest.mark.parametrize(("noise_db", "kept"), [(30.5, False), (31.5, True)])
def test_sqnr_needs_a_margin(noise_db: float, kept: bool) -> None:
    goals = Goals(Gates(min_sqnr_db=30.0))
    assert MARGIN_DB == 1.0
    assert (goals.missed(_compared(noise_db)) == ()) == kept


@pytest.mark.parametrize(("noise_db", "kept"), [(19.5, False), (20.5, True)])
def test_the_floor_needs_none(noise_db: float, kept: bool) -> None:
    missed = Goals(Gates(), 20.0).missed(_compared(noise_db))
    assert (missed == ()) == kept
    assert kept or "20 dB" in missed[0]


def test_cosine_needs_the_margin_of_its_noise() -> None:
    limit = 1 - 10**-3.0 / 2  # 30 dB
    goals = Goals(Gates(min_cosine=limit))
    assert goals.missed(_compared(30.5))
    assert not goals.missed(_compared(31.5))


def test_agreement_of_few_samples_assures_little() -> None:
    goals = Goals(Gates(min_agreement=0.98))
    assert goals.missed(_compared(wrong=1, count=50))  # exactly 0.98, which may be chance
    assert not goals.missed(_compared(wrong=0, count=20))
    assert not goals.missed(_compared(wrong=5, count=1000))


def test_a_drop_counts_labels_or_all_changed_classes() -> None:
    goals = Goals(Gates(max_drop=0.02))
    assert not goals.missed(_compared(wrong=0, labels=True))
    assert goals.missed(_compared(wrong=2, labels=True))
    assert not goals.missed(_compared(wrong=5, count=1000, labels=True))
    assert goals.missed(_compared(wrong=2))
    assert not goals.missed(_compared(wrong=5, count=1000))


def test_a_version_that_does_not_run_misses_everything() -> None:
    broken = Comparison(fatal=("it does not run",))
    assert Goals(Gates(min_agreement=0.5)).missed(broken) == ("it does not run",)
    assert noise_ratio(broken) == np.inf
    assert worst_sqnr_db(broken) == -np.inf


@given(st.integers(1, 5000), st.floats(0, 1))
def test_the_lower_end_is_below_the_share_and_tends_to_it(count: int, share: float) -> None:
    equal = round(share * count)
    low = wilson_low(equal, count)
    assert 0 <= low <= equal / count + 1e-12
    assert equal / count - low <= 1.0 / count**0.5 + 1e-12
    assert wilson_low(10 * equal, 10 * count) >= low - 1e-12


@given(st.floats(5.0, 60.0))
def test_noise_and_sqnr_are_the_same_figure(noise_db: float) -> None:
    found = _compared(noise_db)
    assert -10 * np.log10(noise_ratio(found)) == pytest.approx(noise_db, abs=1e-2)
    assert worst_sqnr_db(found) == pytest.approx(noise_db, abs=1e-2)
