from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.calibration.statistics import Statistic
from onnxcompress.context import PassContext
from onnxcompress.interface import input_specs
from onnxcompress.passes.base import PassReport
from onnxcompress.passes.fp16 import Fp16Options, Fp16Pass, Mode, as_half
from onnxcompress.recipe import Recipe
from onnxcompress.runtime import optimized_graph
from onnxcompress.schedule import plan_schedule
from onnxcompress.targets import target_by_name
from tests.builder import Array, ModelBuilder
from tests.fixtures import FIXTURES, Fixture, fixture
from tests.running import SETTINGS, context, interface, largest_error, run_model

HERE = Path()  # the pass writes no files

STORAGE = Fp16Options(mode=Mode.STORAGE, min_elements=1)
COMPUTE = Fp16Options(mode=Mode.COMPUTE, min_elements=1)


def convert(model: ir.Model, options: Fp16Options, job: PassContext | None = None) -> PassReport:
    return Fp16Pass(options).run(model, job or context(HERE))


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.all_nodes())


def prepared(case: Fixture) -> ir.Model:
    model = case.build()
    model_io.normalize(model)
    return model


def casts(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if node.op_type == "Cast"]


def check_casts(model: ir.Model) -> None:
    """No value is cast twice to the same type, and no added cast reads another."""
    added = [c for c in casts(model) if "/fp16_" in (c.name or "")]
    pairs = [(c.inputs[0], c.attributes["to"].as_int()) for c in added]
    assert len(pairs) == len(set(pairs))
    for cast in added:
        value = cast.inputs[0]
        assert value is not None
        assert value.producer() not in added
        assert value.dtype != cast.outputs[0].dtype


@pytest.mark.parametrize("options", [STORAGE, COMPUTE], ids=["storage", "compute"])
@pytest.mark.parametrize("case", FIXTURES, ids=str)
def test_every_fixture_stays_near_and_keeps_its_interface(
    case: Fixture, options: Fp16Options
) -> None:
    model = prepared(case)
    original = model.clone()
    report = convert(model, options)
    model_io.infer_shapes(model)
    model_io.check(model)
    check_casts(model)
    assert interface(model) == interface(original)
    assert all(v.uses() for v in model.graph.initializers.values() if "fp16" in (v.name or ""))
    names = {n.name for n in original.graph.all_nodes()}
    names |= {v for g in original.graphs() for v in g.initializers}
    assert {c.node for c in report.changes} <= names
    if case.runs:
        feeds = case.feeds(original)
        error = largest_error(run_model(model, feeds), run_model(original, feeds))
        assert error <= (2e-3 if options is STORAGE else 2e-2)


@pytest.mark.parametrize("options", [STORAGE, COMPUTE], ids=["storage", "compute"])
@pytest.mark.parametrize("name", ["mini_transformer", "unet", "tied_weights", "if_model"])
def test_a_plan_changes_nothing_and_tells_what_a_run_does(name: str, options: Fp16Options) -> None:
    model = prepared(fixture(name))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    plan = Fp16Pass(options).plan(model, context(HERE))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert plan == convert(model, options)


# --- storage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["conv_chain", "mini_transformer", "lstm", "tied_weights", "if_model", "loop_model"]
)
def test_stored_weights_are_cast_at_load(name: str, tmp_path: Path) -> None:
    model = prepared(fixture(name))
    before = optimized_graph(model, SETTINGS, tmp_path)
    # Rounded scalars would no longer be those that a fusion (Gelu) looks for.
    report = convert(model, Fp16Options(mode=Mode.STORAGE, min_elements=8))
    after = optimized_graph(model, SETTINGS, tmp_path)
    assert casts(model)
    assert ops(after) == ops(before)
    figures = report.figures
    assert figures["weight_bytes_after"] == pytest.approx(
        float(figures["weight_bytes_before"]) / 2, rel=0.2
    )


def test_a_shared_weight_is_stored_and_cast_once() -> None:
    model = prepared(fixture("tied_weights"))
    report = convert(model, STORAGE)
    assert {c.node for c in report.changes} == {"table", "shared"}
    assert len(casts(model)) == 2


def test_small_weights_are_one_skip_and_stay() -> None:
    model = prepared(fixture("conv_chain"))
    report = convert(model, Fp16Options(mode=Mode.STORAGE))
    (skip,) = report.skips
    assert "min_elements=256" in skip.reason
    assert {c.node for c in report.changes} == {
        v.name.removesuffix("/fp16_weight")
        for v in model.graph.initializers.values()
        if v.name and v.dtype == ir.DataType.FLOAT16
    }


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (np.array([[1.0, 1e6]]), "overflows float16"),
        (np.array([[np.inf, 1.0]]), "not finite"),
        (np.array([[1.0, 1e-12]]), "would become 0"),
        (np.full((64, 64), 3e-7), "too small for float16"),
    ],
)
def test_weights_that_do_not_fit_stay_in_float(weight: Array, reason: str) -> None:
    found = as_half(weight.astype(np.float32))
    assert isinstance(found, str)
    assert reason in found
    b = ModelBuilder("unfit")
    x = b.input("x", ["batch", weight.shape[0]])
    b.output(b.op("MatMul", x, b.constant(weight.astype(np.float32), "w")))
    for options in (STORAGE, COMPUTE):
        model = b.build()
        report = convert(model, options)
        assert any(reason in s.reason for s in report.skips)
        assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT


def test_a_few_tiny_numbers_in_a_large_weight_do_no_harm() -> None:
    weight = np.random.default_rng(0).normal(0, 1, (64, 64)).astype(np.float32)
    weight[0, :5] = 1e-9
    half = as_half(weight)
    assert not isinstance(half, str)
    assert half.dtype == np.float16


# --- computing -----------------------------------------------------------------------------------


def calibrated(model: ir.Model, feeds: dict[str, Array], target: str = "cuda") -> PassContext:
    job = context(HERE, open_dataset(feeds, input_specs(model)))
    return replace(job, target=target_by_name(target))


def test_auto_computes_on_cuda_and_stores_elsewhere() -> None:
    model = prepared(fixture("mlp_gemm"))
    stored, computed = model.clone(), model.clone()
    convert(stored, Fp16Options())
    job = replace(context(HERE), target=target_by_name("cuda"))
    report = convert(computed, Fp16Options(), job)
    assert {n.outputs[0].dtype for n in stored.graph if n.op_type == "Gemm"} == {ir.DataType.FLOAT}
    assert {n.outputs[0].dtype for n in computed.graph if n.op_type == "Gemm"} == {
        ir.DataType.FLOAT16
    }
    assert "not checked for overflow" in report.notes[0]


def test_storage_asks_for_no_calibration() -> None:
    assert Fp16Pass(STORAGE).needs == frozenset()
    assert Fp16Pass().needs == Fp16Pass(COMPUTE).needs == {Statistic.RANGE}


def test_a_chain_has_one_cast_at_each_end() -> None:
    model = prepared(fixture("mlp_gemm"))
    report = convert(model, COMPUTE)
    first, last = casts(model)
    assert first.inputs[0] is model.graph.inputs[0]
    assert last.outputs[0] is model.graph.outputs[0]
    assert report.figures["casts_added"] == 2
    assert report.skips == ()
    weights = {v.dtype for v in model.graph.initializers.values()}
    assert weights <= {ir.DataType.FLOAT16, ir.DataType.INT64}


def test_an_activation_that_overflows_keeps_its_nodes_in_float() -> None:
    b = ModelBuilder("overflow")
    x = b.input("x", ["batch", 8])
    y = b.op("Relu", b.op("MatMul", x, b.weight(8, 8)))
    y = b.op("Mul", y, b.constant(3e4))
    y = b.op("Mul", y, b.constant(1e-3))
    b.output(b.op("Softmax", b.op("MatMul", y, b.weight(8, 4))))
    model = b.build()
    model_io.normalize(model)
    original = model.clone()
    feeds: dict[str, Array] = {
        "x": np.random.default_rng(0).normal(0, 2, (16, 8)).astype(np.float32)
    }
    report = convert(model, COMPUTE, calibrated(model, feeds))
    model_io.check(model)
    check_casts(model)
    assert [s.node for s in report.skips] == ["mul_0", "mul_1"]
    assert all("beyond half of float16's range" in s.reason for s in report.skips)
    error = largest_error(run_model(model, feeds), run_model(original, feeds))
    assert error < 5e-3
    # Without calibration data the overflow is not seen.
    assert convert(original.clone(), COMPUTE).skips == ()


def test_an_infinite_mask_is_no_error_and_stays_in_float() -> None:
    b = ModelBuilder("masked")
    x = b.input("x", ["batch", 8])
    mask = b.op("Log", b.op("Relu", x))
    y = b.op("Softmax", b.op("Add", b.op("MatMul", x, b.weight(8, 8)), mask))
    b.output(b.op("MatMul", y, b.weight(8, 4)))
    model = b.build()
    model_io.normalize(model)
    original = model.clone()
    feeds: dict[str, Array] = {"x": np.array([[-1, 0, 1, 2, 3, 4, 5, 6]], np.float32)}
    report = convert(model, COMPUTE, calibrated(model, feeds))
    assert "reaches inf" in {s.op_type: s.reason for s in report.skips}["Add"]
    assert "MatMul" in {change.op_type for change in report.changes}
    assert largest_error(run_model(model, feeds), run_model(original, feeds)) < 5e-3


def test_islands_share_large_weights_with_the_rest() -> None:
    """The same weight in a half node and in one that overflows is stored once."""
    b = ModelBuilder("shared_island")
    x = b.input("x", ["batch", 32])
    weight = b.weight(32, 32, name="w")
    y = b.op("MatMul", x, weight)
    big = b.op("Mul", x, b.constant(1e5))
    z = b.op("MatMul", big, weight)
    b.output(b.op("Add", y, b.op("Mul", z, b.constant(1e-5))))
    model = b.build()
    model_io.normalize(model)
    original = model.clone()
    feeds: dict[str, Array] = {
        "x": np.random.default_rng(0).normal(0, 1, (4, 32)).astype(np.float32)
    }
    convert(model, COMPUTE, calibrated(model, feeds))
    model_io.check(model)
    check_casts(model)
    assert "w" not in model.graph.initializers
    assert model.graph.initializers["w/fp16_weight"].dtype == ir.DataType.FLOAT16
    assert largest_error(run_model(model, feeds), run_model(original, feeds)) < 5e-3


def test_control_flow_and_quantized_parts_stay_in_float() -> None:
    model = prepared(fixture("if_model"))
    report = convert(model, COMPUTE)
    assert {s.op_type: s.reason for s in report.skips}["If"].startswith("control flow")
    model = prepared(fixture("quantized_qdq"))
    report = convert(model, COMPUTE)
    reasons = {s.op_type: s.reason for s in report.skips}
    assert "already quantized" in reasons["QuantizeLinear"]


def test_a_model_in_half_precision_has_nothing_to_convert() -> None:
    model = prepared(fixture("half_precision"))
    for options in (STORAGE, COMPUTE):
        report = convert(model.clone(), options)
        assert report.changes == ()
        assert report.figures["casts_added"] == 0


@pytest.mark.parametrize(
    ("target", "mode", "needed"),
    [("x86-vnni", "auto", False), ("cuda", "auto", True), ("x86-vnni", "compute", True)],
)
def test_only_computing_in_half_asks_for_calibration(target: str, mode: str, needed: bool) -> None:
    schedule = plan_schedule(Recipe(passes=("fp16",), options={"fp16": {"mode": mode}}))
    assert schedule.needs_calibration(target_by_name(target)) is needed
