"""Where integers go, and the traps of onnxruntime that placement and insertion avoid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io, runtime
from onnxcompress.calibration.synthetic import synthetic_dataset
from onnxcompress.passes.quant.build import Builder
from onnxcompress.passes.quant.operators import Kind
from onnxcompress.passes.quant.options import QuantOptions
from onnxcompress.passes.quant.parameters import Range, make_groups
from onnxcompress.passes.quant.placement import Network, Plan, make_plan, source_points
from onnxcompress.passes.quant.prepare import prepare
from tests.builder import ModelBuilder
from tests.running import SETTINGS, context, largest_error, run_model


def _network(b: ModelBuilder, *, symmetric: bool = False) -> Network:
    model = b.build()
    model_io.normalize(model)
    prepare(model)
    return Network(model, symmetric=symmetric)


def _all(network: Network) -> frozenset[str]:
    return frozenset(
        n.name or "" for kind in (Kind.WEIGHTED, Kind.JOINING) for n in network.of_kind(kind)
    )


def _plan(b: ModelBuilder, *, symmetric: bool = False) -> Plan:
    network = _network(b, symmetric=symmetric)
    return make_plan(network, _all(network))


def _executed(b: ModelBuilder, work_dir: Path, left_out: str = "") -> tuple[ir.Model, ir.Model]:
    """The roughly quantized model without the nodes ``left_out``, and what onnxruntime runs."""
    model = b.build()
    model_io.normalize(model)
    prepare(model)
    ctx = context(work_dir, synthetic_dataset(model, samples=4, seed=0))
    builder = Builder(model, QuantOptions(), ctx)
    chosen = frozenset(n for n in _all(builder.network) if n not in left_out.split())
    builder.measure(chosen)
    _, quantized = builder.rough(chosen)
    return quantized, runtime.optimized_graph(quantized, SETTINGS)


def _kernels(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_relu_becomes_the_scale_of_the_node_before() -> None:
    b = ModelBuilder("relu")
    x = b.input("x", [1, 4, 8, 8])
    b.output(b.op("Relu", b.conv(x, 4, 4)))
    assert _plan(b).folded == {"relu_0": "conv_0"}
    assert _plan(b).points == ("x", "relu_0_out")
    assert _plan(b, symmetric=True).folded == {}
    assert _plan(b, symmetric=True).points == ("x", "relu_0_out")


@pytest.mark.parametrize(("low", "high", "folds"), [(0.0, 6.0, True), (0.5, 6.0, False)])
def test_a_clip_folds_only_around_zero(low: float, high: float, folds: bool) -> None:
    b = ModelBuilder("clip")
    y = b.conv(b.input("x", [1, 4, 8, 8]), 4, 4)
    b.output(b.op("Clip", y, b.constant(low), b.constant(high)))
    assert bool(_plan(b).folded) == folds


def test_an_activation_beside_another_reader_stays() -> None:
    b = ModelBuilder("branch")
    y = b.conv(b.input("x", [1, 4, 8, 8]), 4, 4)
    b.output(b.op("Relu", y))
    b.output(b.op("Sigmoid", y))
    plan = _plan(b)
    assert plan.folded == {}
    assert plan.points == ("x", "conv_0_out")


def test_moving_nodes_run_on_integers_between_integer_nodes_only() -> None:
    b = ModelBuilder("moving")
    y = b.op("MaxPool", b.conv(b.input("x", [1, 4, 8, 8]), 4, 4), kernel_shape=[2, 2])
    y = b.conv(y, 4, 4)
    b.output(b.op("MaxPool", y, kernel_shape=[2, 2]))
    plan = _plan(b)
    assert plan.nodes == ("conv_0", "maxpool_0", "conv_1")
    assert plan.ties["maxpool_0_out"] == plan.ties["conv_0_out"]


def test_a_residual_add_needs_integers_on_both_sides() -> None:
    b = ModelBuilder("residual")
    x = b.input("x", [1, 4, 8, 8])
    y = b.conv(x, 4, 4)
    z = b.op("Add", y, b.conv(y, 4, 4))
    b.output(b.op("Add", z, b.op("Sigmoid", x)))
    assert _plan(b).nodes == ("conv_0", "conv_1", "add_0")


def test_a_pool_at_the_end_stays_float() -> None:
    b = ModelBuilder("pool")
    b.output(b.op("GlobalAveragePool", b.conv(b.input("x", [1, 4, 8, 8]), 4, 4)))
    assert _plan(b).nodes == ("conv_0",)


def test_a_product_before_an_activation_writes_integers() -> None:
    b = ModelBuilder("tail")
    x = b.input("x", ["batch", 8])
    y = b.op("Tanh", b.gemm(x, 8, 8))
    b.output(b.gemm(y, 8, 4))
    assert _plan(b).points == ("x", "gemm_0_out", "tanh_0_out")


def _concat(activation: str) -> ModelBuilder:
    b = ModelBuilder("concat")
    x = b.input("x", [1, 4, 8, 8])
    left, right = b.op("Relu", b.conv(x, 4, 4)), b.op(activation, b.conv(x, 4, 4))
    b.output(b.conv(b.op("Concat", left, right, axis=1), 8, 4))
    return b


@pytest.mark.parametrize(
    ("activation", "right", "groups"),
    [
        ("Relu", (0.0, 3.0), 3),  # one scale around the Concat: it is a copy
        ("Relu", (0.0, 0.1), 5),  # steps would be 40 times coarser
        ("LeakyRelu", (-1.0, 4.0), 6),  # a zero point for -1 would undo the Relu of the left
    ],
)
def test_inputs_of_a_concat_share_a_scale_where_it_costs_little(
    activation: str, right: Range, groups: int
) -> None:
    network = _network(_concat(activation))
    plan = make_plan(network, _all(network))
    ranges = dict.fromkeys(source_points(network, plan), (-1.0, 1.0))
    ranges |= {"relu_0_out": (0.0, 4.0), "concat_0_out": (min(right[0], 0.0), 4.0)}
    ranges["relu_1_out" if activation == "Relu" else "leakyrelu_0_out"] = right
    made = make_groups(network, plan, ranges)
    assert len(made) == groups
    assert sorted(p for g in made for p in g.points) == sorted(plan.points)


def test_integers_do_not_climb_over_a_float_max_pool(tmp_path: Path) -> None:
    b = ModelBuilder("stem")
    y = b.op("Relu", b.conv(b.input("x", [1, 3, 16, 16]), 3, 16))
    b.output(b.conv(b.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2]), 16, 16))
    _, executed = _executed(b, tmp_path, left_out="conv_0")
    order = _kernels(executed)
    assert order.index("MaxPool") < order.index("QuantizeLinear")
    assert order.count("QLinearConv") == 1


def test_a_float_convolution_between_integers_keeps_its_weight(tmp_path: Path) -> None:
    b = ModelBuilder("island")
    x = b.input("x", [1, 16, 8, 8])
    y = b.op("Relu", b.conv(x, 16, 16, 1))
    y = b.op("Relu", b.conv(y, 16, 16, groups=16))
    b.output(b.conv(y, 16, 16, 1))
    quantized, executed = _executed(b, tmp_path, left_out="conv_1")
    assert _kernels(executed).count("QLinearConv") == 2
    feeds = synthetic_dataset(quantized, samples=1, seed=3).first()
    plain = runtime.SessionSettings(threads=1, optimization=runtime.Optimization.NONE)
    expected = runtime.open_session(quantized, plain).run(feeds)
    assert largest_error(run_model(quantized, feeds), expected) < 0.02


def test_a_dropout_between_integers_is_removed(tmp_path: Path) -> None:
    b = ModelBuilder("dropout")
    y = b.conv(b.input("x", [1, 8, 8, 8]), 8, 8)
    b.output(b.conv(b.op("Identity", b.op("Dropout", y)), 8, 8))
    _, executed = _executed(b, tmp_path)
    kernels = _kernels(executed)
    assert [kernels.count(k) for k in ("QLinearConv", "QuantizeLinear", "DequantizeLinear")] == [
        2,
        1,
        1,
    ]


def test_a_padding_runs_on_the_integers(tmp_path: Path) -> None:
    b = ModelBuilder("pad")
    y = b.conv(b.input("x", [1, 8, 8, 8]), 8, 8)
    y = b.op("Pad", y, b.constant([0, 0, 0, 0, 0, 0, 1, 1]))
    b.output(b.conv(y, 8, 8))
    quantized, executed = _executed(b, tmp_path)
    (pad,) = (n for n in quantized.graph if n.op_type == "Pad")
    assert pad.inputs[0] is not None
    assert pad.inputs[0].dtype == ir.DataType.UINT8
    assert _kernels(executed).count("DequantizeLinear") == 1


def test_scales_of_activations_have_rank_0(tmp_path: Path) -> None:
    quantized, _ = _executed(_concat("Relu"), tmp_path)
    for node in quantized.graph:
        if node.op_type == "QuantizeLinear":
            scale = node.inputs[1]
            assert scale is not None
            assert scale.const_value is not None
            assert scale.const_value.numpy().shape == ()


@pytest.mark.parametrize("shape", [[4, 8], [1, 4, 8], [2, 3, 4, 8]])
def test_a_product_and_its_bias_become_a_gemm(shape: list[int]) -> None:
    b = ModelBuilder("bias")
    b.output(b.linear(b.input("x", shape), 8, 6))
    model = b.build()
    model_io.normalize(model)
    reference = model_io.clone(model)
    prepare(model)
    assert "Gemm" in _kernels(model)
    assert not {"MatMul", "Add"} & set(_kernels(model))
    feeds = {"x": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    assert largest_error(run_model(model, feeds), run_model(reference, feeds)) < 1e-5


def test_an_add_takes_a_float_operand_that_is_rounded_for_a_layer_anyway() -> None:
    b = ModelBuilder("stem")
    stem = b.op("Relu", b.conv(b.input("x", [1, 4, 8, 8]), 4, 4))
    y = stem
    for _ in range(2):
        y = b.op("Relu", b.op("Add", b.conv(y, 4, 4), y))
    b.output(b.conv(y, 4, 4))
    network = _network(b)
    plan = make_plan(network, _all(network) - {"conv_0"})
    assert plan.nodes == ("conv_1", "add_0", "conv_2", "add_1", "conv_3")
    # An Add that only the stem and another float layer feed gains nothing on integers.
    alone = make_plan(network, _all(network) - {"conv_0", "conv_1"})
    assert alone.nodes == ("conv_2", "add_1", "conv_3")
