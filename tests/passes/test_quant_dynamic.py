"""Dynamic forms: what they compute, in which graphs, and what is refused with which reason."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcompress import model_io
from onnxcompress.calibration.sources import Dataset
from onnxcompress.calibration.synthetic import synthetic_dataset
from onnxcompress.errors import UsageError
from onnxcompress.numerics.affine import weight_grid
from onnxcompress.passes.base import PassReport
from onnxcompress.passes.quant import QuantOptions, QuantPass, dynamic, dynamic_rules
from onnxcompress.passes.quant.budget import Budget
from onnxcompress.passes.quant.build import Builder
from onnxcompress.passes.quant.by_clock import ByClock
from onnxcompress.passes.quant.constant_chains import fold_weight_chains
from onnxcompress.passes.quant.dynamic_rules import RULES, Form, forms_of
from onnxcompress.passes.quant.dynamic_write import block_length, write_forms
from onnxcompress.passes.quant.judge import Judge
from onnxcompress.passes.quant.options import Mode, Objective
from onnxcompress.runtime import optimized_graph
from onnxcompress.targets import detect_target, target_by_name
from onnxcompress.verification.gates import Gates
from tests.builder import Array, ModelBuilder
from tests.fixtures import RUNNABLE, Fixture, fixture
from tests.running import SETTINGS, context, interface, run_model

GRID = weight_grid()

# Which fixtures have a node that takes the form.
CONVOLUTIONS = {"conv_1d_3d", "conv_activations", "depthwise_separable", "grouped_shuffle"}
PRODUCTS = {
    "embedding",
    "if_model",
    "loop_model",
    "mini_transformer",
    "mlp_gemm",
    "nhwc_transposes",
    "opset11",
    "squeeze_excite",
    "tied_weights",
}
CASES = [
    (case, form)
    for form, names in (
        (Form.TENSOR, PRODUCTS),
        (Form.BLOCKS, PRODUCTS),
        (Form.CONV, CONVOLUTIONS),
        (Form.LSTM, {"lstm"}),
        (Form.STORED, CONVOLUTIONS | PRODUCTS | {"gru_rnn", "lstm", "stateful_gru"}),
    )
    for case in RUNNABLE
    if case.name in names
]


def allowed(model: ir.Model) -> dict[str, tuple[Form, ...]]:
    """The forms of each node that has any."""
    opset = model.opset_imports.get("", 0)
    return {
        node.name or "": found
        for node in model.graph.all_nodes()
        if node.op_type in RULES and node.domain == ""
        for found in [forms_of(node, opset)]
        if not isinstance(found, str)
    }


def written(model: ir.Model, wanted: Form) -> frozenset[str]:
    """Write ``wanted`` wherever a rule allows it."""
    forms = {name: wanted for name, found in allowed(model).items() if wanted in found}
    done = write_forms(model, forms, GRID)
    model_io.infer_shapes(model)
    model_io.check(model)
    return done


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.all_nodes())


def float_bytes(model: ir.Model) -> int:
    return sum(
        v.const_value.nbytes
        for graph in model.graphs()
        for v in graph.initializers.values()
        if v.const_value is not None and v.const_value.dtype == ir.DataType.FLOAT
    )


@pytest.fixture
def _tiny_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_rules, "MIN_ELEMENTS", 1)


def sqnr_db(found: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """SQNR of the floating-point output that is farthest off."""
    assert list(found) == list(expected)
    worst = np.inf
    for name, wanted in expected.items():
        assert found[name].shape == wanted.shape
        if wanted.dtype == np.float32:
            exact = wanted.astype(np.float64)
            noise = float(np.square(found[name].astype(np.float64) - exact).sum())
            worst = min(worst, 10 * np.log10(np.square(exact).sum() / max(noise, 1e-30)))
    return float(worst)


def normalized(model: ir.Model) -> ir.Model:
    model_io.normalize(model)
    return model


@pytest.mark.usefixtures("_tiny_weights")
@pytest.mark.parametrize(("case", "form"), CASES, ids=str)
def test_every_form_keeps_interface_and_outputs(case: Fixture, form: Form) -> None:
    model = normalized(case.build())
    reference, before = model_io.clone(model), interface(model)
    feeds = case.feeds(reference)
    assert written(model, form)
    assert interface(model) == before
    assert sqnr_db(run_model(model, feeds), run_model(reference, feeds)) > 25
    assert float_bytes(model) < float_bytes(reference)


# --- products ------------------------------------------------------------------------------------


def products() -> ir.Model:
    """Two products of the same data, one with a bias that follows late."""
    b = ModelBuilder("products")
    x = b.input("x", ["batch", 64])
    first = b.op("MatMul", x, b.weight(64, 32, fan_in=64))
    second = b.op("Relu", b.op("MatMul", x, b.weight(64, 32, fan_in=64)))
    biased = b.op("Add", first, b.weight(32, fan_in=4))
    b.output(b.op("Mul", biased, second))
    return normalized(b.build())


def test_data_of_several_products_are_rounded_once() -> None:
    model = products()
    written(model, Form.TENSOR)
    assert ops(model)["DynamicQuantizeLinear"] == 1
    assert ops(optimized_graph(model, SETTINGS))["MatMulIntegerToFloat"] == 2


@pytest.mark.parametrize(
    ("form", "kernel"), [(Form.TENSOR, "DynamicQuantizeMatMul"), (Form.BLOCKS, "MatMulNBits")]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_gemm_becomes_one_kernel_with_its_bias(form: Form, kernel: str, transposed: bool) -> None:
    b = ModelBuilder("gemm")
    x = b.input("x", ["batch", 64])
    weight = b.weight(*((48, 64) if transposed else (64, 48)), fan_in=64)
    b.output(b.op("Gemm", x, weight, b.weight(48, fan_in=4), transB=int(transposed), alpha=0.5))
    model = normalized(b.build())
    reference = model_io.clone(model)
    written(model, form)
    assert [n.op_type for n in optimized_graph(model, SETTINGS).graph] == [kernel]
    feeds = {"x": np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)}
    assert sqnr_db(run_model(model, feeds), run_model(reference, feeds)) > 35


def test_rounding_per_row_does_not_depend_on_the_batch_and_per_tensor_does() -> None:
    feeds = {"x": np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)}
    feeds["x"][3] *= 50
    alone = {"x": feeds["x"][:1]}
    differ = {}
    for form in (Form.TENSOR, Form.BLOCKS):
        model = products()
        written(model, form)
        (together,), (single,) = (
            [np.asarray(y, np.float64) for y in run_model(model, fed).values()]
            for fed in (feeds, alone)
        )
        differ[form] = float(np.abs(together[:1] - single).max())
    assert differ[Form.BLOCKS] < 1e-5 < 1e-2 < differ[Form.TENSOR]


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_a_pointwise_convolution_between_transposes_becomes_a_product(
    rank: int, bias: bool
) -> None:
    axes = rank + 2
    b = ModelBuilder("pointwise")
    x = b.input("x", [2, *[5] * rank, 32])
    first = b.op("Transpose", x, perm=[0, axes - 1, *range(1, axes - 1)])
    y = b.conv(first, 32, 48, kernel=1, rank=rank, bias=bias)
    b.output(b.op("Transpose", y, perm=[0, *range(2, axes), 1]))
    model = normalized(b.build())
    reference = model_io.clone(model)
    written(model, Form.BLOCKS)
    assert ops(model) == {"MatMulNBits": 1}
    feeds = {"x": np.random.default_rng(0).normal(size=(2, *[5] * rank, 32)).astype(np.float32)}
    assert sqnr_db(run_model(model, feeds), run_model(reference, feeds)) > 35


@pytest.mark.parametrize("form", [Form.TENSOR, Form.BLOCKS])
def test_a_convolution_of_one_position_becomes_a_product(form: Form) -> None:
    b = ModelBuilder("one_position")
    x = b.input("x", ["batch", 64, 1, 1])
    b.output(b.conv(x, 64, 32, kernel=1))
    model = normalized(b.build())
    reference = model_io.clone(model)
    written(model, form)
    assert not {"Conv", "ConvInteger"} & set(ops(model))
    feeds = {"x": np.random.default_rng(0).normal(size=(3, 64, 1, 1)).astype(np.float32)}
    assert sqnr_db(run_model(model, feeds), run_model(reference, feeds)) > 35


@given(columns=st.integers(1, 2000))
def test_blocks_waste_little(columns: int) -> None:
    block = block_length(columns)
    stored = -(-columns // block) * (block + 4)
    least = min(-(-columns // b) * (b + 4) for b in (32, 64, 128))
    assert least <= stored <= 1.1 * least


# --- recurrent nodes -----------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("peepholes", [False, True])
def test_an_lstm_keeps_all_its_inputs(direction: str, peepholes: bool) -> None:
    ways = 2 if direction == "bidirectional" else 1
    b = ModelBuilder("whole_lstm")
    x = b.input("x", [7, 3, 20])
    lengths = b.input("lengths", [3], np.int32)
    states = [b.input(name, [ways, 3, 16]) for name in ("h", "c")]
    weights = [b.weight(ways, 64, size, fan_in=size) for size in (20, 16)]
    extra = [b.weight(ways, 48, fan_in=16)] if peepholes else []
    outputs = b.ops(
        "LSTM", x, *weights, b.weight(ways, 128, fan_in=16), lengths, *states, *extra,
        outputs=3, hidden_size=16, direction=direction, clip=4.0,
    )  # fmt: skip
    for output in outputs:
        b.output(output)
    model = normalized(b.build())
    reference, before = model_io.clone(model), interface(model)
    assert written(model, Form.LSTM) == {"lstm_0"}
    assert (ops(model), interface(model)) == ({"DynamicQuantizeLSTM": 1}, before)
    rng = np.random.default_rng(1)
    feeds: dict[str, Array] = {
        "x": rng.normal(size=(7, 3, 20)).astype(np.float32),
        "lengths": np.array([7, 4, 1], np.int32),
        **{name: rng.normal(size=(ways, 3, 16)).astype(np.float32) for name in ("h", "c")},
    }
    assert sqnr_db(run_model(model, feeds), run_model(reference, feeds)) > 30


def reordered_lstm_in_branches() -> ir.Model:
    """Two branches with an LSTM of the same outer weights, whose gates Slice and Concat reorder."""
    b = ModelBuilder("reordered")
    x = b.input("x", [4, 1, 32])
    first = b.input("first", [], np.bool_)
    weight, recurrent = b.weight(64, 32, fan_in=32), b.weight(1, 64, 16, fan_in=16)
    branches = {}
    for name in ("then_branch", "else_branch"):
        inner = ModelBuilder(f"reordered_{name}")
        inner.share_names(b)
        gates = [
            inner.op("Slice", weight, *(inner.constant([n]) for n in (start, start + 16, 0)))
            for start in (48, 0, 16, 32)
        ]
        moved = inner.op("Unsqueeze", inner.op("Concat", *gates, axis=0), inner.constant([0]))
        out = inner.ops("LSTM", x, moved, recurrent, outputs=3, hidden_size=16)[0]
        last = inner.op("Relu" if name == "then_branch" else "Tanh", out)
        branches[name] = b.subgraph(name, last, inner)
    b.output(b.op("If", first, **branches), [4, 1, 1, 16])
    return normalized(b.build())


def test_a_reordered_weight_in_branches_is_found_and_outer_weights_stay_shared() -> None:
    model = reordered_lstm_in_branches()
    reference = model_io.clone(model)
    assert not allowed(model)
    assert len(fold_weight_chains(model)) == 2
    assert len(written(model, Form.LSTM)) == 2
    found = ops(model)
    assert found["DynamicQuantizeLSTM"] == 2
    assert not {"Slice", "Concat", "Unsqueeze"} & set(found)
    shapes = [
        tuple(v.const_value.shape.numpy())
        for graph in model.graphs()
        for v in graph.initializers.values()
        if v.const_value is not None and v.const_value.dtype == ir.DataType.INT8
    ]
    assert shapes.count((1, 16, 64)) == 1  # of the outer graph, read by both
    assert shapes.count((1, 32, 64)) == 2
    x = np.random.default_rng(0).normal(size=(4, 1, 32)).astype(np.float32)
    for first in (False, True):
        feeds: dict[str, Array] = {"x": x, "first": np.array(first)}
        assert sqnr_db(run_model(model, feeds), run_model(reference, feeds)) > 35


@pytest.mark.usefixtures("_tiny_weights")
@pytest.mark.parametrize("name", ["gru_rnn", "if_model", "lstm", "unet"])
def test_stored_weights_leave_the_executed_graph_as_it_is(name: str) -> None:
    model = normalized(fixture(name).build())
    expected = ops(optimized_graph(model, SETTINGS))
    written(model, Form.STORED)
    assert ops(model)["Cast"] > 0
    assert ops(optimized_graph(model, SETTINGS)) == expected


# --- what is refused -----------------------------------------------------------------------------


def refused(b: ModelBuilder, *shape: int | None) -> str:
    b.output(b.nodes[-1].output[0], list(shape) or None)
    model = b.build()
    node = model.graph[-1]
    found = forms_of(node, model.opset_imports[""])
    assert isinstance(found, str)
    return found


def test_reasons() -> None:
    b = ModelBuilder("left")
    b.op("MatMul", b.weight(32, 64), b.input("x", [64, 4]))
    assert "first factor" in refused(b)
    b = ModelBuilder("computed")
    b.op("MatMul", b.input("x", [4, 64]), b.input("y", [64, 4]))
    assert "both factors" in refused(b)
    b = ModelBuilder("small")
    b.op("MatMul", b.input("x", [4, 8]), b.weight(8, 8))
    assert "fewer than 1024" in refused(b)
    b = ModelBuilder("double", dtype=np.float64)
    b.op("MatMul", b.input("x", [4, 64]), b.weight(64, 64))
    assert "DOUBLE" in refused(b)
    b = ModelBuilder("nan")
    b.op("MatMul", b.input("x", [4, 64]), b.constant(np.full((64, 64), np.nan, np.float32)))
    assert "NaN" in refused(b)


def test_old_operator_sets_have_blocks_but_no_rounding_at_run_time() -> None:
    b = ModelBuilder("old", opset=10)
    b.op("MatMul", b.input("x", [4, 64]), b.weight(64, 64))
    b.output(b.nodes[-1].output[0])
    (node,) = b.build().graph
    assert forms_of(node, 10) == (Form.BLOCKS, Form.STORED)
    assert forms_of(node, 11) == (Form.TENSOR, Form.BLOCKS, Form.STORED)


# --- the pass ------------------------------------------------------------------------------------


def quantized(
    model: ir.Model, work_dir: Path, data: Dataset | None, **values: object
) -> PassReport:
    options = QuantOptions.parse(values, owner="quant")
    return QuantPass(options).run(model, context(work_dir, data))


def tagger(hidden: int = 64) -> ir.Model:
    """Steps of an LSTM with a product per step."""
    b = ModelBuilder("tagger")
    x = b.input("x", [10, 1, 32])
    y, _, _ = b.ops(
        "LSTM", x, b.weight(1, 4 * hidden, 32, fan_in=32),
        b.weight(1, 4 * hidden, hidden, fan_in=hidden), outputs=3, hidden_size=hidden,
    )  # fmt: skip
    b.output(b.linear(b.op("Squeeze", y, b.constant([1])), hidden, 48))
    return normalized(b.build())


def test_dynamic_mode_needs_no_data(tmp_path: Path) -> None:
    options = QuantOptions(mode=Mode.DYNAMIC)
    assert QuantPass(options).needs_for(detect_target()) == frozenset()
    model = tagger()
    reference = model_io.clone(model)
    report = quantized(model, tmp_path, None, mode="dynamic", objective="size")
    assert report.figures["dynamic_nodes"] == 2
    assert ops(model)["DynamicQuantizeLSTM"] == 1
    assert not {"LSTM", "MatMul", "QuantizeLinear"} & set(ops(model))
    assert any("batch" in note for note in report.notes)
    feeds = synthetic_dataset(reference, samples=4, seed=3).first()
    assert sqnr_db(run_model(model, feeds), run_model(reference, feeds)) > 30


def test_auto_joins_static_products_and_a_dynamic_lstm(tmp_path: Path) -> None:
    model = tagger()
    data = synthetic_dataset(model, samples=8, seed=0)
    report = quantized(model, tmp_path, data, objective="size")
    found = ops(model)
    assert (found["DynamicQuantizeLSTM"], found["QuantizeLinear"] > 0) == (1, True)
    assert not report.skips
    assert report.figures["integer_nodes"] == 2


def test_static_mode_leaves_an_lstm_and_says_what_would_take_it(tmp_path: Path) -> None:
    model = tagger()
    data = synthetic_dataset(model, samples=8, seed=0)
    report = quantized(model, tmp_path, data, objective="size", mode="static")
    assert ops(model)["LSTM"] == 1
    assert any("dynamic" in skip.reason for skip in report.skips if skip.op_type == "LSTM")


def test_what_ruins_the_outputs_stays_in_float(tmp_path: Path) -> None:
    """One huge weight per row makes 8 bits too coarse for all others."""
    b = ModelBuilder("ruined")
    x = b.input("x", [1, 64])
    spiky = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    spiky[0] = 1e6
    zeroed = b.op("Mul", x, b.constant((np.arange(64) > 0).astype(np.float32)))
    b.output(b.op("MatMul", zeroed, b.constant(spiky)))
    model = normalized(b.build())
    report = quantized(model, tmp_path, None, mode="dynamic", objective="size")
    assert ops(model)["MatMul"] == 1
    assert not report.changes
    assert [skip.op_type for skip in report.skips] == ["MatMul"]


def test_patterns_hold_in_dynamic_mode(tmp_path: Path) -> None:
    model = tagger()
    report = quantized(model, tmp_path, None, mode="dynamic", objective="size", exclude="lstm*")
    assert ops(model)["LSTM"] == 1
    assert {skip.op_type: skip.reason for skip in report.skips} == {"LSTM": "excluded by name"}
    with pytest.raises(UsageError, match="nothing_like_it"):
        quantized(model, tmp_path, None, mode="dynamic", include="nothing_like_it")


def test_other_targets_are_told_that_kernels_are_for_cpus(tmp_path: Path) -> None:
    model = tagger()
    before = ir.to_proto(model)
    ctx = dataclasses.replace(context(tmp_path), target=target_by_name("cuda"))
    report = QuantPass(QuantOptions(mode=Mode.DYNAMIC)).run(model, ctx)
    assert {skip.op_type for skip in report.skips} == {"LSTM", "MatMul"}
    assert ir.to_proto(model) == before


def test_plan_lists_dynamic_candidates(tmp_path: Path) -> None:
    model = tagger()
    report = QuantPass(QuantOptions(mode=Mode.DYNAMIC)).plan(model, context(tmp_path))
    assert {change.op_type for change in report.changes} == {"LSTM", "MatMul"}


@pytest.mark.parametrize("faster", [True, False])
def test_nothing_slower_than_float_is_shipped(
    faster: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A clock that only sees the kernels: dynamic ones are faster, or slower, than float."""

    def times(_: Judge, models: Sequence[ir.Model]) -> list[float]:
        dynamic = {"DynamicQuantizeLinear", "DynamicQuantizeLSTM", "MatMulNBits"}
        slow = 0.5 if faster else 2.0
        return [slow if dynamic & set(ops(model)) else 1.0 for model in models]

    monkeypatch.setattr(Judge, "times", times)
    monkeypatch.setattr(dynamic, "detect_target", lambda: target_by_name("x86-vnni"))
    model = tagger()
    report = quantized(model, tmp_path, None, mode="dynamic")
    assert bool(report.figures["dynamic_nodes"]) is faster
    assert ("LSTM" in ops(model)) is not faster
    assert int(report.figures["stored_nodes"]) == (0 if faster else 2)


@pytest.mark.parametrize("slow", [True, False])
def test_convolutions_are_stored_where_none_runs_on_integers(
    slow: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A clock by which integers do not pay, or do: the first Conv is too small to store."""
    if slow:
        monkeypatch.setattr(ByClock, "not_slower", lambda *_: None)
    else:
        monkeypatch.setattr(ByClock, "not_slower", lambda _, mixed: mixed)
    monkeypatch.setattr(Judge, "times", lambda _, models: [1.0] * len(models))
    monkeypatch.setattr(dynamic, "detect_target", lambda: target_by_name("x86-vnni"))
    b = ModelBuilder("slow")
    value = b.conv(b.input("x", [1, 3, 6, 6]), 3, 16)
    for _ in range(2):
        value = b.conv(b.op("Relu", value), 16, 16)
    b.output(value)
    model = normalized(b.build())
    data = synthetic_dataset(model, samples=8, seed=0)
    feeds = data.first()
    expected = run_model(model, feeds)
    report = quantized(model, tmp_path, data, search_seconds="0.01")
    assert int(report.figures.get("stored_nodes", 0)) == (2 if slow else 0)
    stored = [c.node for c in report.changes if c.what == Form.STORED.value]
    assert len(stored) == (2 if slow else 0)
    for name, array in run_model(model, feeds).items():
        error = np.linalg.norm(array.astype(np.float64) - expected[name].astype(np.float64))
        assert 0 < error < 0.05 * np.linalg.norm(expected[name].astype(np.float64))


@pytest.mark.parametrize(("least", "dynamic_nodes"), [(20.0, 2), (90.0, 0)])
def test_limits_of_the_user_are_kept(least: float, dynamic_nodes: int, tmp_path: Path) -> None:
    model = tagger()
    data = synthetic_dataset(model, samples=8, seed=0)
    ctx = dataclasses.replace(context(tmp_path, data), goals=Gates(min_sqnr_db=least))
    options = QuantOptions.parse({"mode": "dynamic", "objective": "size"}, owner="quant")
    report = QuantPass(options).run(model, ctx)
    assert report.figures.get("dynamic_nodes", 0) == dynamic_nodes
    assert ops(model)["LSTM"] == (0 if dynamic_nodes else 1)


def test_limits_on_decisions_are_kept(tmp_path: Path) -> None:
    model = tagger()
    data = synthetic_dataset(model, samples=8, seed=0)
    ctx = dataclasses.replace(context(tmp_path, data), goals=Gates(min_cosine=0.9999999))
    options = QuantOptions.parse({"mode": "dynamic", "objective": "size"}, owner="quant")
    report = QuantPass(options).run(model, ctx)
    assert not report.changes


def test_embeddings_go_with_dynamic_nodes(tmp_path: Path) -> None:
    b = ModelBuilder("embedded_tagger")
    ids = b.input("ids", [6, 1], np.int64)
    x = b.op("Gather", b.weight(500, 32, fan_in=4), ids)
    y = b.ops(
        "LSTM", x, b.weight(1, 128, 32, fan_in=32), b.weight(1, 128, 32, fan_in=32),
        outputs=3, hidden_size=32,
    )[0]  # fmt: skip
    b.output(y)
    model = normalized(b.build())
    reference = model_io.clone(model)
    report = quantized(model, tmp_path, None, mode="dynamic", objective="size")
    assert {change.op_type for change in report.changes} >= {"Gather", "LSTM"}
    assert float_bytes(model) < float_bytes(reference) / 10
    feeds = synthetic_dataset(reference, samples=4, seed=3).first()
    assert sqnr_db(run_model(model, feeds), run_model(reference, feeds)) > 30


def test_a_static_result_is_made_again_with_fewer_nodes(tmp_path: Path) -> None:
    model = normalized(fixture("residual_bn").build())
    ctx = context(tmp_path, synthetic_dataset(model, samples=8, seed=0))
    quant = QuantPass(QuantOptions(mode=Mode.STATIC, objective=Objective.SIZE))
    static = quant._static(model_io.clone(model), ctx, frozenset(), Budget(0.0))
    assert static.draft is not None
    assert static.again is not None
    name = next(n.name or "" for n in model.graph if n.op_type == "Conv" and n.name in static.nodes)
    again = model_io.clone(model)
    fewer = static.again(again, frozenset([name]))
    assert static.nodes - fewer.nodes >= {name}
    assert fewer.nodes
    feeds = synthetic_dataset(model, samples=4, seed=3).first()
    expected = run_model(model, feeds)
    for result in (again, static.draft(frozenset([name]))):
        node = next(n for n in result.graph if n.name == name)
        assert all(v.is_initializer() for v in node.inputs[1:] if v is not None)
        assert sqnr_db(run_model(result, feeds), expected) > 15


def test_relu_and_moved_values_are_not_measured_twice(tmp_path: Path) -> None:
    b = ModelBuilder("moved")
    x = b.input("x", [1, 3, 8, 8])
    weight = b.constant(np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32))
    made = b.op("Conv", x, weight)
    kept = b.op("Relu", made)
    b.output(b.op("Transpose", kept, perm=[0, 2, 3, 1]))
    model = normalized(b.build())
    ctx = context(tmp_path, synthetic_dataset(model, samples=4, seed=0))
    builder = Builder(model, QuantOptions(), ctx)
    conv, relu, _ = list(model.graph)
    builder.measure(frozenset([conv.name or ""]))
    assert set(builder.measured.ranges) == {
        model.graph.inputs[0].name,
        relu.outputs[0].name,
    }
