"""The time that all searches share."""

from __future__ import annotations

import pytest

from onnxcompress.passes.quant.budget import Budget
from onnxcompress.passes.quant.clock import fine_clock


def _work(seconds: float) -> None:
    """Keep the processor busy."""
    clock = fine_clock()
    stop = clock() + seconds
    while clock() < stop:
        pass


def test_what_one_search_spends_the_next_one_lacks() -> None:
    budget = Budget(0.05)
    with budget.spend(0.6) as seconds:
        assert seconds == pytest.approx(0.03)
        _work(0.03)
    assert budget.spent >= 0.03
    with budget.spend() as seconds:
        assert seconds == pytest.approx(0.05 - budget.spent)
        _work(0.05)
    with budget.spend() as seconds:
        assert seconds == 0.0


def test_time_counts_where_a_search_fails() -> None:
    budget = Budget(1.0)

    def search() -> None:
        _work(0.01)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), budget.spend():
        search()
    assert budget.spent >= 0.01
