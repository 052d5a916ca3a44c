from __future__ import annotations

import dataclasses

import pytest

from onnxcompress.errors import UsageError
from onnxcompress.verification.classes import Accuracy, Agreement
from onnxcompress.verification.gates import Gates, judge
from onnxcompress.verification.metrics import OutputFidelity

FLOAT = OutputFidelity(
    name="y",
    samples=10,
    elements=100,
    is_float=True,
    equal_ratio=0.1,
    max_abs_error=0.1,
    mean_abs_error=0.01,
    sqnr_db=20.0,
    cosine=0.95,
    worst_sqnr_db=10.0,
    worst_cosine=0.9,
    worst_sample=3,
    nonfinite_original=0,
    nonfinite_result=0,
)
INTEGER = dataclasses.replace(FLOAT, name="k", is_float=False, sqnr_db=None, cosine=None)
AGREEMENT = Agreement("y", 10, 10, 0.6, 0.9, "the labels fit it")
ACCURACY = Accuracy("y", 100, 0.9, 0.88, -0.02, -0.06, 0.02, 5, 3)


def verdicts(gates: Gates, *outputs: OutputFidelity, agreement: bool = False) -> dict[str, bool]:
    agreements = (AGREEMENT,) if agreement else ()
    return {o.name: o.passed for o in judge(gates, outputs or (FLOAT,), agreements, None)}


@pytest.mark.parametrize(
    ("gates", "name", "passed"),
    [
        (Gates(min_sqnr_db=20), "sqnr_db", True),
        (Gates(min_sqnr_db=20.1), "sqnr_db", False),
        (Gates(min_cosine=0.95), "cosine", True),
        (Gates(min_cosine=0.96), "cosine", False),
    ],
)
def test_limits_are_inclusive(gates: Gates, name: str, passed: bool) -> None:
    assert verdicts(gates) == {name: passed}


@pytest.mark.parametrize(("limit", "passed"), [(0.6, True), (0.61, False)])
def test_agreement(limit: float, passed: bool) -> None:
    assert verdicts(Gates(min_agreement=limit), agreement=True) == {"agreement": passed}


def test_agreement_of_a_model_with_integer_outputs_is_equality() -> None:
    assert verdicts(Gates(min_agreement=0.2), INTEGER) == {"equal": False}
    assert verdicts(Gates(min_agreement=0.1), INTEGER) == {"equal": True}


@pytest.mark.parametrize(
    ("gates", "output"),
    [
        (Gates(min_agreement=0.0), FLOAT),
        (Gates(max_drop=1.0), FLOAT),
        (Gates(min_sqnr_db=0), INTEGER),
        (Gates(min_cosine=0), INTEGER),
    ],
)
def test_what_cannot_be_measured_fails(gates: Gates, output: OutputFidelity) -> None:
    (outcome,) = judge(gates, (output,), (), None)
    assert not outcome.passed
    assert "cannot be measured" in str(outcome)


@pytest.mark.parametrize(("limit", "passed"), [(0.02, True), (0.019, False), (0.0, False)])
def test_drop(limit: float, passed: bool) -> None:
    (outcome,) = judge(Gates(max_drop=limit), (FLOAT,), (), ACCURACY)
    assert outcome.passed is passed
    assert "must be at most" in str(outcome)


def test_a_gain_is_no_drop() -> None:
    better = dataclasses.replace(ACCURACY, difference_ratio=0.01)
    (outcome,) = judge(Gates(max_drop=0.0), (FLOAT,), (), better)
    assert outcome.passed


def test_every_output_is_judged() -> None:
    worse = dataclasses.replace(FLOAT, name="z", cosine=0.5)
    outcomes = judge(Gates(min_cosine=0.9), (FLOAT, worse), (), None)
    assert [(o.output, o.passed) for o in outcomes] == [("y", True), ("z", False)]


@pytest.mark.parametrize(("value", "passed"), [(0.9, True), (0.89, False)])
def test_default_gate_of_other_outputs(value: float, passed: bool) -> None:
    (outcome,) = judge(Gates(), (dataclasses.replace(FLOAT, cosine=value),), (), None)
    assert (outcome.name, outcome.passed, outcome.by_default) == ("cosine", passed, True)


@pytest.mark.parametrize(("value", "passed"), [(0.5, True), (0.49, False)])
def test_default_gate_of_classifiers_looks_at_agreement_alone(value: float, passed: bool) -> None:
    low_cosine = dataclasses.replace(FLOAT, cosine=0.3)
    agreement = dataclasses.replace(AGREEMENT, top1_ratio=value)
    (outcome,) = judge(Gates(), (low_cosine,), (agreement,), None)
    assert (outcome.name, outcome.passed) == ("agreement", passed)


def test_default_gate_of_integer_outputs() -> None:
    (outcome,) = judge(Gates(), (INTEGER,), (), None)
    assert (outcome.name, outcome.passed) == ("equal", False)


@pytest.mark.parametrize(("equal", "passed"), [(1.0, True), (0.5, True), (0.49, False)])
def test_default_gate_of_outputs_without_a_finite_value(equal: float, passed: bool) -> None:
    """Nothing is finite in both models, so neither cosine nor SQNR can be measured."""
    output = dataclasses.replace(FLOAT, cosine=None, sqnr_db=None, equal_ratio=equal)
    (outcome,) = judge(Gates(), (output,), (), None)
    assert (outcome.name, outcome.passed) == ("equal", passed)
    assert judge(Gates(), (dataclasses.replace(output, elements=0),), (), None) == ()


def test_one_limit_switches_the_default_gate_off() -> None:
    destroyed = dataclasses.replace(FLOAT, cosine=0.0)
    (outcome,) = judge(Gates(min_sqnr_db=-100), (destroyed,), (), None)
    assert outcome.name == "sqnr_db"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_cosine", 1.1),
        ("min_agreement", -0.1),
        ("min_agreement", 99.0),
        ("max_drop", 2.0),
        ("min_cosine", float("nan")),
        ("min_sqnr_db", float("nan")),
    ],
)
def test_limits_out_of_bounds(field: str, value: float) -> None:
    with pytest.raises(UsageError, match="--m"):
        dataclasses.replace(Gates(), **{field: value})  # type: ignore[arg-type]  # all are floats
