"""Equalization balances weights across layers and never changes what a model computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.synthetic import synthetic_dataset
from onnxcompress.graph.constants import constant_of
from onnxcompress.passes import make_pass
from onnxcompress.passes.base import PassReport
from onnxcompress.passes.equalize import EqualizePass
from tests.builder import ModelBuilder
from tests.fixtures import RUNNABLE, Fixture
from tests.running import context, interface, largest_error, run_model


def _unbalanced() -> ir.Model:
    """Depthwise separable layers whose channels differ by up to a thousand."""
    b = ModelBuilder("unbalanced")
    x = b.op("Relu", b.conv(b.input("x", ["n", 3, 8, 8]), 3, 8))
    x = b.op("Relu", b.conv(x, 8, 8, groups=8))
    b.output(b.conv(x, 8, 4, 1))
    model = b.build()
    model_io.normalize(model)
    for node in model.graph:
        if node.op_type == "Conv" and node.inputs[1] is not None:
            weight = np.array(constant_of(node.inputs[1]))
            spread = np.logspace(-1.5, 1.5, len(weight)).reshape(-1, 1, 1, 1)
            node.inputs[1].const_value = ir.tensor((weight * spread).astype(np.float32))
    return model


def _run(model: ir.Model, work_dir: Path) -> PassReport:
    return EqualizePass().run(model, context(work_dir))


def _channel_ranges(model: ir.Model) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    ranges = []
    for node in model.graph:
        if node.op_type == "Conv":
            weight = np.abs(np.asarray(constant_of(node.inputs[1]), np.float64))
            ranges.append(weight.reshape(len(weight), -1).max(1))
    return ranges


def test_both_sides_of_every_channel_get_the_same_range(tmp_path: Path) -> None:
    model = _unbalanced()
    reference = model_io.clone(model)
    report = _run(model, tmp_path)
    weights = [
        np.abs(np.asarray(constant_of(n.inputs[1]), np.float64))
        for n in model.graph
        if n.op_type == "Conv"
    ]
    first, depthwise, last = weights
    made = first.max(axis=(1, 2, 3))
    np.testing.assert_allclose(made, depthwise.max(axis=(1, 2, 3)), rtol=0.05)
    np.testing.assert_allclose(made, last.max(axis=(0, 2, 3)), rtol=0.05)
    before = _channel_ranges(reference)[1]
    assert made.max() / made.min() < before.max() / before.min() / 3
    assert len(report.changes) == 2
    assert [s.reason for s in report.skips] == [f"'{last_output(model)}' is an output of the model"]
    feeds = synthetic_dataset(reference, samples=2, seed=0).first()
    assert largest_error(run_model(model, feeds), run_model(reference, feeds)) < 1e-5


def last_output(model: ir.Model) -> str:
    return model.graph.outputs[0].name or ""


@pytest.mark.parametrize("case", RUNNABLE, ids=str)
def test_no_model_changes_what_it_computes(case: Fixture, tmp_path: Path) -> None:
    model = case.build()
    model_io.normalize(model)
    reference, before = model_io.clone(model), interface(model)
    plan = EqualizePass().plan(model, context(tmp_path))
    report = _run(model, tmp_path)
    model_io.check(model)
    assert interface(model) == before
    assert plan.skips == report.skips
    assert len(report.changes) <= len(plan.changes)
    feeds = synthetic_dataset(reference, samples=2, seed=0).first()
    tolerance = 1e-2 if case.name == "half_precision" else 1e-4
    assert largest_error(run_model(model, feeds), run_model(reference, feeds)) < tolerance


def test_shared_weights_and_bounds_are_skipped_with_their_reason(tmp_path: Path) -> None:
    b = ModelBuilder("skips")
    x = b.input("x", ["n", 8])
    shared = b.weight(8, 8)
    y = b.op("Relu", b.op("MatMul", x, shared))
    y = b.op("Relu", b.op("MatMul", y, shared))
    low, high = (b.constant(np.array(v, np.float32)) for v in (0.0, 6.0))
    y = b.op("Clip", b.linear(y, 8, 8), low, high)
    b.output(b.linear(y, 8, 3))
    model = b.build()
    model_io.normalize(model)
    reasons = [s.reason for s in _run(model, tmp_path).skips]
    assert any("has other users" in r for r in reasons)
    assert any("bound 6 would have to differ per channel" in r for r in reasons)
    assert all(reasons)


def test_the_pass_is_in_the_table() -> None:
    assert make_pass("equalize", {"rounds": "3"}).options.to_dict() == {
        "rounds": 3,
        "absorb": False,
    }
