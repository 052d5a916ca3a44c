"""Whole branches go, and the layers before and behind them take over what they did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.passes.base import PassReport
from onnxcompress.passes.prune import PruneOptions, PrunePass
from tests.builder import ModelBuilder
from tests.passes.test_prune import dataset, pruned, samples
from tests.running import context, largest_error, run_model


def linear_branch() -> ir.Model:
    """``tanh(h + B A h)`` for a linear ``h``: what the branch does, the layer before it can do."""
    b = ModelBuilder("linear_branch")
    h = b.gemm(b.input("x", ["batch", 6]), 6, 8)
    inner = b.op("Gemm", h, b.weight(8, 16, name="inner"), b.weight(16))
    b.output(b.op("Tanh", b.op("Add", b.gemm(inner, 16, 8), h)))
    model = b.build()
    model_io.normalize(model)
    return model


def rectified_branch() -> ir.Model:
    """Two residual blocks with Relu; the second is almost linear where its inputs are."""
    b = ModelBuilder("rectified_branch")
    y = b.op("Relu", b.conv(b.input("x", ["batch", 3, 6, 6]), 3, 8))
    for name in ("first", "second"):
        inner = b.op("Conv", y, b.weight(8, 8, 3, 3, name=name), b.weight(8), pads=[1] * 4)
        y = b.op("Relu", b.op("Add", b.conv(b.op("Relu", inner), 8, 8), y))
    b.output(b.gemm(b.op("Flatten", b.op("GlobalAveragePool", y)), 8, 4))
    model = b.build()
    model_io.normalize(model)
    return model


def kinds(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph]


def test_the_layer_before_a_branch_does_its_work(tmp_path: Path) -> None:
    model = linear_branch()
    data, fresh = dataset(model, samples(model, 64)), samples(model, 16, seed=1)
    options = PruneOptions(keep=("inner:0",), rounds=1, align=1)
    result, report = pruned(model, options, tmp_path, data)
    assert kinds(result) == ["Gemm", "Tanh"]
    assert report.figures["units_removed"] == 16
    assert largest_error(run_model(result, fresh), run_model(model, fresh)) < 1e-3


def test_rectified_branches_leave_nothing_behind_and_little_undone(tmp_path: Path) -> None:
    model = rectified_branch()
    data, fresh = dataset(model, samples(model, 64)), samples(model, 16, seed=1)
    options = PruneOptions(keep=("second:0",), rounds=1, align=1)
    result, _ = pruned(model, options, tmp_path, data)
    assert kinds(result).count("Add") == 1
    assert kinds(result).count("Relu") == 3
    blind, _ = pruned(model, replace(options, recover=False), tmp_path, data)
    expected = run_model(model, fresh)
    refitted = largest_error(run_model(result, fresh), expected)
    assert refitted < largest_error(run_model(blind, fresh), expected) / 2


def test_several_rounds_end_at_the_same_place(tmp_path: Path) -> None:
    model = rectified_branch()
    data = dataset(model, samples(model, 64))
    options = PruneOptions(keep=("second:0", "first:0.5"), rounds=3, align=1)
    result, report = pruned(model, options, tmp_path, data)
    assert report.figures["units_removed"] == 12
    assert kinds(result).count("Add") == 1


@pytest.mark.parametrize("recover", [True, False])
def test_branches_stay_where_the_options_say_so(tmp_path: Path, recover: bool) -> None:
    model = rectified_branch()
    data = dataset(model, samples(model, 64))
    tight = PruneOptions(macs=0.4, align=1, include=("first", "second"), recover=recover, plans=1)

    def layers(options: PruneOptions) -> int:
        return kinds(pruned(model, options, tmp_path, data)[0]).count("Conv")

    assert layers(replace(tight, branches=False)) == 5
    assert layers(replace(tight, macs=0.12)) < 5
    assert layers(replace(tight, macs=0.3, limits=("first:0.125", "second:0.125"))) == 5


def test_a_plan_says_that_all_units_may_go(tmp_path: Path) -> None:
    def planned(options: PruneOptions) -> PassReport:
        return PrunePass(options).plan(rectified_branch(), context(tmp_path))

    details = [c.what for c in planned(PruneOptions(align=1)).changes]
    assert any("up to 8 of 8" in d for d in details)
    details = [c.what for c in planned(PruneOptions(align=1, branches=False)).changes]
    assert not any("up to 8 of 8" in d for d in details)


def test_without_data_the_constant_of_a_branch_is_kept(tmp_path: Path) -> None:
    model = rectified_branch()
    options = PruneOptions(keep=("second:0",), rounds=1, align=1)
    result, _ = pruned(model, options, tmp_path)
    assert kinds(result).count("Add") == 2
    fresh = samples(model, 4, seed=1)
    assert np.isfinite(run_model(result, fresh)[model.graph.outputs[0].name or ""]).all()
