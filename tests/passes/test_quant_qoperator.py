"""The QOperator form computes what the Q/DQ form computes, with the same kernels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io, runtime
from onnxcompress.calibration.synthetic import synthetic_dataset
from onnxcompress.graph.constants import constant_of
from onnxcompress.passes.base import PassReport
from onnxcompress.passes.quant import QuantOptions, QuantPass
from onnxcompress.passes.quant.qoperator import FORMS, write_operators
from onnxcompress.targets import target_by_name
from tests.builder import ModelBuilder
from tests.fixtures import fixture
from tests.running import SETTINGS, context, interface, largest_error, run_model


def _both(name: str, work_dir: Path, **options: object) -> tuple[ir.Model, ir.Model, PassReport]:
    """A fixture as Q/DQ and as QOperator, and the report of the second run."""
    model = fixture(name).build()
    model_io.normalize(model)
    pairs, operators = model_io.clone(model), model_io.clone(model)
    data = synthetic_dataset(model, samples=8, seed=0)
    given = {"objective": "size", "ranges": "minmax", **options}
    for each, form in ((pairs, "qdq"), (operators, "qoperator")):
        parsed = QuantOptions.parse({**given, "format": form}, owner="quant")
        report = QuantPass(parsed).run(each, context(work_dir, data))
    return pairs, operators, report


def _operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def _output_steps(model: ir.Model) -> dict[str, float]:
    """Scale of each output that a DequantizeLinear makes."""
    steps = {}
    for output in model.graph.outputs:
        producer = output.producer()
        if producer is not None and producer.op_type == "DequantizeLinear":
            scale = constant_of(producer.inputs[1])
            assert scale is not None
            steps[output.name or ""] = float(scale)
    return steps


@pytest.mark.parametrize(
    "name",
    [
        "residual_bn",
        "inception_concat",
        "conv_1d_3d",
        "conv_activations",
        "pad_slice_shortcut",
        "primitive_transformer",
        "tied_weights",
    ],
)
def test_operators_compute_what_pairs_compute(name: str, tmp_path: Path) -> None:
    pairs, operators, report = _both(name, tmp_path)
    model_io.check(operators)
    assert interface(operators) == interface(pairs)
    feeds = synthetic_dataset(pairs, samples=8, seed=1).first()
    ours, theirs = run_model(operators, feeds), run_model(pairs, feeds)
    steps = _output_steps(pairs)
    for output, expected in theirs.items():
        allowed = steps.get(output, 1e-6 * float(np.abs(expected).max()))
        difference = ours[output].astype(np.float64) - expected.astype(np.float64)
        assert np.abs(difference).max() <= allowed * 1.001
    # onnxruntime makes the same kernels of both, so neither can be faster.
    executed = [
        sorted(_operators(runtime.optimized_graph(m, SETTINGS))) for m in (operators, pairs)
    ]
    assert executed[0] == executed[1]
    written = int(report.figures["operators_on_integers"])
    assert 0 < written <= int(report.figures["integer_nodes"])
    assert len(operators.graph) < len(pairs.graph)


def test_a_chain_keeps_one_way_in_and_one_way_out(tmp_path: Path) -> None:
    _, operators, _ = _both("conv_chain", tmp_path)
    found = _operators(operators)
    assert found.count("QuantizeLinear") == 1
    assert "DequantizeLinear" not in found  # the last product writes float itself
    assert {"QLinearConv", "QGemm", "MaxPool"} <= set(found)
    pool = next(n for n in operators.graph if n.op_type == "MaxPool")
    assert pool.outputs[0].dtype == ir.DataType.UINT8


def test_names_of_nodes_and_of_integers_stay(tmp_path: Path) -> None:
    pairs, operators, _ = _both("conv_chain", tmp_path)
    before = {node.name for node in pairs.graph}
    assert {node.name for node in operators.graph} <= before
    assert {v.name for n in operators.graph for v in n.outputs} <= {
        v.name for n in pairs.graph for v in n.outputs
    }
    assert set(operators.graph.initializers) < set(pairs.graph.initializers)


def test_sixteen_bit_activations_keep_their_pairs(tmp_path: Path) -> None:
    pairs, operators, report = _both("conv_chain", tmp_path, activations="int16")
    assert report.figures["operators_on_integers"] == 0
    assert sorted(_operators(operators)) == sorted(_operators(pairs))


def test_an_activation_that_is_kept_stays_between_pairs(tmp_path: Path) -> None:
    """With zero points 0 no scale performs a Relu: Conv → Relu → Q has no kernel."""
    model = fixture("conv_chain").build()
    model_io.normalize(model)
    data = synthetic_dataset(model, samples=8, seed=0)
    options = QuantOptions.parse({"objective": "size", "format": "qoperator"}, owner="quant")
    ctx = context(tmp_path, data)
    cuda = dataclasses.replace(ctx, target=target_by_name("cuda"))
    QuantPass(options).run(model, cuda)
    for node in model.graph:
        if node.op_type == "Relu":
            source = node.inputs[0]
            assert source is not None
            maker = source.producer()
            assert maker is not None
            assert not maker.op_type.startswith("QLinear")
    assert run_model(model, data.first())


def _dilated_pool() -> ir.Model:
    b = ModelBuilder("dilated_pool", opset=19)
    y = b.conv(b.input("x", ["N", 3, 12, 12]), 3, 8)
    y = b.op("AveragePool", y, kernel_shape=[2, 2], dilations=[2, 2])
    b.output(b.conv(y, 8, 4), ["N", 4, None, None])
    return b.build()


def test_an_attribute_the_kernel_has_not_keeps_the_pairs(tmp_path: Path) -> None:
    model = _dilated_pool()
    reference = model_io.clone(model)
    data = synthetic_dataset(model, samples=8, seed=0)
    options = QuantOptions.parse({"objective": "size", "format": "qoperator"}, owner="quant")
    QuantPass(options).run(model, context(tmp_path, data))
    assert "QLinearAveragePool" not in _operators(model)
    feeds = data.first()
    assert largest_error(run_model(model, feeds), run_model(reference, feeds)) < 0.05


def test_a_model_without_pairs_is_left_as_it_is() -> None:
    model = fixture("conv_chain").build()
    before = _operators(model)
    names = [n.name or "" for n in model.graph if n.op_type in FORMS]
    assert write_operators(model, names) == tuple(names)
    assert _operators(model) == before
