from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.sources import Dataset, open_dataset, synthetic_dataset
from onnxcompress.errors import UsageError
from onnxcompress.graph.constants import constant_of
from onnxcompress.interface import input_specs
from onnxcompress.passes.base import PassReport
from onnxcompress.passes.pack import PackOptions, PackPass
from onnxcompress.passes.sparse import Importance, Scope, SparseOptions, SparsePass, Store
from onnxcompress.recipe import Recipe
from onnxcompress.runtime import optimized_graph
from onnxcompress.schedule import plan_schedule
from tests.builder import Array, ModelBuilder
from tests.fixtures import FIXTURES, Fixture, fixture
from tests.running import SETTINGS, context, interface, largest_error, run_model

RUNNABLE = [case for case in FIXTURES if case.runs]


def _prepared(case: Fixture) -> ir.Model:
    model = case.build()
    model_io.normalize(model)
    return model


def _layer() -> tuple[ir.Model, Dataset]:
    """Two layers, and inputs of which half repeat the other half."""
    b = ModelBuilder("sparse_layers", opset=17)
    x = b.input("x", ["N", 32])
    hidden = b.op("Relu", b.op("Gemm", x, b.weight(32, 48, fan_in=32, name="w1")))
    b.output(b.op("Gemm", hidden, b.weight(48, 8, fan_in=48, name="w2")), ["N", 8])
    model = b.build()
    model_io.normalize(model)
    half = np.random.default_rng(0).standard_normal((256, 16)).astype(np.float32)
    return model, open_dataset(np.concatenate([half, half], axis=1), input_specs(model))


def _thin(
    model: ir.Model, data: Dataset | None, folder: Path, **options: object
) -> tuple[ir.Model, PassReport]:
    made = model_io.clone(model)
    values = {"min_elements": 16, **options}
    report = SparsePass(SparseOptions.parse(values, owner="sparse")).run(
        made, context(folder, data)
    )
    return made, report


def _weights(model: ir.Model) -> dict[str, Array]:
    found = {name: constant_of(value) for name, value in model.graph.initializers.items()}
    return {name: array for name, array in found.items() if array is not None}


def _density(model: ir.Model, *names: str) -> float:
    arrays = [_weights(model)[name] for name in names]
    return sum(np.count_nonzero(a) for a in arrays) / sum(a.size for a in arrays)


@pytest.mark.parametrize(
    ("case", "options"),
    [(case, {}) for case in RUNNABLE] + [(case, {"pattern": "2:4"}) for case in RUNNABLE[:8]],
    ids=lambda given: given.name if isinstance(given, Fixture) else given.get("pattern", "density"),
)
def test_every_model_stays_valid(case: Fixture, options: dict[str, str], tmp_path: Path) -> None:
    model = _prepared(case)
    data = synthetic_dataset(model, samples=4, seed=0)
    made, report = _thin(model, data, tmp_path, **options)
    PackPass(PackOptions(min_saving=0.0)).run(made, context(tmp_path))
    model_io.infer_shapes(made)
    model_io.check(made)
    run_model(made, data.first())
    assert interface(made) == interface(model)
    for change in report.changes:
        left, _, total, *_ = change.what.split()
        assert int(left) <= int(total)


def test_recovery_and_correlated_inputs(tmp_path: Path) -> None:
    model, data = _layer()
    feeds = next(iter(data.batches(256)))
    expected = run_model(model, feeds)
    errors = {}
    for recover in (False, True):
        made, _ = _thin(model, data, tmp_path, importance="obs", recover=recover, include=("w1",))
        assert _density(made, "w1") <= 0.5
        errors[recover] = largest_error(run_model(made, feeds), expected)
    assert errors[True] < 0.5 * errors[False]


def test_one_budget_for_all_layers_or_one_for_each(tmp_path: Path) -> None:
    model, data = _layer()
    common, _ = _thin(model, data, tmp_path, density=0.4)
    each, _ = _thin(model, data, tmp_path, density=0.4, scope=Scope.LAYER.value)
    assert _density(common, "w1", "w2") <= 0.4
    assert _density(common, "w1") != pytest.approx(_density(common, "w2"), abs=0.01)
    for name in ("w1", "w2"):
        assert _density(each, name) == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("importance", [Importance.MAGNITUDE, Importance.RANDOM])
def test_masks_that_need_no_data(importance: Importance, tmp_path: Path) -> None:
    model, _ = _layer()
    job = SparsePass(SparseOptions(importance=importance, recover=False))
    assert not job.needs
    made, _ = _thin(model, None, tmp_path, importance=importance.value, recover=False)
    again, _ = _thin(model, None, tmp_path, importance=importance.value, recover=False)
    assert _density(made, "w1", "w2") == pytest.approx(0.5, abs=0.01)
    np.testing.assert_array_equal(_weights(made)["w1"], _weights(again)["w1"])
    kept = _weights(made)["w1"] != 0
    magnitude = np.abs(_weights(model)["w1"])
    if importance is Importance.MAGNITUDE:
        assert magnitude[kept].min() >= magnitude[~kept].max()
    with pytest.raises(UsageError, match="calibration data"):
        _thin(model, None, tmp_path, importance="obs")


def test_channels_of_a_convolution_are_neighbours(tmp_path: Path) -> None:
    b = ModelBuilder("sparse_conv", opset=17)
    x = b.input("x", ["N", 8, 6, 6])
    y = b.op("Conv", x, b.weight(4, 8, 3, 3, fan_in=72, name="w"), pads=[1, 1, 1, 1])
    b.output(y, ["N", 4, 6, 6])
    model = b.build()
    model_io.normalize(model)
    made, _ = _thin(model, synthetic_dataset(model, samples=8, seed=0), tmp_path, pattern="2:4")
    weight = _weights(made)["w"]
    for start in (0, 4):
        assert (np.count_nonzero(weight[:, start : start + 4], axis=1) <= 2).all()
    assert np.count_nonzero(weight) == weight.size // 2


@pytest.mark.parametrize("pattern", ["2", "4:2", "0:4", "a:b", "2:4:8", "1:1000"])
def test_patterns_that_are_none(pattern: str) -> None:
    with pytest.raises(UsageError, match="N:M"):
        SparseOptions.parse({"pattern": pattern}, owner="sparse")


def test_names_that_match_nothing(tmp_path: Path) -> None:
    model, data = _layer()
    with pytest.raises(UsageError, match="matches no weight"):
        _thin(model, data, tmp_path, include=("nothing*",))
    made, report = _thin(model, data, tmp_path, exclude=("w1",))
    assert _density(made, "w1") == 1.0
    assert ("w1", "excluded by name") in [(skip.node, skip.reason) for skip in report.skips]


# --- pack ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, np.uint8])
@pytest.mark.parametrize("density", [0.0, 0.03, 0.5])
def test_packing_is_exact_and_is_folded_at_load(
    dtype: type[np.generic], density: float, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    table = (rng.integers(1, 100, (61, 67)) * (rng.random((61, 67)) < density)).astype(dtype)
    b = ModelBuilder("packed", opset=17)
    index = b.input("i", ["N"], np.int64)
    name = b.constant(table, name="table")
    b.output(b.op("Gather", name, index), ["N", 67], dtype)
    model = b.build()
    model_io.normalize(model)
    before = table.nbytes
    report = PackPass().run(model, context(tmp_path))
    model_io.infer_shapes(model)
    model_io.check(model)
    stored = sum(array.nbytes for array in _weights(model).values())
    assert stored < before
    (change,) = report.changes
    assert change.saved_bytes is not None
    assert before - stored == pytest.approx(change.saved_bytes, abs=700)
    (found,) = run_model(model, {"i": np.arange(61)}).values()
    np.testing.assert_array_equal(found, table)
    assert [node.op_type for node in optimized_graph(model, SETTINGS).graph] == ["Gather"]


def test_dense_tensors_and_old_models_are_left_alone(tmp_path: Path) -> None:
    model, _ = _layer()
    assert not PackPass().run(model, context(tmp_path)).changes
    old = fixture("opset9").build()
    for value in old.graph.initializers.values():
        if value.const_value is not None and value.const_value.nbytes > 1000:
            zeros = np.zeros(value.const_value.shape.numpy(), np.float32)
            value.const_value = ir.tensor(zeros, name=value.name)
    report = PackPass().run(old, context(tmp_path))
    assert not report.changes
    assert all("opset 11" in skip.reason for skip in report.skips)


def test_the_pass_that_packs_is_added() -> None:
    schedule = plan_schedule(Recipe(passes=("quant", "sparse")))
    names = [step.name for step in schedule.steps]
    assert names[-3:] == ["sparse", "quant", "pack"]
    assert "Added pack: it completes sparse." in schedule.notes
    dense = Recipe(passes=("sparse",), options={"sparse": {"store": Store.DENSE.value}})
    assert "pack" not in [step.name for step in plan_schedule(dense).steps]
    set_too = Recipe(passes=("sparse",), options={"pack": {"min_saving": "0.3"}})
    assert plan_schedule(set_too).steps[-1].instance.options == PackOptions(min_saving=0.3)
