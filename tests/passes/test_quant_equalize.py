"""Quantization balances weights across layers where that clearly helps, and only there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.synthetic import synthetic_dataset
from onnxcompress.graph.constants import constant_of
from onnxcompress.passes.base import PassReport
from onnxcompress.passes.quant import QuantOptions, QuantPass
from tests.builder import ModelBuilder
from tests.running import context, largest_error, run_model


def _model(spread: float) -> ir.Model:
    """Two convolutions; the channels between them differ by a factor of ``spread``."""
    b = ModelBuilder("channels")
    x = b.op("Relu", b.conv(b.input("x", ["n", 3, 8, 8]), 3, 8))
    b.output(b.conv(x, 8, 4), ["n", 4, 8, 8])
    model = b.build()
    model_io.normalize(model)
    factors = np.logspace(0, np.log10(spread), 8)
    first, second = (n for n in model.graph if n.op_type == "Conv")
    for value, shape in (
        (first.inputs[1], (8, 1, 1, 1)),
        (first.inputs[2], (8,)),
        (second.inputs[1], (1, 8, 1, 1)),
    ):
        assert value is not None
        array = np.asarray(constant_of(value), np.float64)
        factor = (
            factors.reshape(shape) if value is not second.inputs[1] else 1 / factors.reshape(shape)
        )
        value.const_value = ir.tensor((array * factor).astype(np.float32))
    return model


def _run(model: ir.Model, work_dir: Path, **values: object) -> PassReport:
    options = QuantOptions.parse({"objective": "size", **values}, owner="quant")
    data = synthetic_dataset(model, samples=8, seed=0)
    return QuantPass(options).run(model, context(work_dir, data))


def _error(model: ir.Model, reference: ir.Model) -> float:
    feeds = synthetic_dataset(reference, samples=8, seed=1).first()
    return largest_error(run_model(model, feeds), run_model(reference, feeds))


@pytest.mark.parametrize("per_channel", ["true", "false"])
def test_very_different_channels_are_balanced(per_channel: str, tmp_path: Path) -> None:
    reference = _model(1e6)
    with_it, without = model_io.clone(reference), model_io.clone(reference)
    report = _run(with_it, tmp_path, per_channel=per_channel)
    _run(without, tmp_path, equalize="off", per_channel=per_channel, min_sqnr_db=-100)
    assert float(report.figures["equalization_gain_db"]) > 3
    assert _error(with_it, reference) < 0.05
    assert _error(with_it, reference) < 0.3 * _error(without, reference)


def test_alike_channels_stay_as_they_are(tmp_path: Path) -> None:
    report = _run(_model(2.0), tmp_path)
    assert "equalization_gain_db" not in report.figures
    assert not any("balanced" in change.what for change in report.changes)
