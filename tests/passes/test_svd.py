"""The factorization pass: budgets, whitening, recovery, options and every fixture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.dataset import Dataset
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.errors import PassError, UsageError
from onnxcompress.graph.cost import cost_of
from onnxcompress.interface import input_specs
from onnxcompress.passes.base import PassReport
from onnxcompress.passes.svd import Objective, SvdOptions, SvdPass
from onnxcompress.passes.svd.planning import Planner
from tests.builder import Array, ModelBuilder
from tests.fixtures import RUNNABLE, Fixture, fixture
from tests.running import context, interface, largest_error, run_model

QUICK = (
    "grouped_shuffle",
    "conv_1d_3d",
    "super_resolution",
    "mlp_matmul",
    "mini_transformer",
    "embedding",
    "tied_weights",
    "lstm",
    "half_precision",
    "double_precision",
)
"""Fixtures for the test with data and recovery: one of each kind, to stay quick."""

PLAIN = SvdOptions(align=1, whiten=False, recover=False)


def normalized(model: ir.Model) -> ir.Model:
    model_io.normalize(model)
    return model


def dataset(model: ir.Model, feeds: dict[str, Array]) -> Dataset:
    return open_dataset(feeds, input_specs(model))


def skewed(count: int, shape: tuple[int, ...], seed: int = 0) -> Array:
    """Samples that mostly lie in few directions, as real data do."""
    random = np.random.default_rng(seed)
    size = int(np.prod(shape))
    mixing = np.random.default_rng(99).normal(size=(size, size)) * 0.7 ** np.arange(size)
    mean = np.random.default_rng(98).normal(size=size)
    return (random.normal(size=(count, size)) @ mixing.T + mean).reshape(count, *shape).astype("f4")


def perceptron() -> ir.Model:
    b = ModelBuilder("svd_mlp")
    y = b.op("Relu", b.gemm(b.input("x", ["batch", 24]), 24, 32))
    y = b.op("Relu", b.linear(y, 32, 32))
    b.output(b.gemm(y, 32, 8))
    return normalized(b.build())


def residual() -> ir.Model:
    b = ModelBuilder("svd_residual")
    x = b.input("x", ["batch", 3, 5, 5])
    stem = b.op("Relu", b.conv(x, 3, 12))
    y = b.conv(b.op("Relu", b.conv(stem, 12, 12)), 12, 12, bias=False)
    y = b.op("Relu", b.op("Add", y, stem))
    b.output(b.gemm(b.op("Flatten", b.op("GlobalAveragePool", y)), 12, 6))
    return normalized(b.build())


def factorized(
    model: ir.Model, options: SvdOptions, work_dir: Path, data: Dataset | None = None
) -> tuple[ir.Model, PassReport]:
    """A factorized copy, checked and with the interface of the original."""
    result = model_io.clone(model)
    report = SvdPass(options).run(result, context(work_dir, data))
    model_io.check(result)
    assert interface(result) == interface(model)
    return result, report


def output_error(result: ir.Model, model: ir.Model, feeds: dict[str, Array]) -> float:
    found, expected = run_model(result, feeds), run_model(model, feeds)
    return sum(
        float(np.sum((found[n].astype(float) - v) ** 2) / np.sum(v.astype(float) ** 2))
        for n, v in expected.items()
    )


@pytest.mark.parametrize(("build", "shape"), [(perceptron, (24,)), (residual, (3, 5, 5))])
def test_whitening_beats_plain_truncation_and_recovery_beats_both(
    build: Callable[[], ir.Model], shape: tuple[int, ...], tmp_path: Path
) -> None:
    model = build()
    data = dataset(model, {"x": skewed(256, shape)})
    fresh = {"x": skewed(100, shape, seed=1)}
    options = SvdOptions(params=0.6, align=1)
    errors = []
    for chosen in (
        replace(options, whiten=False, recover=False),
        replace(options, recover=False),
        options,
    ):
        result, report = factorized(model, chosen, tmp_path, data)
        assert float(report.figures["params_kept_ratio"]) <= 0.6
        errors.append(output_error(result, model, fresh))
    plain, whitened, recovered = errors
    assert whitened < 0.5 * plain
    assert recovered < whitened


@pytest.mark.parametrize("measure", ["macs", "params", "bytes"])
def test_every_budget_is_met_and_not_by_far(measure: str, tmp_path: Path) -> None:
    model = normalized(fixture("mini_transformer").build())
    values = {measure: 0.75, "align": 1, "objective": "size"}
    result, report = factorized(model, SvdOptions.parse(values, owner="svd"), tmp_path)
    before, after = cost_of(model), cost_of(result)
    ratio = {
        "macs": after.macs / before.macs,
        "params": after.parameters / before.parameters,
        "bytes": after.weight_bytes / before.weight_bytes,
    }[measure]
    assert 0.7 <= ratio <= 0.7501
    assert report.figures["params_kept_ratio"] == after.parameters / before.parameters


@pytest.mark.parametrize("case", RUNNABLE, ids=str)
def test_every_fixture_survives_without_data(case: Fixture, tmp_path: Path) -> None:
    model = normalized(case.build())
    options = SvdOptions(energy=0.8, align=1)
    result, report = factorized(model, options, tmp_path)
    found = run_model(result, case.feeds(model))
    assert all(np.isfinite(v).all() for v in found.values() if v.dtype.kind == "f")
    assert any("No calibration data" in n for n in report.notes)
    if report.changes:
        assert float(report.figures["params_kept_ratio"]) < 1
    else:
        before, after = (ir.to_proto(m).SerializeToString() for m in (model, result))
        assert before == after


@pytest.mark.parametrize("name", QUICK)
def test_fixtures_of_each_kind_survive_with_recovery(name: str, tmp_path: Path) -> None:
    case = fixture(name)
    model = normalized(case.build())
    data = dataset(model, case.feeds(model, batch=12))
    result, report = factorized(model, SvdOptions(energy=0.9, align=1), tmp_path, data)
    assert report.changes or report.skips
    found = run_model(result, case.feeds(model, seed=1))
    assert all(np.isfinite(v).all() for v in found.values() if v.dtype.kind == "f")


def test_energy_keeps_what_it_says(tmp_path: Path) -> None:
    b = ModelBuilder("svd_energy")
    b.output(b.gemm(b.input("x", ["batch", 20]), 20, 20))
    model = normalized(b.build())
    samples = skewed(500, (20,))
    result, report = factorized(
        model, SvdOptions(energy=0.95, align=1), tmp_path, dataset(model, {"x": samples})
    )
    (change,) = (c for c in report.changes if "split" in c.what)
    assert "output form" in change.what
    found, expected = (run_model(m, {"x": samples}) for m in (result, model))
    ours, theirs = (next(iter(o.values())).astype(np.float64) for o in (found, expected))
    missed = np.sum((ours - theirs) ** 2) / np.sum((theirs - theirs.mean(axis=0)) ** 2)
    assert 0.0 < missed <= 0.0501
    assert np.abs((ours - theirs).mean(axis=0)).max() < 1e-4  # the bias took up the mean


def test_ranks_by_name(tmp_path: Path) -> None:
    model = perceptron()
    first = next(n.name or "" for n in model.graph if n.op_type == "Gemm")
    result, report = factorized(model, replace(PLAIN, rank=(f"{first}:5",)), tmp_path)
    assert [c.node for c in report.changes] == [first]
    (factor,) = (v for n, v in result.graph.initializers.items() if n.endswith("svd_first"))
    assert factor.shape == (24, 5)
    _, report = factorized(model, replace(PLAIN, rank=(f"{first}:23",)), tmp_path)
    assert not report.changes
    assert any("no smaller than its weight" in s.reason for s in report.skips)
    with pytest.raises(UsageError, match="'nowhere' of the pass 'svd' matches no layer"):
        factorized(model, replace(PLAIN, rank=("nowhere:5",)), tmp_path)


def test_names_choose_the_layers(tmp_path: Path) -> None:
    model = perceptron()
    first, last = (n.name or "" for n in model.graph if n.op_type == "Gemm")
    options = replace(PLAIN, energy=0.5)
    _, report = factorized(model, replace(options, include=(first,)), tmp_path)
    assert {c.node for c in report.changes} == {first}
    _, report = factorized(model, replace(options, exclude=(last,)), tmp_path)
    assert last not in {c.node for c in report.changes}
    assert any(s.node == last and "svd.exclude" in s.reason for s in report.skips)
    with pytest.raises(UsageError, match="matches no layer with weights"):
        factorized(model, replace(options, include=("nowhere*",)), tmp_path)


def test_a_budget_out_of_reach_is_an_error_that_names_what_is_possible(tmp_path: Path) -> None:
    model = perceptron()
    with pytest.raises(PassError, match=r"params=0\.02 cannot be reached") as caught:
        factorized(model, replace(PLAIN, params=0.02), tmp_path)
    reachable = float((caught.value.hint or "").split("params=")[1].split()[0])
    _, report = factorized(model, replace(PLAIN, params=reachable), tmp_path)
    assert float(report.figures["params_kept_ratio"]) <= reachable
    narrow = normalized(fixture("squeeze_excite").build())
    result, report = factorized(narrow, SvdOptions(align=64), tmp_path)
    assert any("Nothing was factorized" in n for n in report.notes) or not report.changes
    assert len(result.graph) == len(narrow.graph)


def test_options_that_contradict_are_refused() -> None:
    with pytest.raises(UsageError, match="takes one rule for its ranks, not params and energy"):
        SvdPass(SvdOptions(params=0.5, energy=0.9))
    with pytest.raises(UsageError, match="wants PATTERN:RANK"):
        SvdPass(SvdOptions(rank=("conv1",)))


def test_alignment_is_kept(tmp_path: Path) -> None:
    model = perceptron()
    result, report = factorized(model, replace(PLAIN, params=0.7, align=4), tmp_path)
    assert report.changes
    ranks = [
        v.shape[1]
        for n, v in result.graph.initializers.items()
        if n.endswith("svd_first") and v.shape
    ]
    assert ranks
    assert all(isinstance(r, int) and r % 4 == 0 for r in ranks)


def test_recovery_makes_up_for_what_a_shortcut_lost(tmp_path: Path) -> None:
    """The right layer sees all of x, so it can imitate what the left one lost."""
    b = ModelBuilder("svd_shortcut")
    x = b.input("x", ["batch", 8])
    left = b.op("Gemm", x, b.weight(8, 8, name="narrow"), b.weight(8))
    right = b.op("Gemm", x, b.weight(8, 8), b.weight(8))
    b.output(b.op("Tanh", b.op("Add", left, right)))
    model = normalized(b.build())
    data = dataset(model, {"x": skewed(64, (8,))})
    fresh = {"x": skewed(32, (8,), seed=1)}
    options = SvdOptions(rank=("narrow:2",), align=1)
    result, report = factorized(model, options, tmp_path, data)
    assert any("refitted to the original's output" in c.what for c in report.changes)
    assert output_error(result, model, fresh) < 1e-6
    without, _ = factorized(model, replace(options, recover_all=False), tmp_path, data)
    assert output_error(without, model, fresh) > 1e-3


def test_the_gates_of_a_recurrent_layer_are_refitted(tmp_path: Path) -> None:
    b = ModelBuilder("svd_recurrent")
    x = b.input("x", ["batch", 6, 16])
    steps = b.op("Transpose", x, perm=[1, 0, 2])
    hidden = b.op("Tanh", b.op("MatMul", steps, b.weight(16, 16, name="before")))
    w, r = b.weight(1, 48, 16, name="gates"), b.weight(1, 48, 12)
    b.output(b.op("LSTM", hidden, w, r, hidden_size=12))
    model = normalized(b.build())
    data = dataset(model, {"x": skewed(96, (6, 16))})
    options = SvdOptions(rank=("before:4", "gates:6"), align=1)
    result, report = factorized(model, options, tmp_path, data)
    assert any(c.op_type == "LSTM" and "refitted" in c.what for c in report.changes)
    assert any(s.op_type == "LSTM" and "recurrent weights" in s.reason for s in report.skips)
    feeds = {"x": skewed(16, (6, 16), seed=2)}
    without, _ = factorized(model, replace(options, recover=False), tmp_path, data)
    assert output_error(result, model, feeds) < output_error(without, model, feeds)


def test_under_the_latency_objective_the_clock_decides(tmp_path: Path) -> None:
    """A small layer only gets slower in two; a large one at a low rank gets faster."""
    b = ModelBuilder("svd_clock")
    x = b.input("x", ["batch", 512])
    wide = b.op("MatMul", x, b.weight(512, 512, name="wide"))
    b.output(b.op("MatMul", wide, b.weight(512, 12, name="small")))
    model = normalized(b.build())
    options = replace(PLAIN, rank=("wide:16", "small:8"), objective=Objective.LATENCY)
    data = dataset(model, {"x": skewed(64, (512,))[:, :512]})
    _, report = factorized(model, options, tmp_path, data)
    assert len(report.changes) == 1
    assert "262144" in report.changes[0].what
    assert any("by the clock" in s.reason for s in report.skips)
    _, report = factorized(model, replace(options, objective=Objective.SIZE), tmp_path, data)
    assert len(report.changes) == 2


def test_few_samples_do_no_harm(tmp_path: Path) -> None:
    model = perceptron()
    fresh = {"x": skewed(100, (24,), seed=1)}
    options = SvdOptions(params=0.8, align=1)
    fitted, report = factorized(model, options, tmp_path, dataset(model, {"x": skewed(4, (24,))}))
    blind, _ = factorized(model, options, tmp_path)
    assert any("fewer than 10 rows" in n for n in report.notes)
    assert output_error(fitted, model, fresh) <= 1.5 * output_error(blind, model, fresh)


def test_losses_are_predicted_for_samples_that_were_not_fitted_to(tmp_path: Path) -> None:
    b = ModelBuilder("svd_few_rows")
    b.output(b.gemm(b.input("x", ["batch", 64]), 64, 64))
    model = normalized(b.build())
    random = np.random.default_rng(3)
    mixing = np.linalg.qr(random.normal(size=(64, 64)))[0] * 0.97 ** np.arange(64)
    data = dataset(model, {"x": (random.normal(size=(24, 64)) @ mixing.T).astype("f4")})
    fresh = {"x": (random.normal(size=(400, 64)) @ mixing.T).astype("f4")}
    options = SvdOptions(params=0.7, align=1, recover=False)
    (entry,) = Planner(model, options, context(tmp_path, data)).plan().entries
    result, _ = factorized(model, options, tmp_path, data)
    assert entry.loss == pytest.approx(output_error(result, model, fresh), rel=0.3)


def test_the_plan_names_the_layers_and_changes_nothing(tmp_path: Path) -> None:
    model = normalized(fixture("grouped_shuffle").build())
    before = ir.to_proto(model).SerializeToString()
    report = SvdPass(SvdOptions(align=1)).plan(model, context(tmp_path))
    assert ir.to_proto(model).SerializeToString() == before
    assert report.changes
    assert len(report.changes) == report.figures["layers"]
    assert any("grouped" in s.reason for s in report.skips)


def test_odd_graphs_stay_valid(tmp_path: Path) -> None:
    """Weights and layers that are outputs, no batch axis, weights among the inputs."""
    b = ModelBuilder("svd_odd")
    x = b.input("x", [4, 12])
    w = b.weight(12, 12, name="exported")
    first = b.op("MatMul", x, w)
    second = b.op("Gemm", b.op("Relu", first), b.weight(12, 12, name="plain"))
    b.output(first)
    b.output(second)
    b.output(b.op("Identity", w), [12, 12])
    model = normalized(b.build())
    data = dataset(model, {"x": skewed(4, (12,))})
    for chosen in (None, data):
        result, _ = factorized(model, SvdOptions(energy=0.5, align=1), tmp_path, chosen)
        feeds = {"x": skewed(4, (12,), seed=1)}
        found, expected = run_model(result, feeds), run_model(model, feeds)
        for name, array in expected.items():
            assert found[name].shape == array.shape
        last = list(expected)[-1]
        assert largest_error({last: found[last]}, {last: expected[last]}) == 0


def test_a_wide_layer_is_whitened_by_its_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the covariance of the inputs is too large, that of the outputs serves."""
    model = perceptron()
    data = dataset(model, {"x": skewed(256, (24,))})
    fresh = {"x": skewed(64, (24,), seed=1)}
    options = SvdOptions(params=0.7, align=1, recover=False)
    by_input, _ = factorized(model, options, tmp_path, data)
    monkeypatch.setattr("onnxcompress.passes.svd.sites.MAX_WIDTH", 16)
    by_output, _ = factorized(model, options, tmp_path, data)
    plain, _ = factorized(model, replace(options, whiten=False), tmp_path, data)
    errors = [output_error(m, model, fresh) for m in (by_input, by_output, plain)]
    assert errors[1] < 1.3 * errors[0]
    assert errors[1] < 0.5 * errors[2]
