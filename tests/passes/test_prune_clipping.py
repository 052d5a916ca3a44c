"""Targets in front of an activation."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.numerics.clipping import Bounds, clipped_target
from onnxcompress.passes.prune.clipping import bounds_of
from tests.builder import ModelBuilder


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


@pytest.mark.parametrize("bounds", [Bounds(low=0.0), Bounds(-0.5, 1.0), Bounds(high=0.3)])
def test_the_target_bounds_the_error_behind_the_activation(bounds: Bounds) -> None:
    rng = np.random.default_rng(0)
    y0, y = rng.normal(size=(2, 40, 7))
    t = clipped_target(y0, y, bounds)
    behind = np.clip(y0, bounds.low, bounds.high) - np.clip(y, bounds.low, bounds.high)
    assert np.all(np.abs(behind) <= np.abs(t - y) + 1e-12)
    np.testing.assert_array_equal(
        np.clip(t, bounds.low, bounds.high), np.clip(y0, bounds.low, bounds.high)
    )
    free = ((y0 <= bounds.low) & (y <= bounds.low)) | ((y0 >= bounds.high) & (y >= bounds.high))
    assert free.any()
    np.testing.assert_array_equal(t[free], y[free])
