"""Quantization lets the channels of activations share their ranges; what is computed stays."""

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
from onnxcompress.passes.quant.channels import choose_factors, equalize_channels
from onnxcompress.passes.quant.operators import Kind
from onnxcompress.passes.quant.placement import Network
from tests.builder import ModelBuilder
from tests.running import context, largest_error, run_model

_SPREAD = np.geomspace(1, 12, 8)


def _model() -> ir.Model:
    """A residual network whose stream has channels from 1 to 12 times as wide as the first."""
    b = ModelBuilder("stream")
    x = b.op("Relu", b.conv(b.input("x", ["n", 3, 8, 8]), 3, 8))
    y = b.conv(b.op("Relu", b.conv(x, 8, 8)), 8, 8)
    y = b.op("Relu", b.op("Add", x, y))
    y = b.op("Concat", y, b.op("Relu", b.conv(y, 8, 4)), axis=1)
    b.output(b.conv(y, 12, 6), ["n", 6, 8, 8])
    model = b.build()
    model_io.normalize(model)
    first, _, third, *_ = (n for n in model.graph if n.op_type == "Conv")
    for node in (first, third):
        for place, shape in ((1, (8, 1, 1, 1)), (2, (8,))):
            value = node.inputs[place]
            array = np.asarray(constant_of(value), np.float64)
            assert value is not None
            value.const_value = ir.tensor((array * _SPREAD.reshape(shape)).astype(np.float32))
    return model


def _sqnr_db(model: ir.Model, reference: ir.Model) -> float:
    feeds = synthetic_dataset(reference, samples=16, seed=1).first()
    wanted, found = (
        np.asarray(next(iter(run_model(m, feeds).values())), np.float64) for m in (reference, model)
    )
    return float(10 * np.log10(np.square(wanted).mean() / np.square(wanted - found).mean()))


def _run(model: ir.Model, work_dir: Path, **values: object) -> PassReport:
    options = QuantOptions.parse({"objective": "size", **values}, owner="quant")
    data = synthetic_dataset(model, samples=16, seed=0)
    return QuantPass(options).run(model, context(work_dir, data))


def test_the_function_stays_and_ranges_are_shared(tmp_path: Path) -> None:
    model = _model()
    reference = model_io.clone(model)
    ctx = context(tmp_path, synthetic_dataset(model, samples=16, seed=0))
    network = Network(model, symmetric=False)
    allowed = frozenset(
        n.name or "" for kind in (Kind.WEIGHTED, Kind.JOINING) for n in network.of_kind(kind)
    )
    choices = choose_factors(ctx, model, network, allowed)
    assert max(c.gain_db for c in choices) > 1
    done = equalize_channels(model, choices)
    assert len(done.changes) == len(choices)
    assert done.values
    feeds = synthetic_dataset(reference, samples=16, seed=1).first()
    assert largest_error(run_model(model, feeds), run_model(reference, feeds)) < 1e-5


def test_integers_lose_less_by_it(tmp_path: Path) -> None:
    reference = _model()
    with_it, without = model_io.clone(reference), model_io.clone(reference)
    report = _run(with_it, tmp_path)
    assert any("share their range" in change.what for change in report.changes)
    _run(without, tmp_path, equalize="off")
    assert _sqnr_db(with_it, reference) > _sqnr_db(without, reference) + 1


@pytest.mark.parametrize("values", [{"equalize": "off"}, {"per_channel": "false"}])
def test_it_is_left_out_where_it_is_unwanted_or_one_scale_serves_all_rows(
    values: dict[str, object], tmp_path: Path
) -> None:
    report = _run(_model(), tmp_path, **values)
    assert not any("share their range" in change.what for change in report.changes)
