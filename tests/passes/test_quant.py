"""The quantization pass from end to end, over small models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress import model_io, runtime
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.calibration.synthetic import synthetic_dataset
from onnxcompress.errors import DataError, UsageError
from onnxcompress.interface import input_specs
from onnxcompress.passes.base import PassReport
from onnxcompress.passes.quant import QuantOptions, QuantPass
from onnxcompress.passes.quant.build import Builder
from onnxcompress.passes.quant.operators import Kind
from onnxcompress.targets import target_by_name
from tests.builder import ModelBuilder
from tests.fixtures import RUNNABLE, Fixture, fixture
from tests.running import SETTINGS, context, interface, run_model

LEFT_ALONE = {
    "einsum",
    "half_precision",
    "double_precision",
    "quantized_qdq",
}
"""Fixtures without a float32 convolution or matrix product of a constant."""


def _options(**values: object) -> QuantOptions:
    return QuantOptions.parse({"objective": "size", **values}, owner="quant")


def _run(
    model: ir.Model, work_dir: Path, options: QuantOptions | None = None, *, samples: int = 8
) -> PassReport:
    data = synthetic_dataset(model, samples=samples, seed=0)
    return QuantPass(options or _options()).run(model, context(work_dir, data))


def _normalized(name: str) -> ir.Model:
    model = fixture(name).build()
    model_io.normalize(model)
    return model


def _sqnr_db(model: ir.Model, reference: ir.Model, seed: int = 0) -> float:
    feeds = synthetic_dataset(reference, samples=8, seed=seed).first()
    ours, theirs = run_model(model, feeds), run_model(reference, feeds)
    worst = np.inf
    for name, expected in theirs.items():
        if expected.dtype == np.float32:
            wanted = expected.astype(np.float64)
            noise = float(((ours[name].astype(np.float64) - wanted) ** 2).sum())
            signal = float((wanted**2).sum())
            worst = min(worst, 10 * np.log10(signal / max(noise, 1e-30)))
    return float(worst)


def _operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in runtime.optimized_graph(model, SETTINGS).graph]


@pytest.mark.parametrize("case", RUNNABLE, ids=str)
def test_every_model_keeps_its_interface_and_its_outputs(case: Fixture, tmp_path: Path) -> None:
    model = case.build()
    model_io.normalize(model)
    reference, before = model_io.clone(model), interface(model)
    report = _run(model, tmp_path, _options(ranges="minmax"))
    model_io.check(model)
    assert interface(model) == before
    assert _sqnr_db(model, reference) > 25
    integer = int(report.figures["integer_nodes"])
    assert (integer == 0) == (case.name in LEFT_ALONE)
    if integer:
        weights = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT8]
        assert len(weights) >= int(report.figures["integer_weighted_nodes"])
    else:
        assert report.notes
        assert sum(n.op_type == "QuantizeLinear" for n in model.graph) == sum(
            n.op_type == "QuantizeLinear" for n in reference.graph
        )


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("conv_chain", {"QLinearConv": 2, "QGemm": 1, "QuantizeLinear": 1, "DequantizeLinear": 0}),
        ("depthwise_separable", {"QLinearConv": 5, "DequantizeLinear": 0}),
        ("inception_concat", {"QLinearConv": 6, "QLinearConcat": 1, "DequantizeLinear": 1}),
        (
            "pad_slice_shortcut",
            {"QLinearConv": 3, "QLinearAdd": 1, "Pad": 1, "DequantizeLinear": 0},
        ),
        ("mlp_matmul", {"QGemm": 3, "Gemm": 0, "MatMul": 0}),
        ("tied_weights", {"QLinearMatMul": 2}),
        ("stateful_gru", {"QGemm": 1}),
    ],
)
def test_planned_nodes_become_integer_kernels(
    name: str, kernels: dict[str, int], tmp_path: Path
) -> None:
    model = _normalized(name)
    _run(model, tmp_path)
    found = _operators(model)
    assert {kernel: found.count(kernel) for kernel in kernels} == kernels


def test_two_runs_write_the_same_model(tmp_path: Path) -> None:
    first, second = _normalized("depthwise_separable"), _normalized("depthwise_separable")
    _run(first, tmp_path)
    _run(second, tmp_path)
    assert ir.to_proto(first) == ir.to_proto(second)


def test_plan_changes_nothing_and_needs_no_data(tmp_path: Path) -> None:
    model = _normalized("conv_chain")
    before = ir.to_proto(model)
    report = QuantPass().plan(model, context(tmp_path))
    assert {c.op_type for c in report.changes} >= {"Conv", "Gemm"}
    assert ir.to_proto(model) == before


def test_without_calibration_data_it_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="calibration data"):
        QuantPass().run(_normalized("conv_chain"), context(tmp_path))


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"include": "no_such*"}, "no_such"),
        ({"exclude": "no_such*"}, "no_such"),
        ({"op_types": "Convolution"}, "Convolution"),
    ],
)
def test_a_filter_that_matches_nothing_is_an_error(
    values: dict[str, object], word: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=word):
        QuantPass(_options(**values)).plan(_normalized("conv_chain"), context(tmp_path))


def test_filters_choose_nodes_and_give_the_reason(tmp_path: Path) -> None:
    model = _normalized("conv_chain")
    report = _run(model, tmp_path, _options(exclude="conv_0", op_types="Conv"))
    skips = {s.node: s.reason for s in report.skips}
    assert skips["conv_0"] == "excluded by name" or "op_types" in skips["conv_0"]
    assert any(s.op_type == "Gemm" and "op_types" in s.reason for s in report.skips)
    assert _operators(model).count("QLinearConv") == 1


def test_each_unquantized_product_has_a_reason(tmp_path: Path) -> None:
    for name in ("mini_transformer", "if_model", "lstm", "einsum", "half_precision"):
        model = _normalized(name)
        products = {
            node.name
            for node in model.graph.all_nodes()
            if node.op_type in {"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "Einsum"}
        }
        report = _run(model, tmp_path)
        told = {s.node for s in report.skips} | {c.node for c in report.changes}
        assert products <= told


def test_an_old_operator_set_is_left_alone(tmp_path: Path) -> None:
    model = fixture("opset11").build()
    before = ir.to_proto(model)
    report = _run(model, tmp_path)
    assert all("operator set is 11" in s.reason for s in report.skips)
    assert ir.to_proto(model) == before


def _with_outlier_channel() -> tuple[ir.Model, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """A matrix product whose data hold one channel a thousand times the others, cancelled later."""
    b = ModelBuilder("outlier")
    x = b.input("x", ["batch", 16])
    scale = np.ones(16, np.float32)
    scale[3] = 3e4
    weight = b.rng.normal(size=(16, 8)).astype(np.float32)
    weight[3] = 0
    y = b.op("MatMul", b.op("Mul", x, b.constant(scale)), b.constant(weight))
    b.output(b.gemm(b.op("Tanh", y), 8, 4))
    return b.build(), b.rng.normal(size=(32, 16)).astype(np.float32)


def test_a_node_that_cannot_keep_its_output_goes_back_to_float(tmp_path: Path) -> None:
    model, x = _with_outlier_channel()
    model_io.normalize(model)
    data = open_dataset({"x": x}, input_specs(model))
    report = QuantPass(_options(smooth="off")).run(model, context(tmp_path, data))
    (skip,) = (s for s in report.skips if s.op_type == "MatMul")
    assert "dB" in skip.reason
    assert report.figures["integer_weighted_nodes"] == 1


def test_a_model_whose_outputs_are_lost_stays_float(tmp_path: Path) -> None:
    model = _normalized("conv_chain")
    before = ir.to_proto(model)
    report = _run(model, tmp_path, _options(min_sqnr_db=150))
    assert report.figures["integer_nodes"] == 0
    assert any("left as it is" in note for note in report.notes)
    assert ir.to_proto(model) == before


@pytest.mark.parametrize(
    "name", ["arm64", "cuda", "x86-avx2", "tensorrt", "qnn", "openvino", "mobile"]
)
def test_other_targets_get_their_types(name: str, tmp_path: Path) -> None:
    model = _normalized("conv_chain")
    reference = model_io.clone(model)
    target = target_by_name(name)
    ctx = context(tmp_path, synthetic_dataset(model, samples=8, seed=0))
    ctx = type(ctx)(target=target, work_dir=tmp_path, calibration=ctx.calibration, session=SETTINGS)
    QuantPass(QuantOptions(search_seconds=0)).run(model, ctx)
    points = [n for n in model.graph if n.op_type == "QuantizeLinear"]
    zeros = {n.inputs[2].const_value.numpy().item() for n in points if n.inputs[2] is not None}  # type: ignore[union-attr]
    assert {str(n.outputs[0].dtype).lower() for n in points} == {target.activation_dtype}
    if target.symmetric_activations:
        assert zeros == {0}
    else:
        assert _operators(model).count("QLinearConv") == 2
    integers = [
        v.const_value.numpy()
        for v in model.graph.initializers.values()
        if v.dtype == ir.DataType.INT8 and v.const_value
    ]
    top = max(int(np.abs(a.astype(int)).max()) for a in integers if a.ndim > 1)
    assert top == (64 if target.reduce_range else 127)
    assert _sqnr_db(model, reference) > 25


@pytest.mark.parametrize("ranges", ["moving_average", "entropy", "percentile", "mse"])
def test_every_way_to_choose_ranges_keeps_the_outputs(ranges: str, tmp_path: Path) -> None:
    model = _normalized("residual_bn")
    reference = model_io.clone(model)
    report = _run(model, tmp_path, _options(ranges=ranges))
    assert report.figures["ranges"] == ranges
    assert report.figures["integer_nodes"] != 0
    assert _sqnr_db(model, reference) > 20


@pytest.mark.parametrize("name", ["residual_bn", "depthwise_separable"])
def test_scales_are_powers_of_two_where_asked_for(name: str, tmp_path: Path) -> None:
    model = _normalized(name)
    reference = model_io.clone(model)
    report = _run(model, tmp_path, _options(scales="power_of_two"))
    scales = [
        n.inputs[1].const_value.numpy()  # type: ignore[union-attr]
        for n in model.graph
        if n.op_type in {"QuantizeLinear", "DequantizeLinear"}
    ]
    assert scales
    assert all((np.frexp(scale)[0] == 0.5).all() for scale in scales)
    assert any("Q" in change.what for change in report.changes)
    assert _sqnr_db(model, reference) > 18


def test_automatic_padding_is_rounded_with_error_feedback(tmp_path: Path) -> None:
    b = ModelBuilder("same")
    x = b.input("x", ["batch", 4, 9, 9])
    y = b.op("Conv", x, b.weight(8, 4, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2])
    b.output(b.op("Relu", y))
    model = b.build()
    model_io.normalize(model)
    reference = model_io.clone(model)
    report = _run(model, tmp_path, _options(weights="gptq"))
    (conv,) = [c for c in report.changes if c.op_type == "Conv"]
    assert "error feedback" in conv.what
    assert _sqnr_db(model, reference) > 30


def test_on_phones_a_pool_has_the_scale_of_its_input(tmp_path: Path) -> None:
    scales = {}
    for name in ("mobile", "arm64"):
        b = ModelBuilder("pools")
        y = b.op("Relu", b.conv(b.input("x", ["batch", 4, 8, 8]), 4, 8))
        y = b.op("AveragePool", y, kernel_shape=[2, 2], strides=[2, 2])
        b.output(b.conv(y, 8, 4))
        model = b.build()
        model_io.normalize(model)
        data = synthetic_dataset(model, samples=8, seed=0)
        job = context(tmp_path, data)
        job = dataclasses.replace(job, target=target_by_name(name))
        QuantPass(QuantOptions.parse({"objective": "size"}, owner="quant")).run(model, job)
        pool = next(n for n in model.graph if n.op_type == "AveragePool")
        before, after = pool.inputs[0].producer(), next(iter(pool.outputs[0].uses())).node  # type: ignore[union-attr]
        scales[name] = [float(n.inputs[1].const_value.numpy()) for n in (before, after)]  # type: ignore[union-attr]
    assert scales["mobile"][0] == scales["mobile"][1]
    assert scales["arm64"][0] != scales["arm64"][1]


def test_a_weight_that_is_also_an_output_of_the_model_stays_one(tmp_path: Path) -> None:
    model = _normalized("mlp_gemm")
    weight = next(v for n in model.graph if n.op_type == "Gemm" for v in n.inputs[1:2] if v)
    model.graph.outputs.append(weight)
    reference, before = model_io.clone(model), interface(model)
    _run(model, tmp_path, _options(ranges="minmax"))
    assert interface(model) == before
    assert _sqnr_db(model, reference) > 25


MASKED = """
    [query] q = MatMul(x, w)
    [row] m = Where(below, zero, nothing)
    [mask] u = Unsqueeze(m, axes)
    [scores] s = Add(q, u)
    [soft] p = Softmax(s)
    y = MatMul(p, v)
"""


def test_infinite_masks_stay_in_float(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> '
        f"g (float[N, 8, 64] x) => (float[N, 8, 64] y) {{ {MASKED} }}"
    )
    for name, array in {
        "w": rng.standard_normal((64, 64)).astype(np.float32) / 8,
        "v": rng.standard_normal((64, 64)).astype(np.float32) / 8,
        "below": np.arange(64) % 3 > 0,
        "zero": np.zeros((8, 64), np.float32),
        "nothing": np.array(-np.inf, np.float32),
        "axes": np.array([0]),
    }.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.from_proto(proto)
    model_io.normalize(model)
    original = model_io.clone(model)
    report = _run(model, tmp_path)
    reasons = {skip.node: skip.reason for skip in report.skips}
    assert "infinite" in reasons["scores"]
    assert {"query"} <= {change.node for change in report.changes}
    assert _sqnr_db(model, original) > 20


def test_adaptive_rounding_is_reported_and_keeps_the_outputs(tmp_path: Path) -> None:
    model = _normalized("conv_chain")
    reference = model_io.clone(model)
    report = _run(model, tmp_path, _options(weights="adaptive"))
    assert sum("weights rounded adaptively" in change.what for change in report.changes) == 3
    assert _sqnr_db(model, reference) > 25


def test_what_is_measured_does_not_depend_on_the_order_of_a_set(tmp_path: Path) -> None:
    """Rows of data are drawn in the order of what is measured."""
    orders = set()
    for prefix in "abcd":
        model = _normalized("residual_bn")
        for node in model.graph:
            node.name = f"{prefix}{node.name}"
        data = synthetic_dataset(model, samples=2, seed=0)
        builder = Builder(model, _options(), context(tmp_path, data))
        kinds = (Kind.WEIGHTED, Kind.JOINING)
        names = (n.name or "" for kind in kinds for n in builder.network.of_kind(kind))
        builder.measure(frozenset(names))
        orders.add(tuple(builder.measured.ranges))
    assert len(orders) == 1
