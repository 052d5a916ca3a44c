"""Both networks side by side: bias correction and the error of single nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.calibration.statistics import MeanRequest
from onnxcompress.context import PassContext
from onnxcompress.interface import input_specs
from onnxcompress.passes.quant.build import Builder
from onnxcompress.passes.quant.correction import correct_biases, sqnr_db
from onnxcompress.passes.quant.operators import Kind
from onnxcompress.passes.quant.options import QuantOptions
from onnxcompress.runtime import open_session
from tests.builder import ModelBuilder
from tests.running import SETTINGS, context

FloatData = npt.NDArray[np.float32]


@pytest.fixture
def job(tmp_path: Path) -> tuple[Builder, PassContext]:
    """Three depthwise-separable layers whose inputs are far from centred, and their data."""
    b = ModelBuilder("correction")
    y = b.input("x", ["batch", 8, 6, 6])
    for _ in range(3):
        y = b.op("Relu", b.conv(y, 8, 8, groups=8))
        y = b.op("Relu", b.conv(y, 8, 8, 1))
    b.output(b.conv(y, 8, 4, 1))
    model = b.build()
    model_io.normalize(model)
    x = b.rng.normal(1.0, 1.0, size=(64, 8, 6, 6)).astype(np.float32)
    ctx = context(tmp_path, open_dataset({"x": x}, input_specs(model)))
    options = QuantOptions.parse({"ranges": "minmax", "weights": "nearest"}, owner="quant")
    return Builder(model, options, ctx), ctx


def _chosen(builder: Builder) -> frozenset[str]:
    return frozenset(n.name or "" for n in builder.network.of_kind(Kind.WEIGHTED))


def _mean_errors(builder: Builder, ctx: PassContext, *, corrected: bool) -> float:
    """Largest mean error of a channel of the output, relative to the spread of the output."""
    chosen = _chosen(builder)
    builder.measure(chosen)
    built = builder.careful(chosen)
    layers = built.layers
    if not corrected:
        shifts = built.correction.shifts
        layers = {name: layer.shifted(-shifts[name]) for name, layer in layers.items()}
    quantized = builder.write(built.plan, built.affines, layers)
    (name,) = (v.name or "" for v in builder.model.graph.outputs)
    request = MeanRequest(name, 1)
    ours = ctx.collect(quantized.model, [request])[request]
    theirs = ctx.collect(builder.model, [request])[request]
    return float(np.abs(ours.mean - theirs.mean).max() / np.sqrt(theirs.variance.mean()))


def test_correction_brings_the_mean_error_of_each_channel_near_zero(
    job: tuple[Builder, PassContext],
) -> None:
    before = _mean_errors(*job, corrected=False)
    after = _mean_errors(*job, corrected=True)
    assert after < 0.3 * before
    assert after < 5e-3


def test_corrected_biases_leave_nothing_to_correct(job: tuple[Builder, PassContext]) -> None:
    builder, ctx = job
    chosen = _chosen(builder)
    builder.measure(chosen)
    built = builder.careful(chosen)
    quantized = builder.write(built.plan, built.affines, built.layers)
    again = correct_biases(ctx, builder.model, quantized, dict.fromkeys(chosen, 1))
    first = max(float(np.abs(s).max()) for s in built.correction.shifts.values())
    rest = max(float(np.abs(s).max()) for s in again.shifts.values())
    assert rest < 0.3 * first


def test_the_outputs_are_compared_as_they_will_be(job: tuple[Builder, PassContext]) -> None:
    builder, ctx = job
    chosen = _chosen(builder)
    builder.measure(chosen)
    built = builder.careful(chosen)
    quantized = builder.write(built.plan, built.affines, built.layers)
    real = correct_biases(ctx, builder.model, quantized, {})
    assert real.shifts == {}
    assert built.worst_output() == pytest.approx(min(real.output_sqnr_db.values()), abs=1.0)


def test_each_node_alone_is_nearer_than_the_whole(job: tuple[Builder, PassContext]) -> None:
    builder, _ = job
    chosen = _chosen(builder)
    builder.measure(chosen)
    built = builder.careful(chosen)
    alone = builder.check_nodes(built)
    assert set(alone) == chosen
    assert min(alone.values()) > 25
    last = next(reversed(built.plan.nodes))
    assert alone[last] > built.worst_output()


def test_classes_are_compared_by_their_logits(tmp_path: Path) -> None:
    """Probabilities of sure classes hide the noise; what all logits share is none."""
    b = ModelBuilder("classes")
    x = b.input("x", ["batch", 16])
    logits = b.op("Gemm", x, b.constant(10 * b.rng.normal(size=(16, 5)).astype(np.float32)))
    b.output(b.op("Softmax", logits, axis=-1))
    model = b.build()
    model_io.normalize(model)
    data = b.rng.normal(size=(16, 16)).astype(np.float32)
    ctx = context(tmp_path, open_dataset({"x": data}, input_specs(model)))
    options = QuantOptions.parse({"ranges": "minmax", "weights": "nearest"}, owner="quant")
    builder = Builder(model, options, ctx)
    chosen = _chosen(builder)
    builder.measure(chosen)
    built = builder.careful(chosen)
    quantized = builder.write(built.plan, built.affines, built.layers).model
    wanted, found = (_logits(each, data) for each in (model, quantized))
    noise = float(np.square(wanted - found).sum())
    (seen,) = built.correction.logit_sqnr_db.values()
    assert seen == pytest.approx(sqnr_db(float(np.square(wanted).sum()), noise), abs=0.05)
    assert built.correction.rank_db == seen
    assert built.worst_output() != pytest.approx(seen, abs=0.5)


def test_a_softmax_of_constants_has_no_logits(tmp_path: Path) -> None:
    b = ModelBuilder("constant")
    x = b.input("x", ["batch", 4, 6, 6])
    b.output(b.conv(x, 4, 4))
    b.output(b.op("Softmax", b.weight(1, 4), axis=-1))
    model = b.build()
    model_io.normalize(model)
    data = b.rng.normal(size=(8, 4, 6, 6)).astype(np.float32)
    ctx = context(tmp_path, open_dataset({"x": data}, input_specs(model)))
    builder = Builder(model, QuantOptions.parse({"ranges": "minmax"}, owner="quant"), ctx)
    chosen = _chosen(builder)
    builder.measure(chosen)
    correction = builder.careful(chosen).correction
    assert correction.logit_sqnr_db == {}
    assert correction.rank_db == min(correction.output_sqnr_db.values())


def _logits(model: ir.Model, data: FloatData) -> FloatData:
    """What the Softmax reads, without its mean over the classes."""
    copy = model_io.clone(model)
    (softmax,) = (node for node in copy.graph if node.op_type == "Softmax")
    (read,) = softmax.inputs
    assert read is not None
    read.dtype = ir.DataType.FLOAT
    copy.graph.outputs.append(read)
    found = open_session(copy, SETTINGS).run({"x": data})[read.name or ""]
    return np.asarray(found - found.mean(axis=1, keepdims=True), np.float32)


def test_sqnr_of_no_noise_and_of_no_signal() -> None:
    assert sqnr_db(1.0, 0.0) == 200
    assert sqnr_db(0.0, 1.0) == -200
    assert sqnr_db(100.0, 1.0) == pytest.approx(20)
