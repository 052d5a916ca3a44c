from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from onnxcompress.report import units


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (units.bytes_text, 0, "0 B"),
        (units.bytes_text, 999, "999 B"),
        (units.bytes_text, 1000, "1.00 kB"),
        (units.bytes_text, 1_093_000, "1.09 MB"),
        (units.bytes_text, 12_340_000, "12.3 MB"),
        (units.bytes_text, 999_600, "1.00 MB"),
        (units.bytes_text, 3_200_000_000, "3.20 GB"),
        (units.bytes_text, None, "n/a"),
        (units.count_text, 10, "10"),
        (units.count_text, 269_000, "269 k"),
        (units.count_text, None, "n/a"),
        (units.milliseconds_text, 0.0123, "12.3 µs"),
        (units.milliseconds_text, 0.4, "400 µs"),
        (units.milliseconds_text, 12.34, "12.3 ms"),
        (units.milliseconds_text, 1.3, "1.30 ms"),
        (units.milliseconds_text, 123.4, "123 ms"),
        (units.milliseconds_text, 1234, "1.23 s"),
        (units.percent_text, 1.0, "100.00 %"),
        (units.percent_text, 0.999999, "99.99 %"),
        (units.percent_text, 0.5, "50.00 %"),
        (units.decibel_text, 31.25, "31.2 dB"),
        (units.decibel_text, -3.0, "−3.0 dB"),
        (units.decibel_text, math.inf, "identical"),
        (units.decibel_text, -math.inf, "no signal"),
        (units.cosine_text, 1.0, "1"),
        (units.cosine_text, 0.98714, "0.9871"),
        (units.cosine_text, -0.5, "−0.5000"),
        (units.cosine_text, 0.999997, "1 − 3e-6"),
    ],
)
def test_one_number(
    function: Callable[[float | None], str], value: float | None, text: str
) -> None:
    assert function(value) == text


@pytest.mark.parametrize(
    ("function", "before", "after", "text"),
    [
        (units.smaller_text, 10, 10, "same"),
        (units.smaller_text, 35, 10, "3.50× smaller"),
        (units.smaller_text, 10, 12, "1.20× larger"),
        (units.smaller_text, 1000, 1001, "+0.1 %"),
        (units.smaller_text, 10, 0, ""),
        (units.change_text, 10, 7, "−30 %"),
        (units.change_text, 100, 102.1, "+2.1 %"),
        (units.change_text, 10_000, 10_004, "+0.04 %"),
        (units.change_text, 0, 3, ""),
        (units.change_text, 3, 3, "same"),
    ],
)
def test_two_numbers(
    function: Callable[[float, float], str], before: float, after: float, text: str
) -> None:
    assert function(before, after) == text


def test_plural() -> None:
    assert units.plural(1, "change") == "1 change"
    assert units.plural(0, "change") == "0 changes"
    assert units.plural(2, "pass") == "2 passes"
