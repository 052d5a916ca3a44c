"""A compressed model learns from its original."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.dataset import Dataset
from onnxcompress.calibration.sources import open_dataset, synthetic_dataset
from onnxcompress.context import PassContext
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.interface import input_specs
from onnxcompress.passes.base import PassReport
from onnxcompress.passes.distill import DistillOptions, DistillPass
from onnxcompress.passes.distill.lesson import Lesson
from onnxcompress.passes.distill.samples import Runs
from onnxcompress.passes.prune import PruneOptions, PrunePass
from onnxcompress.pipeline import compress
from onnxcompress.recipe import Recipe
from onnxcompress.schedule import plan_schedule
from tests import fakes
from tests.builder import Array, ModelBuilder
from tests.fixtures import RUNNABLE, Fixture
from tests.running import context, interface, run_model

Floats = npt.NDArray[np.float32]


def network(*, fixed: int | str = "batch") -> ir.Model:
    """A residual network of two blocks."""
    b = ModelBuilder("distill")
    x = b.input("x", [fixed, 3, 6, 6])
    y = b.op("Relu", b.conv(x, 3, 16))
    for _ in range(2):
        y = b.op("Relu", b.op("Add", b.conv(b.op("Relu", b.conv(y, 16, 24)), 24, 16), y))
    pooled = b.op("Flatten", b.op("GlobalAveragePool", y))
    b.output(b.gemm(pooled, 16, 5))
    model = b.build()
    model_io.normalize(model)
    return model


def samples(count: int, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    made = rng.normal(0.3, 1.0, (count, 3, 1, 1)) + 0.5 * rng.standard_normal((count, 3, 6, 6))
    return made.astype(np.float32)


def job(model: ir.Model, folder: Path, data: Dataset | Array) -> PassContext:
    """A job whose original is ``model``."""
    path = folder / "original.onnx"
    model_io.save(model, path)
    given = data if isinstance(data, Dataset) else open_dataset({"x": data}, input_specs(model))
    return dataclasses.replace(context(folder, given), original=path)


def noisy(model: ir.Model, part: float = 0.2) -> ir.Model:
    """A copy with noise in its weights."""
    found = model_io.clone(model)
    rng = np.random.default_rng(4)
    for name, value in list(found.graph.initializers.items()):
        array = constant_of(value)
        if array is not None and array.ndim > 1 and array.dtype == np.float32:
            moved = array + part * array.std() * rng.standard_normal(array.shape)
            set_initializer(found.graph, name, moved.astype(np.float32))
    return found


def taught(model: ir.Model, ctx: PassContext, **options: object) -> tuple[ir.Model, PassReport]:
    found = model_io.clone(model)
    report = DistillPass(DistillOptions.parse(options, owner="distill")).run(found, ctx)
    return found, report


def error(model: ir.Model, original: ir.Model, x: Floats) -> float:
    """Relative squared error of the outputs."""
    ours, theirs = (np.float64(*run_model(m, {"x": x}).values()) for m in (model, original))
    return float(np.sum((ours - theirs) ** 2) / np.sum(theirs**2))


def test_a_damaged_model_comes_nearer_to_its_original(tmp_path: Path) -> None:
    original = network()
    damaged = noisy(original)
    found, report = taught(damaged, job(original, tmp_path, samples(256)))
    new = samples(128, seed=9)
    assert error(found, original, new) < 0.25 * error(damaged, original, new)
    figures = report.figures
    assert float(figures["relative_error_after"]) < 0.5 * float(figures["relative_error_before"])
    assert len(report.changes) == 12
    assert not report.skips
    assert interface(found) == interface(original)


def test_it_repairs_what_pruning_left(tmp_path: Path) -> None:
    original = network()
    ctx = job(original, tmp_path, samples(256))
    pruned = model_io.clone(original)
    PrunePass(PruneOptions.parse({"macs": 0.5, "plans": 1}, owner="prune")).run(pruned, ctx)
    found, report = taught(pruned, ctx)
    new = samples(128, seed=9)
    assert error(found, original, new) < 0.95 * error(pruned, original, new)
    assert int(report.figures["places_compared"]) == 6


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    original = network()
    damaged, ctx = noisy(original), job(original, tmp_path, samples(64))
    first, second = (taught(damaged, ctx, epochs=2)[0] for _ in range(2))
    other = taught(damaged, dataclasses.replace(ctx, seed=1), epochs=2)[0]
    x = samples(8, seed=9)
    assert error(first, second, x) == 0
    assert error(first, other, x) > 0


def test_zeros_stay_zeros(tmp_path: Path) -> None:
    original = network()
    thinned = model_io.clone(original)
    zeros = {}
    rng = np.random.default_rng(0)
    for name, value in list(thinned.graph.initializers.items()):
        array = constant_of(value)
        if array is not None and array.ndim == 4:
            zeros[name] = rng.random(array.shape) < 0.3
            set_initializer(thinned.graph, name, np.where(zeros[name], 0, array))
    found, report = taught(thinned, job(original, tmp_path, samples(64)), epochs=2)
    assert report.changes
    for name, gone in zeros.items():
        array = constant_of(found.graph.initializers[name])
        assert array is not None
        assert not array[gone].any()
        assert array[~gone].all()


def test_a_fixed_batch_axis_is_kept(tmp_path: Path) -> None:
    original = network(fixed=4)
    damaged = noisy(original)
    found, report = taught(damaged, job(original, tmp_path, samples(64)), epochs=4)
    assert report.figures["samples_per_step"] == 4
    new = samples(4, seed=9)
    assert error(found, original, new) < error(damaged, original, new)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda ctx: dataclasses.replace(ctx, original=None), "no original"),
        (lambda ctx: dataclasses.replace(ctx, calibration=None), "no samples"),
        (lambda ctx: dataclasses.replace(ctx, calibration=ctx.calibration.take(8)), "too few"),
    ],
)
def test_where_there_is_nothing_to_learn_from_nothing_changes(
    change: object, reason: str, tmp_path: Path
) -> None:
    assert callable(change)
    original = network()
    damaged = noisy(original)
    found, report = taught(damaged, change(job(original, tmp_path, samples(64))))
    assert reason in report.notes[0]
    assert not report.changes
    assert error(found, damaged, samples(4)) == 0


def test_what_stops_every_gradient_is_named(tmp_path: Path) -> None:
    b = ModelBuilder("stopped")
    x = b.input("x", ["batch", 8])
    b.output(b.op("CumSum", b.op("Relu", b.gemm(x, 8, 8)), b.constant(np.array(1))))
    original = b.build()
    model_io.normalize(original)
    damaged = noisy(original)
    first = next(n for n in damaged.graph if n.op_type == "Gemm")
    first.outputs[0].name = "another"
    x0 = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    _, report = taught(damaged, job(original, tmp_path, x0))
    assert "no gradient" in report.notes[0]
    assert [s.node for s in report.skips] == ["cumsum_0"]


def test_where_memory_is_short_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(Lesson, "gradients", refuse)
    original = network()
    damaged = noisy(original)
    found, report = taught(damaged, job(original, tmp_path, samples(64)))
    assert "distill.batch" in report.notes[0]
    assert error(found, damaged, samples(4)) == 0


def test_invented_samples_teach_nothing(tmp_path: Path) -> None:
    original = network()
    data = synthetic_dataset(original, samples=64, seed=0)
    _, report = taught(noisy(original), job(original, tmp_path, data))
    assert "invented" in report.notes[0]


def test_an_untouched_model_has_nothing_to_learn(tmp_path: Path) -> None:
    original = network()
    _, report = taught(original, job(original, tmp_path, samples(64)))
    assert "does not differ" in report.notes[0]


def test_what_means_something_else_is_not_compared(tmp_path: Path) -> None:
    """A value of the same name and shape that is far from the original's teaches nothing."""
    original = network()
    damaged = noisy(original)
    first = next(n for n in damaged.graph if n.op_type == "Conv")
    for value in first.inputs[1:]:
        assert value is not None
        array = constant_of(value)
        assert array is not None
        set_initializer(damaged.graph, value.name or "", 4 * array)
    second = next(n for n in damaged.graph if n.op_type == "Relu")
    scale = ir.Value(
        name="quarter",
        shape=ir.Shape([]),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(np.array(0.25, np.float32), name="quarter"),
    )
    damaged.graph.register_initializer(scale)
    scaled = ir.node("Mul", [second.outputs[0], scale], name="scaled")
    ir.convenience.replace_all_uses_with(second.outputs[0], scaled.outputs[0])
    scaled.replace_input_with(0, second.outputs[0])
    damaged.graph.insert_after(second, scaled)
    ctx = job(original, tmp_path, samples(256))
    found, report = taught(damaged, ctx)
    plain = taught(noisy(original), ctx)[1]
    compared = int(report.figures["places_compared"])
    assert compared == int(plain.figures["places_compared"]) - 1
    new = samples(128, seed=9)
    assert error(found, original, new) < 0.5 * error(damaged, original, new)


@pytest.mark.parametrize("fixture", RUNNABLE, ids=str)
def test_every_model_stays_valid_and_comes_no_further_away(
    fixture: Fixture, tmp_path: Path
) -> None:
    original = fixture.build()
    model_io.normalize(original)
    data = synthetic_dataset(original, samples=32, seed=0)
    data.synthetic = False
    damaged = noisy(original, 0.1)
    found, report = taught(damaged, job(original, tmp_path, data), epochs=2)
    model_io.check(found)
    run_model(found, data.first())
    assert interface(found) == interface(original)
    if report.changes:
        assert float(report.figures["relative_error_after"]) < float(
            report.figures["relative_error_before"]
        )
    else:
        assert report.notes


def test_samples_of_many_lengths_teach_nothing(tmp_path: Path) -> None:
    b = ModelBuilder("lengths")
    x = b.input("x", ["batch", 3, "length"])
    b.output(b.gemm(b.op("ReduceMean", b.conv(x, 3, 8, rank=1), axes=[2], keepdims=0), 8, 4))
    original = b.build()
    model_io.normalize(original)
    rng = np.random.default_rng(0)
    items = [rng.standard_normal((1, 3, 6 + i % 8)).astype(np.float32) for i in range(64)]
    data = open_dataset(lambda: iter([{"x": item} for item in items]), input_specs(original))
    _, report = taught(noisy(original), job(original, tmp_path, data))
    assert "many lengths" in report.notes[0]


def test_runs_hold_every_sample_once_in_an_order_of_their_own() -> None:
    model = network()
    x = samples(37)
    runs = Runs(open_dataset({"x": x}, input_specs(model)), 5)
    assert len(runs) == 7
    assert runs.left_out == 2
    seen = np.concatenate([feeds["x"] for feeds in runs.shuffled(np.random.default_rng(0))])
    places = [int(np.flatnonzero((x == s).all(axis=(1, 2, 3)))[0]) for s in seen]
    assert len(set(places)) == 35
    assert places != sorted(places)
    again = [feeds["x"] for feeds in runs.some(10)]
    assert len(again) == 2
    assert np.array_equal(again, [feeds["x"] for feeds in runs.some(10)])


def test_it_runs_behind_passes_that_take_away_and_before_those_that_round() -> None:
    steps = plan_schedule(Recipe(passes=("quant", "distill", "svd", "prune"))).steps
    names = [s.name for s in steps if not s.automatic]
    assert names == ["prune", "svd", "distill", "quant"]


def test_from_the_command_to_the_file(tmp_path: Path) -> None:
    model = fakes.save_classifier(tmp_path / "model.onnx")
    fakes.save_data(model, calib=256, evaluation=64)
    result = compress(
        model,
        tmp_path / "out.onnx",
        passes=["prune", "distill"],
        options={"prune": {"params": 0.6}},
        measure=False,
        keep_failed=True,
    )
    assert (tmp_path / "out.onnx").exists()
    assert [run.name for run in result.passes][-2:] == ["prune", "distill"]
