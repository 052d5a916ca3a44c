"""Targets in front of an activation."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.passes.prune.clipping import Bounds, bounds_of, clipped_target
from onnxcompress.passes.prune.consumers import consumer_of
from tests.builder import ModelBuilder
from tests.running import run_model


def layer(activation: str) -> tuple[ir.Model, ir.Node]:
    """``activation(Gemm(x) + s)`` or, for "", the sum itself."""
    b = ModelBuilder("layer")
    y = b.op("Gemm", b.input("x", ["batch", 5]), b.weight(5, 7), b.weight(7))
    y = b.op("Add", y, b.input("s", ["batch", 7]))
    if activation == "Clip":
        low, high = (b.constant(np.array(v, np.float32), n) for v, n in ((-0.5, "l"), (1.0, "h")))
        y = b.op("Clip", y, low, high)
    elif activation:
        y = b.op(activation, y)
    b.output(y)
    model = b.build()
    model_io.normalize(model)
    return model, next(n for n in model.graph if n.op_type == "Gemm")


def total(model: ir.Model) -> ir.Value:
    return next(n for n in model.graph if n.op_type == "Add").outputs[0]


def test_bounds_are_read_from_the_one_activation() -> None:
    assert bounds_of(total(layer("Relu")[0])) == Bounds(low=0.0)
    assert bounds_of(total(layer("Clip")[0])) == Bounds(-0.5, 1.0)
    assert bounds_of(total(layer("Tanh")[0])) is None
    assert bounds_of(total(layer("")[0])) is None


@pytest.mark.parametrize("activation", ["Relu", "Clip"])
def test_the_target_bounds_the_error_behind_the_activation(activation: str) -> None:
    model, node = layer(activation)
    bounds = bounds_of(total(model))
    assert bounds is not None

    def value(name: str, width: int) -> ir.Value:
        kind = ir.TensorType(ir.DataType.FLOAT)
        return ir.Value(name=name, type=kind, shape=ir.Shape(["batch", width]))

    measured, name = clipped_target(
        model,
        consumer_of(node),
        data=value("x", 5),
        original=value("y0", 7),
        shortcut=value("s", 7),
        bounds=bounds,
    )
    target = next(o for n in measured.graph for o in n.outputs if o.name == name)
    now = next(n for n in measured.graph if n.op_type == "Add").outputs[0]
    measured.graph.outputs.clear()
    measured.graph.outputs.extend([target, now])
    rng = np.random.default_rng(0)
    feeds = {n: rng.normal(size=(40, w)).astype(np.float32) for n, w in (("x", 5), ("s", 7))}
    y0 = rng.normal(size=(40, 7)).astype(np.float32)
    found = run_model(measured, {**feeds, "y0": y0})
    t, y = (np.asarray(found[n], np.float64) for n in (name, now.name or ""))
    behind = np.clip(y0, bounds.low, bounds.high) - np.clip(y, bounds.low, bounds.high)
    assert np.all(np.abs(behind) <= np.abs(t - y) + 1e-6)
    np.testing.assert_allclose(
        np.clip(t, bounds.low, bounds.high), np.clip(y0, bounds.low, bounds.high), atol=1e-6
    )
    free = ((y0 <= bounds.low) & (y <= bounds.low)) | ((y0 >= bounds.high) & (y >= bounds.high))
    assert free.any()
    np.testing.assert_allclose(t[free], y[free], atol=1e-6)
