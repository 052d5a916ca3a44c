"""A budget of time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxcompress import model_io
from onnxcompress.errors import UsageError
from onnxcompress.passes.prune import PruneOptions, PrunePass
from onnxcompress.passes.prune.latency import plan_in_time
from tests.builder import ModelBuilder
from tests.running import context

Units = dict[int, np.ndarray[tuple[int], np.dtype[np.int64]]]


def plan(share: float) -> Units:
    return {0: np.arange(round(100 * (1 - share)), dtype=np.int64)}


@pytest.mark.parametrize("kept", [0.9, 0.6, 0.35])
def test_the_plan_keeps_the_time_and_gives_up_little_more(kept: float) -> None:
    """Time = 0.3 that never goes + 0.7 of the MACs."""
    units, reached = plan_in_time(plan, lambda r: 1 - 0.7 * len(r[0]) / 100, kept)
    assert kept - 0.05 <= reached <= kept
    assert reached == pytest.approx(1 - 0.7 * len(units[0]) / 100)


def test_the_fastest_plan_comes_back_where_none_keeps_the_time() -> None:
    units, reached = plan_in_time(plan, lambda r: 1 - 0.2 * len(r[0]) / 100, 0.5)
    assert reached > 0.5
    assert len(units[0]) > 90


def test_a_wide_network_gets_faster(tmp_path: Path) -> None:
    b = ModelBuilder("wide")
    y = b.op("Relu", b.op("Gemm", b.input("x", ["batch", 256]), b.weight(256, 4096)))
    b.output(b.op("Gemm", y, b.weight(4096, 256)))
    model = b.build()
    model_io.normalize(model)
    report = PrunePass(PruneOptions(latency=0.7, align=16)).run(model, context(tmp_path))
    assert any(note.startswith("A run takes 0.") for note in report.notes)
    assert 0.2 < float(report.figures["macs_kept_ratio"]) < 0.95


def test_time_and_another_budget_are_refused() -> None:
    with pytest.raises(UsageError, match="takes one budget, not macs and latency"):
        PrunePass(PruneOptions(latency=0.7, macs=0.5))
