"""Smoothing and embeddings inside the quantization pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io, runtime
from onnxcompress.calibration.sources import Dataset, open_dataset
from onnxcompress.errors import UsageError
from onnxcompress.interface import input_specs
from onnxcompress.numerics.equalization import ChannelStatistics
from onnxcompress.passes.base import PassReport
from onnxcompress.passes.quant import QuantOptions, QuantPass
from onnxcompress.passes.quant.budget import Budget
from onnxcompress.passes.quant.build import Builder
from onnxcompress.passes.quant.embeddings import quantize_embeddings
from onnxcompress.passes.quant.smoothing import Site, apply, choose, find_sites
from tests.builder import Array, ModelBuilder
from tests.running import SETTINGS, context, interface, largest_error, run_model

_WIDTH = 16


def _feed_forward(style: str, *, static: bool = False) -> ir.Model:
    """A token model: embedding, normalization with outlier channels, products, residual."""
    b = ModelBuilder(f"smooth_{style}", opset=17)
    length = 6 if static else "length"
    ids = b.input("ids", ["batch", length] if not static else [2, 6], np.int64)
    x = b.op("Gather", b.weight(400, _WIDTH, fan_in=1, name="table"), ids)
    gain = b.rng.uniform(0.5, 1, _WIDTH).astype(np.float32)
    gain[3] = 60.0
    scale, shift = b.constant(gain), b.weight(_WIDTH, fan_in=4)
    if style == "layer_norm":
        y = b.op("LayerNormalization", x, scale, shift, axis=-1)
    else:
        square = b.op("ReduceMean", b.op("Mul", x, x), axes=[-1], keepdims=1)
        root = b.op("Sqrt", b.op("Add", square, b.constant(1e-6)))
        y = b.op("Mul", b.op("Div", x, root), scale)
    h = b.op("Erf", b.linear(y, _WIDTH, 24))
    z = b.linear(h, 24, _WIDTH)
    b.output(b.op("Add", z, y) if style == "post_norm" else b.linear(z, _WIDTH, 5))
    model = b.build()
    model_io.normalize(model)
    return model


def _data(model: ir.Model, samples: int = 32) -> Dataset:
    ids = np.random.default_rng(0).integers(0, 400, (samples, 6))
    return open_dataset({"ids": ids}, input_specs(model))


def _run(model: ir.Model, work_dir: Path, **values: object) -> PassReport:
    options = QuantOptions.parse({"objective": "size", "ranges": "minmax", **values}, owner="quant")
    return QuantPass(options).run(model, context(work_dir, _data(model)))


def _sqnr_db(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> float:
    worst = np.inf
    for name, wanted in theirs.items():
        expected = wanted.astype(np.float64)
        noise = ((ours[name].astype(np.float64) - expected) ** 2).sum()
        worst = min(worst, 10 * np.log10((expected**2).sum() / noise))
    return float(worst)


_FEEDS = {"ids": np.random.default_rng(7).integers(0, 400, (2, 6))}


@pytest.mark.parametrize("style", ["layer_norm", "rms_norm", "post_norm"])
@pytest.mark.parametrize("static", [False, True])
def test_outliers_of_norms_are_moved_into_weights(style: str, static: bool, tmp_path: Path) -> None:
    model = _feed_forward(style, static=static)
    reference, before = model_io.clone(model), interface(model)
    plain = model_io.clone(model)
    report = _run(model, tmp_path)
    _run(plain, tmp_path, smooth="off")
    model_io.check(model)
    assert interface(model) == before
    expected = run_model(reference, _FEEDS)
    ours = _sqnr_db(run_model(model, _FEEDS), expected)
    assert ours > _sqnr_db(run_model(plain, _FEEDS), expected) + 3
    assert any("smoothed" in change.what for change in report.changes)
    assert float(report.figures["smoothing_gain_db"]) > 3
    # The normalization takes the factors up, unless somebody else reads it.
    smoothing = [change.what for change in report.changes if "smoothed" in change.what]
    assert any(("by a Mul" in what) == (style == "post_norm") for what in smoothing)


@pytest.mark.parametrize("style", ["layer_norm", "post_norm"])
def test_without_static_nodes_the_smoothed_model_is_left_for_dynamic_ones(
    style: str, tmp_path: Path
) -> None:
    model = _feed_forward(style)
    options = QuantOptions.parse({"mode": "static", "objective": "size"}, owner="quant")
    ctx = context(tmp_path, _data(model))
    found = QuantPass(options)._static(model_io.clone(model), ctx, frozenset(), Budget(0.0))
    assert found.again is not None
    again = model_io.clone(model)
    left = found.again(again, found.nodes)
    assert not left.nodes
    assert not left.left_in_float
    assert any("smoothed" in change.what for change in left.report.changes)
    assert "integer_nodes" not in left.report.figures
    # The embedding table has 8 bits, the rest is float: no other error than that.
    assert _sqnr_db(run_model(again, _FEEDS), run_model(model, _FEEDS)) > 35


@pytest.mark.parametrize("style", ["layer_norm", "rms_norm", "post_norm"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothing_leaves_the_float_function_unchanged(style: str, alpha: float) -> None:
    model = _feed_forward(style)
    reference = model_io.clone(model)
    sites = []
    for node in list(model.graph):
        if node.op_type == "MatMul" and node.inputs[1] in set(model.graph.initializers.values()):
            value = node.inputs[0]
            assert value is not None
            assert value.shape is not None
            width = int(value.shape[-1])  # type: ignore[arg-type]
            high = np.exp(np.random.default_rng(1).normal(0, 2, width))
            data = ChannelStatistics(-high, high, high**2 / 3)
            sites.append(Site(value.name or "", (node.name or "",), data))
    assert len(sites) >= 2
    choices = choose(model, tuple(sites), 1.0, alpha)
    apply(model, choices)
    model_io.check(model)
    assert largest_error(run_model(model, _FEEDS), run_model(reference, _FEEDS)) < 1e-4


@pytest.mark.parametrize("style", ["layer_norm", "post_norm"])
def test_what_is_known_after_smoothing_is_what_would_be_measured(
    style: str, tmp_path: Path
) -> None:
    model = _feed_forward(style)
    ctx = context(tmp_path, _data(model))
    options = QuantOptions()
    chosen = frozenset(n.name or "" for n in model.graph if n.op_type == "MatMul")
    before = Builder(model, options, ctx)
    before.measure(chosen)
    sites, _ = find_sites(ctx, model, before.network, chosen)
    even = frozenset(site.value for site in sites)
    assert find_sites(ctx, model, before.network, chosen, even)[0] == ()
    done = apply(model, choose(model, sites, 1.0, 0.8))
    assert done.factors
    known = Builder(model, options, ctx, before.measured.rescaled(done.moved, done.factors))
    known.measure(chosen)
    anew = Builder(model, options, ctx)
    anew.measure(chosen)
    assert known.measured.covariances.keys() == anew.measured.covariances.keys()
    for name, covariance in anew.measured.covariances.items():
        np.testing.assert_allclose(
            known.measured.covariances[name], covariance, rtol=1e-3, atol=1e-5 * covariance.max()
        )
    for point, extremes in anew.measured.ranges.items():
        np.testing.assert_allclose(known.measured.ranges[point], extremes, rtol=1e-3, atol=1e-5)


def test_tables_are_looked_up_as_integers(tmp_path: Path) -> None:
    model = _feed_forward("layer_norm")
    reference = model_io.clone(model)
    _run(model, tmp_path)
    assert "table" not in model.graph.initializers
    stored = model.graph.initializers["table/quant_integer"]
    assert stored.dtype == ir.DataType.INT8
    executed = runtime.optimized_graph(model, SETTINGS)
    floats = [v for v in executed.graph.initializers.values() if v.dtype == ir.DataType.FLOAT]
    assert max(v.const_value.size for v in floats if v.const_value is not None) <= 400
    assert _sqnr_db(run_model(model, _FEEDS), run_model(reference, _FEEDS)) > 25


def test_shared_tables_are_stored_once_and_others_are_explained() -> None:
    b = ModelBuilder("tables")
    ids = b.input("ids", ["n"], np.int64)
    shared = b.weight(300, 16, name="shared")
    x = b.op("Add", b.op("Gather", shared, ids), b.op("Gather", shared, b.op("Neg", ids)))
    columns = b.op("Gather", b.weight(16, 300, name="columns"), ids, axis=1)
    constant = b.op("Gather", b.weight(300, 16, name="fixed"), b.constant([1, 2]))
    tied = b.weight(300, 16, name="tied")
    y = b.op("Add", b.op("Gather", tied, ids), b.op("ReduceSum", tied, b.constant([0]), keepdims=1))
    for value in (x, columns, constant, y):
        b.output(value)
    model = b.build()
    model_io.normalize(model)
    reference = model_io.clone(model)
    changes, skips = quantize_embeddings(model, frozenset(), 10.0)
    model_io.check(model)
    assert len(changes) == 2
    assert [n for n in model.graph.initializers if n.startswith("shared")] == [
        "shared/quant_integer",
        "shared/quant_scale",
    ]
    assert {word for s in skips for word in ("columns", "constant", "float") if word in s.reason}
    assert len(skips) == 3
    feeds = {"ids": np.array([0, 3, 299, 7])}
    assert largest_error(run_model(model, feeds), run_model(reference, feeds)) < 0.01


def test_options_are_checked() -> None:
    for value in ("maybe", "1.5", "nan"):
        with pytest.raises(UsageError, match="smooth"):
            QuantOptions.parse({"smooth": value}, owner="quant")
    assert QuantOptions.parse({"smooth": "0.8"}, owner="quant").smoothing_alpha() == 0.8
