from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.sources import Dataset, open_dataset
from onnxcompress.calibration.statistics import Statistic
from onnxcompress.errors import UsageError
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.interface import input_specs
from onnxcompress.passes._packing import bits_for, planes, stored_bytes
from onnxcompress.passes.base import PassReport
from onnxcompress.passes.share import (
    Assign,
    Codebook,
    Merge,
    Packing,
    ShareOptions,
    SharePass,
    share_pass,
)
from onnxcompress.runtime import optimized_graph
from tests.builder import Array, ModelBuilder
from tests.fixtures import FIXTURES, Fixture, fixture
from tests.running import SETTINGS, context, interface, largest_error, run_model

HERE = Path()  # the fixture below makes it a temporary folder


@pytest.fixture(autouse=True)
def _in_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat weights that are too small to gain anything, as those of the fixtures are."""
    monkeypatch.setattr(share_pass, "stored_size", lambda *_: 0)


def options(
    *,
    bits: int = 4,
    codebook: Codebook = Codebook.SCALAR,
    group: int = 0,
    scales: bool = True,
    assign: Assign = Assign.NEAREST,
    packing: Packing = Packing.BITS,
    steps: int = 1,
) -> ShareOptions:
    return ShareOptions(
        bits=bits,
        codebook=codebook,
        group=group,
        scales=scales,
        assign=assign,
        packing=packing,
        steps=steps,
        min_elements=16,
    )


def share(model: ir.Model, how: ShareOptions, calibration: Dataset | None = None) -> PassReport:
    return SharePass(how).run(model, context(HERE, calibration))


def prepared(case: Fixture) -> ir.Model:
    model = case.build()
    model_io.normalize(model)
    return model


def rounded(model: ir.Model, count: int) -> None:
    """Leave ``count`` different values in every float weight."""
    for graph in model.graphs():
        for value in list(graph.initializers.values()):
            array: npt.NDArray[np.float32] | None = constant_of(value)  # type: ignore[assignment]
            if array is None or array.dtype != np.float32 or array.ndim < 2:
                continue
            spread = float(np.abs(array).max()) or 1.0
            steps = np.rint((array / spread + 1) / 2 * (count - 1))
            set_initializer(
                graph, value.name or "", (steps / (count - 1) * 2 - 1).astype(np.float32) * spread
            )


def samples(model: ir.Model, case: Fixture, count: int = 16) -> Dataset:
    feeds = case.feeds(model, batch=count)
    return open_dataset(feeds, input_specs(model))


# --- every fixture -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FIXTURES, ids=str)
@pytest.mark.usefixtures("any_size")
def test_every_fixture_runs_and_keeps_its_interface(case: Fixture) -> None:
    model = prepared(case)
    original = model.clone()
    share(model, options(bits=5))
    model_io.infer_shapes(model)
    model_io.check(model)
    assert interface(model) == interface(original)
    assert all(
        value.uses()
        for graph in model.graphs()
        for value in graph.initializers.values()
        if "/share_" in (value.name or "")
    )
    if case.runs:
        feeds = case.feeds(original)
        found, expected = run_model(model, feeds), run_model(original, feeds)
        floats = [n for n, a in expected.items() if a.dtype.kind == "f"]
        error = largest_error({n: found[n] for n in floats}, {n: expected[n] for n in floats})
        assert error <= 0.35


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *[("conv_chain", options(bits=bits)) for bits in range(2, 9)],
        ("conv_chain", options(bits=6, packing=Packing.BYTES)),
        ("conv_chain", options(bits=4, group=3)),
        ("mlp_matmul", options(bits=3, group=5)),
        ("lstm", options(bits=4)),
        ("if_model", options(bits=3)),
        ("loop_model", options(bits=4)),
        ("einsum", options(bits=5)),
        ("tied_weights", options(bits=4)),
        ("opset7", options(bits=3)),
    ],
    ids=lambda v: v if isinstance(v, str) else f"{v.bits}-{v.group}-{v.packing.value}",
)
@pytest.mark.usefixtures("any_size")
def test_as_many_codes_as_values_change_nothing(name: str, how: ShareOptions) -> None:
    case = fixture(name)
    model = prepared(case)
    if any(plane.width == 4 for plane in planes(how.bits)):
        model_io.normalize(model, min_opset=21)  # as the pass does; it changes the last digits
    rounded(model, 1 << how.bits)
    feeds = case.feeds(model)
    expected = run_model(model, feeds)
    report = share(model, how)
    assert report.figures["codebooks"]
    found = run_model(model, feeds)
    for output, array in expected.items():
        np.testing.assert_array_equal(found[output], array)


@pytest.mark.parametrize("name", ["conv_chain", "lstm", "if_model", "loop_model", "tied_weights"])
@pytest.mark.parametrize(
    "how",
    [options(bits=4), options(bits=7, group=4), options(bits=4, codebook=Codebook.VECTOR)],
    ids=["nibbles", "planes", "vectors"],
)
@pytest.mark.usefixtures("any_size")
def test_codebooks_are_computed_at_load(name: str, how: ShareOptions, tmp_path: Path) -> None:
    model = prepared(fixture(name))
    if how.bits == 4:
        model_io.normalize(model, min_opset=21)
    before = operators(optimized_graph(model, SETTINGS, tmp_path))
    report = share(model, how)
    assert report.figures["codebooks"]
    assert operators(optimized_graph(model, SETTINGS, tmp_path)) == before
    assert "expanded when a session is made" in report.notes[-1]


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.all_nodes())


def test_a_plan_changes_nothing() -> None:
    model = prepared(fixture("mini_transformer"))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    plan = SharePass(options()).plan(model, context(HERE))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    report = share(model, options())
    coded = {c.node for c in report.changes if "half precision" not in c.what}  # decided in the run
    assert {c.node for c in plan.changes} == coded
    assert plan.skips == report.skips


# --- with calibration ----------------------------------------------------------------------------


def squares(array: Array, other: Array | None = None) -> float:
    difference = array.astype(np.float64) - (0 if other is None else other.astype(np.float64))
    return float((difference**2).sum())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "name", ["residual_bn", "grouped_shuffle", "mlp_matmul", "lstm", "mini_transformer"]
)
def test_feedback_brings_outputs_nearer(name: str, steps: int) -> None:
    case = fixture(name)
    model = prepared(case)
    data = samples(model, case)
    feeds = case.feeds(model, batch=16)
    expected = run_model(model, feeds)
    errors = []
    for how in (options(bits=3), options(bits=3, assign=Assign.FEEDBACK, steps=steps)):
        copy = model.clone()
        report = share(copy, how, data)
        found = run_model(copy, feeds)
        errors.append(sum(squares(found[n], a) / squares(a) for n, a in expected.items()))
    assert report.figures["assigned_with_feedback"]
    assert errors[1] < 0.7 * errors[0]


def test_only_feedback_needs_calibration() -> None:
    assert SharePass(ShareOptions()).needs == {Statistic.MOMENTS}
    assert not SharePass(ShareOptions(assign=Assign.NEAREST)).needs
    assert not SharePass(ShareOptions(codebook=Codebook.NONE)).needs


def test_biases_take_up_the_mean_error() -> None:
    case = fixture("conv_chain")
    model = prepared(case)
    data = samples(model, case, 64)
    feeds = case.feeds(model, batch=64)
    expected = next(iter(run_model(model, feeds).values())).astype(np.float64)
    means = []
    for bias in (False, True):
        copy = model.clone()
        how = ShareOptions(bits=2, bias=bias, min_elements=64)
        report = SharePass(how).run(copy, context(HERE, data))
        found = next(iter(run_model(copy, feeds).values())).astype(np.float64)
        means.append(float(np.abs((found - expected).mean(axis=0)).max()))
    assert report.figures["biases_corrected"] == 3
    assert means[1] < 0.05 * means[0]


# --- what is stored ------------------------------------------------------------------------------


def test_stored_bytes_are_as_many_bits_as_codes_have() -> None:
    for bits in range(1, 9):
        assert sum(plane.width for plane in planes(bits)) == bits
        assert stored_bytes(800, bits) == 100 * bits
    assert stored_bytes(800, 3, whole_bytes=True) == 800
    assert [bits_for(count) for count in (1, 2, 3, 4, 5, 16, 17, 256)] == [1, 1, 2, 2, 3, 4, 5, 8]


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_file_shrinks_by_the_bits(bits: int, tmp_path: Path) -> None:
    b = ModelBuilder("large_product")
    b.output(b.op("MatMul", b.input("x", [2, 512]), b.weight(512, 300)))
    model = b.build()
    model_io.normalize(model)
    share(model, options(bits=bits, scales=False))
    model_io.save(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").stat().st_size < 512 * 300 * bits / 8 + 2500


@pytest.mark.parametrize(("pool", "opset"), [("AveragePool", 17), ("MaxPool", 21)])
def test_the_opset_is_raised_unless_an_operator_gets_slower(
    pool: str, opset: int, tmp_path: Path
) -> None:
    b = ModelBuilder("pooled", opset=17)
    x = b.conv(b.input("x", [1, 8, 12, 12]), 8, 64)
    b.output(b.op(pool, x, kernel_shape=[2, 2]))
    model = b.build()
    model_io.normalize(model)
    report = share(model, options())
    assert model.opset_imports[""] == opset
    assert any(("The opset stays 17" in note) == (opset == 17) for note in report.notes)
    model_io.save(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").stat().st_size < 8 * 64 * 9 / 2 + 64 * 8 + 2500


def test_names_and_small_tensors_are_left_out_with_reasons() -> None:
    model = prepared(fixture("conv_chain"))
    (name, *_) = [v for v, i in model.graph.initializers.items() if len(i.shape or ()) == 4]
    how = ShareOptions(exclude=(name,), min_elements=200, assign=Assign.NEAREST)
    report = share(model, how)
    reasons = {skip.node: skip.reason for skip in report.skips}
    assert reasons[name] == "excluded by name"
    assert any("fewer than min_elements=200" in reason for reason in reasons.values())
    with pytest.raises(UsageError, match="matches no weight"):
        share(model, ShareOptions(include=("nothing*",)))


def test_options_that_leave_nothing_to_do() -> None:
    with pytest.raises(UsageError, match="leave nothing to do"):
        ShareOptions.parse({"merge": "none", "codebook": "none"}, owner="share")
    assert ShareOptions(merge=Merge.NONE).codebook is Codebook.SCALAR


# --- quantized models ----------------------------------------------------------------------------


def quantized(rows: int = 24, columns: int = 96) -> ir.Model:
    """A product with an int8 weight behind DequantizeLinear."""
    b = ModelBuilder("quantized_product")
    x = b.input("x", [4, columns])
    integers = b.rng.integers(-127, 128, (columns, rows)).astype(np.int8)
    scale = b.rng.uniform(0.01, 0.1, rows).astype(np.float32)
    weight = b.op(
        "DequantizeLinear",
        b.constant(integers, "w"),
        b.constant(scale, "s"),
        b.constant(np.zeros(rows, np.int8), "z"),
        axis=1,
    )
    b.output(b.op("MatMul", x, weight))
    model = b.build()
    model_io.normalize(model)
    return model


def test_integers_stay_integers() -> None:
    model = quantized()
    feeds = {"x": np.random.default_rng(0).normal(size=(4, 96)).astype(np.float32)}
    expected = run_model(model, feeds)
    share(model, options(bits=6))
    dq = next(node for node in model.graph if node.op_type == "DequantizeLinear")
    assert dq.inputs[0] is not None
    assert dq.inputs[0].dtype == ir.DataType.INT8
    levels = model.graph.initializers["w/share_levels"].const_value
    assert levels is not None
    assert levels.numpy().dtype == np.int8
    assert largest_error(run_model(model, feeds), expected) < 0.05


def test_few_integers_are_reproduced() -> None:
    model = quantized()
    array = constant_of(model.graph.initializers["w"])
    assert array is not None
    few: npt.NDArray[np.int8] = (array // 32 * 32).astype(np.int8)
    set_initializer(model.graph, "w", few)
    feeds = {"x": np.random.default_rng(0).normal(size=(4, 96)).astype(np.float32)}
    expected = run_model(model, feeds)
    share(model, options(bits=3))
    np.testing.assert_array_equal(
        next(iter(run_model(model, feeds).values())), next(iter(expected.values()))
    )


def stored_as_eight_bits(how: str) -> ir.Model:
    """A product with an int8 weight that something else than DequantizeLinear reads."""
    b = ModelBuilder(how)
    x = b.input("x", [4, 96])
    integers = b.constant(b.rng.integers(-127, 128, (96, 24)).astype(np.int8), "w")
    scale = b.constant(b.rng.uniform(0.01, 0.1, (1, 24)).astype(np.float32), "s")
    if how == "cast":
        cast = b.op("Cast", integers, to=int(ir.DataType.FLOAT))
        b.output(b.op("MatMul", x, b.op("Mul", cast, scale)))
    else:
        node = b.op("Cast", x, to=int(ir.DataType.INT8))
        sums = b.op("MatMulInteger", node, integers)
        b.output(b.op("Mul", b.op("Cast", sums, to=int(ir.DataType.FLOAT)), scale))
    model = b.build()
    model_io.normalize(model)
    return model


@pytest.mark.parametrize("how", ["cast", "integer"])
def test_integers_of_other_nodes(how: str) -> None:
    model = stored_as_eight_bits(how)
    values = np.random.default_rng(0).normal(size=(4, 96)) * 20
    feeds = {"x": values.astype(np.float32)}
    expected = run_model(model, feeds)
    report = share(model, options(bits=6))
    assert report.figures["codebooks"] == 1
    levels = model.graph.initializers["w/share_levels"].const_value
    assert levels is not None
    assert levels.numpy().dtype == np.int8
    assert largest_error(run_model(model, feeds), expected) < 0.05
    executed = optimized_graph(model, SETTINGS, HERE)
    assert "Gather" not in {node.op_type for node in executed.graph}


@pytest.mark.parametrize("per_gate", [False, True])
@pytest.mark.parametrize("ways", [1, 2])
def test_integers_of_recurrent_layers(ways: int, per_gate: bool) -> None:
    b = ModelBuilder("quantized_lstm", domains={"com.microsoft": 1})
    x, hidden = b.input("x", [5, 2, 48]), 32
    gates = 4 * hidden
    weights, parts = [], []
    for width in (48, hidden):
        integers = b.rng.integers(-127, 128, (ways, width, gates)).astype(np.int8)
        size = (ways, gates) if per_gate else (ways,)
        weights.append(b.constant(integers))
        parts.append(b.constant(b.rng.uniform(0.0005, 0.002, size).astype(np.float32)))
        parts.append(b.constant(np.zeros(size, np.int8)))
    bias = b.weight(ways, 2 * gates, fan_in=16)
    sums = b.op(
        "DynamicQuantizeLSTM", x, *weights, bias, "", "", "", "", *parts,
        domain="com.microsoft", hidden_size=hidden,
        direction="forward" if ways == 1 else "bidirectional",
    )  # fmt: skip
    b.output(sums, [5, ways, 2, hidden])
    model = b.build()
    model_io.normalize(model)
    feeds = {"x": np.random.default_rng(2).normal(size=(5, 2, 48)).astype(np.float32)}
    (expected,) = run_model(model, feeds).values()
    report = share(model, options(bits=6))
    assert len([change for change in report.changes if "6 bits" in change.what]) == 2
    assert any("expanded when a session is made" in note for note in report.notes)
    (found,) = run_model(model, feeds).values()
    assert 0 < squares(found, expected) < 1e-2 * squares(expected)


def test_integers_in_blocks() -> None:
    b = ModelBuilder("blocks", domains={"com.microsoft": 1})
    x = b.input("x", [4, 64])
    codes = b.constant(b.rng.integers(1, 256, (48, 2, 32)).astype(np.uint8), "w")
    scale = b.constant(b.rng.uniform(0.001, 0.002, (48, 2)).astype(np.float32), "s")
    b.output(
        b.op(
            "MatMulNBits", x, codes, scale,
            domain="com.microsoft", K=64, N=48, bits=8, block_size=32,
        ),
        [4, 48],
    )  # fmt: skip
    model = b.build()
    model_io.normalize(model)
    feeds = {"x": np.random.default_rng(2).normal(size=(4, 64)).astype(np.float32)}
    (expected,) = run_model(model, feeds).values()
    report = share(model, options(bits=6))
    assert report.figures["codebooks"] == 1
    (found,) = run_model(model, feeds).values()
    assert 0 < squares(found, expected) < 1e-2 * squares(expected)
    executed = optimized_graph(model, SETTINGS, HERE)
    assert "Gather" not in {node.op_type for node in executed.graph}


def test_without_data_filters_of_depthwise_convolutions_are_left_unless_named() -> None:
    b = ModelBuilder("separable")
    x = b.conv(b.input("x", [1, 64, 8, 8]), 64, 64, groups=64)
    b.output(b.conv(x, 64, 512, 1))
    model = b.build()
    model_io.normalize(model)
    depthwise, pointwise = (n for n in model.graph if n.op_type == "Conv")
    how = ShareOptions(min_elements=256, assign=Assign.NEAREST)
    plan = SharePass(how).plan(model, context(HERE))
    (skip,) = (s for s in plan.skips if "each output is made of 9" in s.reason)
    assert depthwise.inputs[1] is not None
    assert skip.node == depthwise.inputs[1].name
    assert len(plan.changes) == 1
    named = ShareOptions(min_elements=256, include=(depthwise.name or "",))
    (change,) = SharePass(named).plan(model, context(HERE)).changes
    assert change.node in {depthwise.name, depthwise.inputs[1].name}
    assert pointwise.name
