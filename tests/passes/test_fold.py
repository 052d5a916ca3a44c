from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress import model_io
from onnxcompress.graph.constants import constant_of
from onnxcompress.passes.base import PassReport, Skip
from onnxcompress.passes.fold import FoldOptions, FoldPass
from tests.builder import ModelBuilder
from tests.fixtures import FIXTURES, Fixture, fixture
from tests.running import context, interface, largest_error, run_model

TOLERANCE = {"half_precision": 5e-3}
HERE = Path()  # the pass writes no files


def fold(model: ir.Model, options: FoldOptions | None = None) -> PassReport:
    return FoldPass(options).run(model, context(HERE))


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph.all_nodes()]


def folded(builder: ModelBuilder, *, error: float = 1e-5) -> tuple[ir.Model, PassReport]:
    """Fold the builder's model and check that its outputs stay."""
    model = builder.build()
    case = Fixture(builder.name, builder.build)
    before = run_model(model, case.feeds(model))
    names, boundary = {n.name for n in model.graph}, interface(model)
    report = fold(model)
    model_io.check(model)
    assert interface(model) == boundary
    assert largest_error(run_model(model, case.feeds(model)), before) <= error
    assert {c.node for c in report.changes} <= names
    return model, report


def only_skip(report: PassReport) -> Skip:
    (skip,) = report.skips
    return skip


# --- every fixture -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FIXTURES, ids=str)
def test_outputs_and_interface_of_every_fixture_stay(case: Fixture) -> None:
    model = case.build()
    model_io.normalize(model)
    original = model.clone()
    report = fold(model)
    model_io.check(model)
    assert interface(model) == interface(original)
    assert report.figures["nodes_after"] == len(ops(model)) <= len(ops(original))
    assert len(ops(original)) - len(ops(model)) <= len(report.changes)
    if case.runs:
        feeds = case.feeds(original)
        error = largest_error(run_model(model, feeds), run_model(original, feeds))
        assert error <= TOLERANCE.get(case.name, 1e-5)


@pytest.mark.parametrize("case", FIXTURES, ids=str)
def test_a_plan_tells_what_a_run_does_and_changes_nothing(case: Fixture) -> None:
    model = case.build()
    model_io.normalize(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    plan = FoldPass().plan(model, context(HERE))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert plan == fold(model)


@pytest.mark.parametrize("name", ["residual_bn", "unet", "conv_1d_3d", "half_precision", "opset7"])
def test_every_batch_normalization_behind_a_convolution_goes(name: str) -> None:
    model = fixture(name).build()
    model_io.normalize(model)
    assert "BatchNormalization" in ops(model)
    report = fold(model)
    assert "BatchNormalization" not in ops(model)
    assert report.skips == ()
    # its four parameters went with it
    assert all(value.uses() for value in model.graph.initializers.values())


def test_norm_forms_are_folded_or_refused_with_reasons() -> None:
    model = fixture("norm_forms").build()
    model_io.normalize(model)
    report = fold(model)
    assert Counter(c.op_type for c in report.changes) == {
        "BatchNormalization": 2, "Sub": 1, "Div": 1, "Mul": 2, "Add": 2
    }  # fmt: skip
    reasons = {s.node: s.reason for s in report.skips}
    assert reasons.keys() == {"batchnormalization_1", "batchnormalization_2"}
    assert "pads with zeros" in reasons["batchnormalization_1"]
    assert "several consumers" in reasons["batchnormalization_2"]


# --- random geometries ---------------------------------------------------------------------------


@st.composite
def geometries(draw: st.DrawFn) -> tuple[int, int, int, int, int, int, int, int]:
    """Groups, channels and outputs per group, kernel, stride, pad, dilation, rank."""
    return (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        draw(st.integers(0, 1)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
    )


@settings(max_examples=40, deadline=None)
@given(geometry=geometries(), transposed=st.booleans(), bias=st.booleans(), norm=st.booleans())
def test_any_convolution_takes_what_follows(
    geometry: tuple[int, ...], transposed: bool, bias: bool, norm: bool
) -> None:
    groups, inside, outside, kernel, stride, pad, dilation, rank = geometry
    channels, width = groups * inside, groups * outside
    b = ModelBuilder(f"random{geometry}{transposed}{bias}{norm}")
    x = b.input("x", [2, channels, *[6] * rank])
    shape = (channels, outside) if transposed else (width, inside)
    weights = [b.weight(*shape, *[kernel] * rank)] + ([b.weight(width)] if bias else [])
    y = b.op(
        "ConvTranspose" if transposed else "Conv",
        x,
        *weights,
        group=groups,
        strides=[stride] * rank,
        pads=[min(pad, (kernel - 1) * dilation // 2)] * 2 * rank,
        dilations=[dilation] * rank,
    )
    if norm:
        y = b.batch_norm(y, width)
    else:
        ones = [1] * rank
        y = b.op("Div", b.op("Mul", b.weight(1, width, *ones), y), b.constant(0.7))
        y = b.op("Sub", b.weight(width, *ones), b.op("Add", y, b.weight(width, *ones)))
    b.output(y)
    model, report = folded(b)
    assert ops(model) == ["ConvTranspose" if transposed else "Conv"]
    assert report.skips == ()


@settings(max_examples=20, deadline=None)
@given(
    groups=st.integers(1, 3),
    inside=st.integers(1, 3),
    outside=st.integers(1, 3),
    kernel=st.integers(1, 3),
    bias=st.booleans(),
)
def test_a_normalization_before_an_unpadded_convolution_is_folded(
    groups: int, inside: int, outside: int, kernel: int, bias: bool
) -> None:
    b = ModelBuilder(f"before{groups}{inside}{outside}{kernel}{bias}")
    x = b.batch_norm(b.input("x", [2, groups * inside, 6, 6]), groups * inside)
    width = groups * outside
    b.output(b.conv(x, groups * inside, width, kernel, groups=groups, pad=0, bias=bias))
    model, _ = folded(b)
    assert ops(model) == ["Conv"]


@settings(max_examples=20, deadline=None)
@given(
    transposed=st.booleans(),
    bias=st.sampled_from([None, (), (1,), (5,), (1, 5), (3, 1)]),
    alpha=st.sampled_from([1.0, 0.5]),
    beta=st.sampled_from([1.0, 2.0, 0.0]),
    behind=st.booleans(),
)
def test_gemm_keeps_alpha_beta_and_bias_of_any_shape(
    transposed: bool, bias: tuple[int, ...] | None, alpha: float, beta: float, behind: bool
) -> None:
    b = ModelBuilder(f"gemm{transposed}{bias}{alpha}{beta}")
    x = b.input("x", [3, 4])
    if not behind:
        x = b.batch_norm(x, 4)
    weights = [b.weight(5, 4) if transposed else b.weight(4, 5)]
    if bias is not None:
        weights.append(b.constant(b.rng.normal(size=bias).astype(np.float32)))
    y = b.op("Gemm", x, *weights, alpha=alpha, beta=beta, transB=int(transposed))
    b.output(b.batch_norm(y, 5) if behind else y)
    model, report = folded(b)
    if bias == (3, 1):  # one number per row, which is no channel
        assert len(ops(model)) == 2
        assert "not one number per channel" in only_skip(report).reason
    else:
        assert ops(model) == ["Gemm"]


# --- matrix products -----------------------------------------------------------------------------


def test_a_chain_behind_a_matrix_product_becomes_one_gemm() -> None:
    model = fixture("mlp_matmul").build()
    model_io.normalize(model)
    feeds = fixture("mlp_matmul").feeds(model)
    before = run_model(model, feeds)
    report = fold(model)
    assert ops(model) == ["Gemm", "Relu", "Gemm", "Relu", "Gemm"]
    assert [n.name for n in model.graph if n.op_type == "Gemm"] == [
        "matmul_0",
        "matmul_1",
        "matmul_2",
    ]
    assert len(report.changes) == 7
    assert largest_error(run_model(model, feeds), before) < 1e-5


def test_without_gemm_one_add_remains() -> None:
    model = fixture("mlp_matmul").build()
    fold(model, FoldOptions(gemm=False))
    assert ops(model) == ["MatMul", "Add", "Relu", "MatMul", "Add", "Relu", "MatMul", "Add"]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_matrix_products_of_other_ranks_keep_their_rank(rank: int) -> None:
    b = ModelBuilder(f"rank{rank}")
    x = b.input("x", [3] * (rank - 1) + [4])
    y = b.op("Mul", b.linear(x, 4, 5), b.weight(5, low=0.5))
    b.output(b.op("Sub", y, b.weight(5)))
    model, _ = folded(b)
    assert ops(model) == (["Gemm"] if rank == 2 else ["MatMul", "Add"])


def test_a_pure_factor_leaves_no_add_behind() -> None:
    b = ModelBuilder("factor")
    y = b.op("MatMul", b.input("x", [2, 3, 4]), b.weight(4, 5))
    b.output(b.op("Mul", y, b.constant(0.125)))
    model, _ = folded(b)
    assert ops(model) == ["MatMul"]


def test_the_output_keeps_its_name_and_the_folded_value_its_meaning() -> None:
    b = ModelBuilder("names")
    y = b.batch_norm(b.conv(b.input("x", [1, 3, 5, 5]), 3, 4), 4)
    b.output(b.op("Relu", y))
    model, _ = folded(b)
    conv = model.graph.node(0)
    assert conv.name == "conv_0"
    assert conv.outputs[0].name == "batchnormalization_0_out"
    assert [v.name for v in conv.inputs if v is not None][2] == "conv_0/fold_bias"


# --- refusals ------------------------------------------------------------------------------------


def _conv(b: ModelBuilder) -> str:
    return b.conv(b.input("x", [2, 3, 6, 6]), 3, 4)


def test_an_output_of_the_graph_is_not_folded_away() -> None:
    b = ModelBuilder("output")
    y = _conv(b)
    b.output(y)
    b.output(b.batch_norm(y, 4))
    _, report = folded(b)
    assert "is an output of the graph" in only_skip(report).reason


def test_a_shared_weight_is_not_duplicated() -> None:
    b = ModelBuilder("shared")
    x, weight = b.input("x", [2, 3, 6, 6]), b.weight(4, 3, 1, 1)
    one = b.batch_norm(b.op("Conv", x, weight), 4)
    b.output(b.op("Add", one, b.op("Conv", x, weight)))
    _, report = folded(b)
    assert "other users" in only_skip(report).reason


def test_a_computed_weight_is_not_folded() -> None:
    b = ModelBuilder("computed")
    x, weight = b.input("x", [2, 3, 6, 6]), b.input("w", [4, 3, 1, 1])
    b.output(b.batch_norm(b.op("Conv", x, weight), 4))
    _, report = folded(b)
    assert "the weight of Conv 'conv_0' is not constant" in only_skip(report).reason


def test_computed_statistics_are_not_folded() -> None:
    b = ModelBuilder("statistics")
    y = _conv(b)
    mean = b.input("mean", [4])
    inputs = b.weight(4, low=0.5), b.weight(4), mean, b.weight(4, low=0.5)
    b.output(b.op("BatchNormalization", y, *inputs))
    _, report = folded(b)
    assert only_skip(report).reason == "its mean is not constant"


@pytest.mark.parametrize("shape", [[6], [2, 1, 1, 1], [6, 1], [4, 6, 6], [1, 1, 1, 1, 6]])
def test_a_factor_along_another_axis_is_not_folded(shape: list[int]) -> None:
    b = ModelBuilder(f"axis{shape}")
    b.output(b.op("Mul", _conv(b), b.weight(*shape)))
    _, report = folded(b)
    reason = only_skip(report).reason
    assert "one number per channel" in reason or "more axes" in reason


def test_a_factor_as_long_as_the_last_axis_is_not_taken_for_channels() -> None:
    b = ModelBuilder("square")
    y = b.conv(b.input("x", [2, 3, 4, 4]), 3, 4)
    b.output(b.op("Mul", y, b.weight(4)))
    model, _ = folded(b)
    assert ops(model) == ["Conv", "Mul"]


def test_a_reciprocal_is_not_linear() -> None:
    b = ModelBuilder("reciprocal")
    y = b.op("Add", b.op("Abs", _conv(b)), b.constant(1.0))
    b.output(b.op("Div", b.constant(1.0), b.conv(y, 4, 4, 1)))
    model = b.build()
    assert "not linear" in only_skip(fold(model)).reason


def test_what_leaves_the_range_of_the_type_is_not_folded() -> None:
    b = ModelBuilder("range", dtype=np.float16)
    y = b.op("Mul", _conv(b), b.constant(np.full((4, 1, 1), 6e4, np.float16)))
    y = b.op("Mul", y, b.constant(np.full((4, 1, 1), 6e4, np.float16)))
    b.output(y)
    model = b.build()
    reasons = {s.reason for s in fold(model).skips}
    assert reasons == {"the folded weights are not finite in float16"}
    assert ops(model) == ["Conv", "Mul", "Mul"]


def test_training_mode_is_left_alone() -> None:
    b = ModelBuilder("training")
    parameters = [b.weight(4, low=0.5) for _ in range(4)]
    y = b.ops("BatchNormalization", _conv(b), *parameters, outputs=3, training_mode=1)
    b.output(y[0])
    assert only_skip(fold(b.build())).reason == "it is in training mode"


def test_batch_normalization_of_another_axis_is_not_folded() -> None:
    b = ModelBuilder("tokens")
    y = b.op("MatMul", b.input("x", [2, 5, 4]), b.weight(4, 5))
    b.output(b.batch_norm(y, 5))  # axis 1, which is as long as the channel axis
    _, report = folded(b)
    assert "normalizes axis 1" in only_skip(report).reason


def test_a_normalization_without_neighbours_says_where_it_stands() -> None:
    b = ModelBuilder("alone")
    y = b.op("Relu", b.input("x", [2, 3, 4, 4]))
    b.output(b.op("Relu", b.batch_norm(y, 3)))
    _, report = folded(b)
    assert only_skip(report).reason.startswith("its input comes from Relu 'relu_0'")


def test_before_can_be_switched_off() -> None:
    b = ModelBuilder("off")
    b.output(b.conv(b.batch_norm(b.input("x", [2, 3, 6, 6]), 3), 3, 4, pad=0))
    model = b.build()
    fold(model, FoldOptions(before=False))
    assert ops(model) == ["BatchNormalization", "Conv"]


def test_a_normalization_in_a_branch_does_not_reach_out_of_it() -> None:
    b = ModelBuilder("branch")
    x, flag = b.input("x", [2, 3, 6, 6]), b.input("flag", [], np.bool_)
    y = b.conv(x, 3, 4)
    inner, other = ModelBuilder("branch_then"), ModelBuilder("branch_else")
    inner.share_names(b)
    other.share_names(b)
    branches = {
        "then_branch": b.subgraph("then", inner.batch_norm(y, 4), inner),
        "else_branch": b.subgraph("else", other.conv(x, 3, 4), other),
    }
    b.output(b.op("If", flag, **branches))
    _, report = folded(b)
    assert "subgraph" in only_skip(report).reason


def test_weights_change_in_float64_not_step_by_step() -> None:
    b = ModelBuilder("rounding")
    x = b.input("x", [1, 1, 1, 1])
    y = b.op("Conv", x, b.constant(np.ones((1, 1, 1, 1), np.float32), "w"))
    thirds = [b.constant(np.full((1, 1, 1), v, np.float32)) for v in (1 / 3, 3.0)]
    b.output(b.op("Mul", b.op("Mul", y, thirds[0]), thirds[1]))
    model, _ = folded(b)
    weight = constant_of(model.graph.initializers["w"])
    assert weight is not None
    assert weight.item() == np.float32(np.float64(np.float32(1 / 3)) * 3.0)
