"""Mixed precision: which nodes leave 8-bit integers, for which limits, measured where."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcompress import model_io, runtime
from onnxcompress.calibration.sources import Dataset, open_dataset
from onnxcompress.context import PassContext
from onnxcompress.errors import UsageError
from onnxcompress.interface import input_specs
from onnxcompress.passes.base import PassReport
from onnxcompress.passes.quant import QuantOptions, QuantPass, mixed
from onnxcompress.passes.quant.precision import Precision, fallbacks_for
from onnxcompress.pipeline import compress
from onnxcompress.progress import SilentProgress
from onnxcompress.report.json import compression_report, dumps
from onnxcompress.runtime import SessionSettings
from onnxcompress.search.parallel import Backend, Workers, run_tasks
from onnxcompress.targets import target_by_name
from onnxcompress.verification.gates import Gates
from tests.builder import ModelBuilder
from tests.running import context, run_model

WIDTH = 16
DEPTH = 4


def _planted(place: int, *, outlier: float = 12.0, seed: int = 0) -> tuple[ir.Model, Dataset]:
    """A chain of products; the data of number ``place`` hold one large channel that it ignores.

    Its 8-bit steps are too coarse for the other channels then, so it loses most. Each product is
    followed by Tanh, which is no part of any integer region.
    """
    b = ModelBuilder("planted")
    rng = np.random.default_rng(seed)
    x = b.input("x", ["batch", WIDTH])
    value = x
    for number in range(DEPTH):
        weight = (rng.normal(size=(WIDTH, WIDTH)) / 3).astype(np.float32)
        if number == place:
            scale = np.ones(WIDTH, np.float32)
            scale[3], weight[3] = outlier, 0
            value = b.op("Mul", value, b.constant(scale))
        value = b.op("MatMul", value, b.constant(weight))
        if number < DEPTH - 1:
            value = b.op("Tanh", value)
    b.output(value)
    model = b.build()
    model_io.normalize(model)
    samples = rng.normal(size=(48, WIDTH)).astype(np.float32)
    return model, open_dataset({"x": samples}, input_specs(model))


def _job(work_dir: Path, data: Dataset, gates: Gates | float) -> PassContext:
    """A job with limits; a number is the least SQNR."""
    if isinstance(gates, float):
        gates = Gates(min_sqnr_db=gates)
    return dataclasses.replace(context(work_dir, data), goals=gates)


def _options(**values: object) -> QuantOptions:
    # Smoothing would mend what is planted here.
    fixed = {"mode": "static", "objective": "size", "fallback": "float"}
    fixed |= {"ranges": "minmax", "smooth": "off"}
    given_values = {**fixed, **values}
    return QuantOptions.parse(given_values, owner="quant")


def _sqnr_db(model: ir.Model, reference: ir.Model, data: Dataset) -> float:
    signal = noise = 0.0
    for feeds in data.batches(16):
        (wanted,), (got,) = run_model(reference, feeds).values(), run_model(model, feeds).values()
        signal += float((wanted.astype(np.float64) ** 2).sum())
        noise += float(((wanted.astype(np.float64) - got.astype(np.float64)) ** 2).sum())
    return float(10 * np.log10(signal / noise))


def _lifted(report: PassReport) -> set[str]:
    return {skip.node for skip in report.skips if "lifted" in skip.reason}


@given(place=st.integers(0, DEPTH - 1), seed=st.integers(0, 50))
@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_planted_node_is_found_lifted_and_the_goal_holds(
    place: int, seed: int, tmp_path: Path
) -> None:
    model, data = _planted(place, seed=seed)
    reference = model_io.clone(model)
    plain = model_io.clone(model)
    QuantPass(_options()).run(plain, context(tmp_path, data))
    before = _sqnr_db(plain, reference, data)
    goal = before + 3.0
    report = QuantPass(_options()).run(model, _job(tmp_path, data, goal))
    assert _lifted(report) == {f"matmul_{place}"}
    assert _sqnr_db(model, reference, data) >= goal
    (table,) = report.tables
    worst = table.rows[0]
    assert worst[0] == f"matmul_{place}"
    assert worst[-1] == "float"
    assert worst[2] == min(row[2] for row in table.rows)
    assert report.figures["integer_weighted_nodes"] == DEPTH - 1


def test_without_goals_nothing_is_searched_and_the_model_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object) -> None:
        raise AssertionError("versions were measured without a goal")

    monkeypatch.setattr(mixed, "find_aim", never)
    model, data = _planted(1)
    report = QuantPass(_options()).run(model, context(tmp_path, data))
    assert report.tables == ()
    assert report.figures["integer_weighted_nodes"] == DEPTH


def test_goals_that_hold_already_lift_nothing_and_measure_no_node(tmp_path: Path) -> None:
    model, data = _planted(1)
    plain = model_io.clone(model)
    QuantPass(_options()).run(plain, context(tmp_path, data))
    report = QuantPass(_options()).run(model, _job(tmp_path, data, 5.0))
    assert report.tables == ()
    assert ir.to_proto(model) == ir.to_proto(plain)


def test_the_table_comes_without_a_goal_when_asked_for(tmp_path: Path) -> None:
    model, data = _planted(2)
    plain = model_io.clone(model)
    QuantPass(_options()).run(plain, context(tmp_path, data))
    report = QuantPass(_options(sensitivity=True)).run(model, context(tmp_path, data))
    assert ir.to_proto(model) == ir.to_proto(plain)
    (table,) = report.tables
    assert next(row[0] for row in table.rows) == "matmul_2"
    assert len(table.rows) == DEPTH


def test_few_nodes_can_be_asked_for_and_the_report_says_so(tmp_path: Path) -> None:
    model, data = _planted(2)
    options = _options(sensitivity=True, sensitivity_nodes=2)
    report = QuantPass(options).run(model, context(tmp_path, data))
    assert [len(table.rows) for table in report.tables] == [2]
    assert any("Of 4 nodes on integers the sensitivity of 2" in note for note in report.notes)


def test_an_unreachable_goal_leaves_the_model_in_float(tmp_path: Path) -> None:
    model, data = _planted(1)
    before = ir.to_proto(model)
    report = QuantPass(_options()).run(model, _job(tmp_path, data, 150.0))
    assert ir.to_proto(model) == before
    assert any("150" in note for note in report.notes)
    assert report.figures["integer_nodes"] == 0


def test_limits_that_the_given_model_misses_already_lift_nothing(tmp_path: Path) -> None:
    model, data = _planted(1)
    original = tmp_path / "original.onnx"
    other, _ = _planted(1, seed=7)  # as if an earlier pass had changed the weights
    model_io.save(other, original)
    job = dataclasses.replace(_job(tmp_path, data, 30.0), original=original)
    report = QuantPass(_options()).run(model, job)
    assert any("missed before any node is quantized" in note for note in report.notes)
    assert report.figures["integer_weighted_nodes"] == DEPTH


@pytest.mark.parametrize("opset", [17, 21])
def test_int16_keeps_the_size_and_the_goal(opset: int, tmp_path: Path) -> None:
    model, data = _planted(1)
    if opset == 21:
        model_io.normalize(model, min_opset=21)
    reference = model_io.clone(model)
    job = _job(tmp_path, data, 36.0)
    report = QuantPass(_options(fallback="int16,float")).run(model, job)
    assert _sqnr_db(model, reference, data) >= 36.0
    model_io.check(model)
    wide = [
        n for n in model.graph if n.outputs[0].dtype == ir.DataType.UINT16 and "Quant" in n.op_type
    ]
    assert wide
    assert {n.domain for n in wide} == {"" if opset == 21 else "com.microsoft"}
    assert report.figures["integer_weighted_nodes"] == DEPTH  # every weight has 8 bits
    assert any(c.what.startswith("runs on 16-bit") for c in report.changes)
    executed = runtime.optimized_graph(model, SessionSettings(threads=1), tmp_path)
    assert [n.op_type for n in executed.graph].count("MatMul") == 1  # and not one on rounded data


def test_16_bit_weights_of_an_accelerator_stay_a_pattern(tmp_path: Path) -> None:
    model, data = _planted(1)
    job = dataclasses.replace(
        _job(tmp_path, data, 36.0),
        target=target_by_name("qnn"),
        session=SessionSettings(threads=1, emulates=True),
    )
    QuantPass(_options(fallback="int16,float")).run(model, job)
    assert not any(n.op_type == "Cast" for n in model.graph)
    weights = [n.inputs[1] for n in model.graph if n.op_type == "MatMul"]
    dequantized = [n for n in model.graph if n.op_type == "DequantizeLinear"]
    assert set(weights) <= {n.outputs[0] for n in dequantized}


def test_float16_halves_the_weights_of_lifted_nodes(tmp_path: Path) -> None:
    model, data = _planted(1)
    reference = model_io.clone(model)
    job = _job(tmp_path, data, 34.0)
    QuantPass(_options(fallback="float16,float")).run(model, job)
    assert _sqnr_db(model, reference, data) >= 34.0
    model_io.check(model)
    halves = [v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT16]
    assert halves
    assert all(v.shape == ir.Shape([WIDTH, WIDTH]) for v in halves)


def test_whole_models_with_16_bit_activations(tmp_path: Path) -> None:
    model, data = _planted(1)
    reference = model_io.clone(model)
    report = QuantPass(QuantOptions.parse({"activations": "int16"}, owner="quant")).run(
        model, context(tmp_path, data)
    )
    assert _sqnr_db(model, reference, data) > 38  # what rounding the weights costs
    quantized = [n for n in model.graph if n.op_type == "QuantizeLinear"]
    assert quantized
    assert {n.outputs[0].dtype for n in quantized} == {ir.DataType.UINT16}
    assert any("16-bit" in note for note in report.notes)


@pytest.mark.parametrize(
    ("backend", "package"),
    [(Backend.LOKY, "joblib"), (Backend.DASK, "distributed"), (Backend.RAY, "ray")],
)
def test_serial_and_parallel_give_the_same_bits(
    backend: Backend, package: str, tmp_path: Path
) -> None:
    pytest.importorskip(package)
    made = []
    for workers in (Workers(jobs=1), Workers(jobs=2, backend=backend)):
        model, data = _planted(1)
        folder = tmp_path / str(workers.jobs)
        folder.mkdir()
        job = dataclasses.replace(_job(folder, data, 34.0), workers=workers)
        report = QuantPass(_options()).run(model, job)
        figures = {k: v for k, v in report.figures.items() if not k.endswith("seconds")}
        made.append((ir.to_proto(model), report.tables, report.skips, figures))
        assert (folder / "quant-versions" / "kit.pickle").exists() == (workers.jobs == 2)
    assert made[0] == made[1]


def test_a_missing_cluster_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcompress.search.parallel.importlib.import_module", _no_module)
    with pytest.raises(UsageError, match=r"--backend ray needs"):
        run_tasks(
            abs,
            [1, 2],
            Workers(backend=Backend.RAY),
            share=lambda: None,
            progress=SilentProgress(),
            description="",
        )


def _no_module(name: str) -> object:
    raise ImportError(f"No module named '{name}'")


def test_tasks_come_back_in_order_from_other_processes() -> None:
    pytest.importorskip("joblib")
    shared: list[int] = []
    found = run_tasks(
        abs,
        [-3, 2, -1, 0, 5],
        Workers(jobs=2),
        share=lambda: shared.append(1),
        progress=SilentProgress(),
        description="",
    )
    assert found == [3, 2, 1, 0, 5]
    assert shared == [1]


@pytest.mark.parametrize("values", [{"fallback": "int4"}, {"fallback": "auto,float"}])
def test_fallbacks_that_do_not_exist_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="fallback"):
        QuantOptions.parse(values, owner="quant")


def test_on_cpus_speed_falls_back_to_float_alone() -> None:
    vnni, cuda = target_by_name("x86-vnni"), target_by_name("cuda")
    assert fallbacks_for(vnni, for_size=False) == (Precision.FLOAT,)
    assert fallbacks_for(vnni, for_size=True)[0] is Precision.INT16
    assert Precision.INT16 not in fallbacks_for(cuda, for_size=True)


def test_agreement_and_drop_can_be_goals(tmp_path: Path) -> None:
    model, data = _planted(1, outlier=25.0)
    reference = model_io.clone(model)
    feeds = next(data.batches(48))
    (wanted,) = run_model(reference, feeds).values()
    labelled = data.with_labels(wanted.argmax(axis=1))
    plain = model_io.clone(model)
    QuantPass(_options(min_sqnr_db=-20)).run(plain, context(tmp_path, data))
    (rough,) = run_model(plain, feeds).values()
    assert (rough.argmax(axis=1) != wanted.argmax(axis=1)).any()
    for goals in (Gates(max_drop=0.0), Gates(min_agreement=1.0)):
        result = model_io.clone(reference)
        report = QuantPass(_options(min_sqnr_db=-20)).run(result, _job(tmp_path, labelled, goals))
        (got,) = run_model(result, feeds).values()
        assert (got.argmax(axis=1) == wanted.argmax(axis=1)).all()
        assert "matmul_1" in _lifted(report)


def test_the_limits_of_a_run_reach_the_pass_and_the_table_the_report(tmp_path: Path) -> None:
    model, _ = _planted(2)
    path = tmp_path / "model.onnx"
    model_io.save(model, path)
    samples = np.random.default_rng(3).normal(size=(96, WIDTH)).astype(np.float32)
    run = {
        "passes": ["quant"],
        "calib": {"x": samples[:48]},
        "eval": {"x": samples[48:]},
        "options": {"quant": {"objective": "size", "fallback": "float", "smooth": "off"}},
        "measure": False,
        "simplify": False,
        "fold": False,
    }
    plain = compress(path, tmp_path / "plain.onnx", **run)  # type: ignore[arg-type]
    gates = Gates(min_sqnr_db=33.0)
    kept = compress(path, tmp_path / "kept.onnx", gates=gates, **run)  # type: ignore[arg-type]
    assert plain.verification is not None
    assert (plain.verification.comparison.outputs[0].sqnr_db or 0) < 33.0
    assert kept.passed
    report = compression_report(kept)
    (quant,) = (each for each in kept.passes if each.name == "quant")
    assert quant.report.tables[0].columns[0] == "node"
    assert "matmul_2" in dumps(report)
