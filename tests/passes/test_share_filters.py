from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.errors import UsageError
from onnxcompress.graph.constants import constant_of
from onnxcompress.passes.share import ShareOptions, SharePass
from onnxcompress.passes.share.filters import merge_filters
from tests.builder import Array, ModelBuilder
from tests.fixtures import FIXTURES, Fixture
from tests.running import context, interface, largest_error, run_model

RUNNABLE = [case for case in FIXTURES if case.runs]


def _with_twins(noise: float = 0.0) -> ir.Model:
    """Conv, BatchNormalization, depthwise Conv, Relu, Conv; filters 5 and 6 repeat filter 1."""
    b = ModelBuilder("twins", opset=17)
    rng = np.random.default_rng(2)

    def twins(*shape: int, low: float | None = None) -> str:
        data = rng.standard_normal(shape) if low is None else rng.uniform(low, 1.0, shape)
        data[5] = data[1] * (1 + noise)
        data[6] = data[1]
        return b.constant(data.astype(np.float32))

    x = b.input("x", ["N", 3, 8, 8])
    y = b.op("Conv", x, twins(8, 3, 3, 3), twins(8))
    stats = [twins(8), twins(8), twins(8), twins(8, low=0.5)]
    y = b.op("BatchNormalization", y, *stats)
    y = b.op("Conv", y, twins(8, 1, 3, 3), twins(8), group=8)
    y = b.op("Relu", y)
    y = b.op("Conv", y, b.weight(4, 8, 1, 1, name="reader"))
    b.output(y, ["N", 4, 4, 4])
    model = b.build()
    model_io.normalize(model)
    return model


def _feeds() -> dict[str, Array]:
    return {"x": np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)}


def _channels(model: ir.Model) -> int:
    reader = constant_of(model.graph.initializers["reader"])
    assert reader is not None
    return int(reader.shape[1])


def test_twins_are_merged_and_outputs_stay() -> None:
    model = _with_twins()
    expected, before = run_model(model, _feeds()), interface(model)
    merged = merge_filters(model, 0.0)
    model_io.infer_shapes(model)
    model_io.check(model)
    assert merged.count == 2
    assert _channels(model) == 6
    assert interface(model) == before
    assert largest_error(run_model(model, _feeds()), expected) < 1e-5


@pytest.mark.parametrize(("tolerance", "left"), [(0.0, 7), (1e-4, 7), (0.01, 6)])
def test_a_tolerance_merges_what_is_near(tolerance: float, left: int) -> None:
    model = _with_twins(noise=1e-3)
    expected = run_model(model, _feeds())
    merge_filters(model, tolerance)
    assert _channels(model) == left
    assert largest_error(run_model(model, _feeds()), expected) < 0.01


def test_one_constant_that_differs_keeps_filters_apart() -> None:
    model = _with_twins()
    for value in model.graph.initializers.values():
        array = constant_of(value)
        if array is not None and array.shape == (8, 1, 3, 3):
            changed = array.copy()
            changed[6, 0, 0, 0] += 0.5
            value.const_value = ir.tensor(changed, name=value.name)
    assert merge_filters(model, 0.0).count == 1


@pytest.mark.parametrize("case", RUNNABLE, ids=lambda case: case.name)
def test_every_fixture_keeps_its_outputs(case: Fixture) -> None:
    """Equal filters planted into every weight, whatever reads them."""
    model = case.build()
    model_io.normalize(model)
    for value in model.graph.initializers.values():
        array = constant_of(value)
        if array is None or array.dtype != np.float32 or array.size <= 4 or array.shape[0] < 4:
            continue  # four numbers may be factors of a Resize
        changed = array.copy()
        changed[3] = changed[1]
        value.const_value = ir.tensor(changed, name=value.name)
    feeds = case.feeds(model)
    expected = run_model(model, feeds)
    merge_filters(model, 0.0)
    model_io.infer_shapes(model)
    model_io.check(model)
    assert largest_error(run_model(model, feeds), expected) < 1e-4


def test_as_an_option(tmp_path: Path) -> None:
    model = _with_twins()
    options = {"filters": "0", "codebook": "none", "merge": "none"}
    report = SharePass(ShareOptions.parse(options, owner="share")).run(model, context(tmp_path))
    assert report.figures["filters_merged"] == 2
    assert "merged with their duplicates" in report.changes[0].what
    with pytest.raises(UsageError, match="nothing to do"):
        ShareOptions.parse({"codebook": "none", "merge": "none"}, owner="share")
