"""Nearest Resize between integer layers moves the integers themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io, runtime
from onnxcompress.calibration.synthetic import synthetic_dataset
from onnxcompress.passes.quant import QuantOptions, QuantPass
from tests.builder import ModelBuilder
from tests.running import SETTINGS, context, largest_error, run_model


def _upsampling(mode: str, size: int = 8, width: int = 8) -> ir.Model:
    b = ModelBuilder(f"resize_{mode}")
    y = b.op("Relu", b.conv(b.input("x", ["n", 3, size, size]), 3, width))
    scales = b.constant(np.array([1, 1, 2, 2], np.float32))
    extra = {"nearest_mode": "floor"} if mode == "nearest" else {}
    y = b.op(
        "Resize", y, "", scales, mode=mode, coordinate_transformation_mode="asymmetric", **extra
    )
    b.output(b.conv(y, width, 4), ["n", 4, 2 * size, 2 * size])
    model = b.build()
    model_io.normalize(model)
    return model


@pytest.mark.parametrize(("mode", "pairs"), [("nearest", 1), ("linear", 2)])
@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_resize_between_convolutions(mode: str, pairs: int, form: str, tmp_path: Path) -> None:
    model = _upsampling(mode)
    reference = model_io.clone(model)
    data = synthetic_dataset(model, samples=8, seed=0)
    options = QuantOptions.parse({"objective": "size", "format": form}, owner="quant")
    QuantPass(options).run(model, context(tmp_path, data))
    found = [node.op_type for node in runtime.optimized_graph(model, SETTINGS).graph]
    assert found.count("QLinearConv") == 2
    assert found.count("QuantizeLinear") == pairs
    feeds = data.first()
    assert largest_error(run_model(model, feeds), run_model(reference, feeds)) < 0.05
