"""Rows drawn from activations: the layer's own product, and the moments of all rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress._threads import side_by_side
from onnxcompress.calibration.geometry import weight_order
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.errors import DataError, ModelError
from onnxcompress.interface import input_specs
from onnxcompress.numerics.least_squares import Moments, regress
from onnxcompress.passes.prune.consumers import Consumer, consumer_of
from onnxcompress.passes.prune.fit import choose
from onnxcompress.passes.prune.jobs import RIDGES
from onnxcompress.passes.prune.rows import (
    Products,
    RowPlan,
    RowSource,
    Sums,
    _finite,
    axis_last,
    gathered,
    rows_along,
    unfolded,
)
from onnxcompress.passes.prune.stages import plan_stages
from onnxcompress.passes.prune.store import ActivationStore
from onnxcompress.passes.prune.stream import Stream
from tests.builder import ModelBuilder
from tests.running import context, run_model

Floats = npt.NDArray[np.float32]

CONVS: dict[str, tuple[dict[str, int | list[int]], tuple[int, ...]]] = {
    "plain": ({"pads": [1, 1, 1, 1]}, (6, 4, 3, 3)),
    "strided": ({"pads": [0, 1, 2, 0], "strides": [2, 1], "dilations": [1, 2]}, (6, 4, 3, 2)),
    "grouped": ({"pads": [1, 1, 1, 1], "group": 2}, (6, 2, 3, 3)),
    "depthwise": ({"group": 4}, (8, 1, 3, 3)),
    "pointwise": ({"strides": [2, 2]}, (6, 4, 1, 1)),
}


def conv(name: str) -> tuple[ir.Model, Consumer, dict[str, Floats]]:
    attributes, shape = CONVS[name]
    b = ModelBuilder(name)
    x = b.input("x", ["batch", 4, 9, 8])
    b.output(b.op("Conv", x, b.weight(*shape), b.weight(shape[0]), domain="", **attributes))
    model = b.build()
    model_io.normalize(model)
    feeds: dict[str, Floats] = {
        "x": np.random.default_rng(0).normal(size=(5, 4, 9, 8)).astype(np.float32)
    }
    return model, consumer_of(next(iter(model.graph))), feeds


@pytest.mark.parametrize("name", CONVS)
def test_the_weight_times_the_rows_is_the_output(name: str) -> None:
    model, consumer, feeds = conv(name)
    found = run_model(model, dict(feeds))[consumer.output].astype(np.float64)
    y = np.moveaxis(found, 1, -1).reshape(-1, consumer.outputs)
    x = unfolded(feeds["x"], consumer.unfold, np.ones(4, bool), None, len(y))
    weight = consumer.matrix(model)
    order = weight_order(consumer.unfold, consumer.width)
    made = np.moveaxis(x[:, :, order] @ weight.swapaxes(1, 2), 0, 1).reshape(len(y), -1)
    np.testing.assert_allclose(made + consumer.bias_vector(model), y, rtol=1e-4, atol=1e-4)
    rows = np.array([0, 7, len(y) - 1])
    some = unfolded(feeds["x"], consumer.unfold, np.ones(4, bool), rows, len(y))
    np.testing.assert_array_equal(some, x[:, rows])
    with pytest.raises(ModelError, match="rows of inputs"):
        unfolded(feeds["x"], consumer.unfold, np.ones(4, bool), None, len(y) + 1)


def source(
    model: ir.Model, consumer: Consumer, feeds: dict[str, Floats], folder: Path, rows: int
) -> RowSource:
    data = open_dataset(dict(feeds), input_specs(model))
    names = [consumer.data, consumer.output]
    stages = plan_stages(model.graph, [names])
    stream = Stream(model, stages, data, context(folder), 2, ActivationStore(folder))
    stream.advance(1, "running")
    plan = RowPlan(
        data=consumer.data,
        unfold=consumer.unfold,
        total=consumer.output,
        axis=consumer.target_axis,
        shortcut=None,
        channels=np.array([True, False, True, True]),
        outputs=np.arange(consumer.outputs) != 1,
        max_rows=rows,
        folds=3,
        seed=0,
    )
    return RowSource(stream, plan)


def test_moments_are_those_of_all_rows(tmp_path: Path) -> None:
    model, consumer, feeds = conv("plain")
    drawn = source(model, consumer, feeds, tmp_path, 10_000)
    parts = gathered(drawn, 1, 3, own=True, target=lambda pairs: pairs.target)
    assert sum(p.own.count for p in parts) == 5 * 9 * 8
    assert all(p.own.count for p in parts)
    chunks = list(drawn)
    x = np.concatenate([c.x[0] for c in chunks]).astype(np.float64)
    y = np.concatenate([c.y for c in chunks]).astype(np.float64)
    assert x.shape[1] == 27
    assert y.shape[1] == 5
    whole = Sums()
    for part in parts:
        whole.own.merge(part.own)
        whole.cross.merge(part.cross)
    x -= x.mean(axis=0)
    np.testing.assert_allclose(whole.own.products[0], x.T @ x, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(whole.cross.products[0], x.T @ y, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(whole.cross.mean_y[0], y.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_threads_find_the_same_moments(tmp_path: Path) -> None:
    drawn = source(*conv("plain"), tmp_path, 10_000)
    alone = gathered(drawn, 1, 3, own=True, target=lambda pairs: pairs.target)
    with side_by_side(2) as each:
        beside = gathered(drawn, 1, 3, own=True, target=lambda pairs: pairs.target, each=each)
    for one, other in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(one.own.products, other.own.products)
        np.testing.assert_array_equal(one.cross.products, other.cross.products)


@pytest.mark.parametrize("axis", [1, -1, 0])
def test_some_rows_are_those_of_all(axis: int) -> None:
    array = np.arange(2.0 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    every = axis_last(array, axis)
    np.testing.assert_array_equal(rows_along(array, axis, None), every)
    rows = np.array([0, 3, len(every) - 1])
    np.testing.assert_array_equal(rows_along(array, axis, rows), every[rows])


def test_moments_far_from_zero_keep_their_digits() -> None:
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(1, 500, 3)) + 1e4).astype(np.float32)
    y = (x[0] @ np.array([1.0, -2.0, 0.5], np.float32))[:, None]
    sums = Sums()
    for part in range(5):
        rows = slice(100 * part, 100 * part + 100)
        sums.add(Products.of(x[:, rows], y[rows], 1, own=True))
    exact = x[0].astype(np.float64)
    exact -= exact.mean(axis=0)
    np.testing.assert_allclose(sums.own.products[0], exact.T @ exact, rtol=1e-4, atol=1e-2)


def test_no_more_rows_are_drawn_than_asked_for_and_the_same_again(tmp_path: Path) -> None:
    model, consumer, feeds = conv("plain")
    drawn = source(model, consumer, feeds, tmp_path, 30)
    first, second = ([c.x for c in drawn] for _ in range(2))
    assert 30 <= sum(x.shape[1] for x in first) <= 33
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model, consumer, feeds = conv("plain")
    feeds["x"][3, 0, 4, 4] = np.inf
    with pytest.raises(DataError, match="finite"):
        list(source(model, consumer, feeds, tmp_path, 10_000))


def folds(slope: float, count: int) -> list[Moments]:
    """Four folds of ``y = slope x₀ + noise`` with 8 inputs."""
    rng = np.random.default_rng(3)
    made = []
    for _ in range(4):
        x = rng.normal(size=(count, 8))
        y = slope * x[:, :1] + rng.normal(size=(count, 1))
        made.append(
            Moments(
                count, x.mean(0), y.mean(0), np.cov(x.T, bias=True),
                (x - x.mean(0)).T @ (y - y.mean(0)) / count,
            )
        )  # fmt: skip
    return made


def test_the_ridge_is_small_where_the_samples_tell_and_large_where_they_do_not() -> None:
    prior = np.eye(1, 8)
    many = choose(folds(3.0, 2000), prior, np.zeros(1), 0.0)
    few = choose(folds(1.0, 4), prior, np.zeros(1), 0.0)
    assert many is not None
    assert many <= 1e-2
    assert few is None or few >= 1.0
    assert choose(folds(3.0, 2000), prior, np.zeros(1), 0.5) == 0.5
    assert choose(folds(3.0, 50)[:1], prior, np.zeros(1), 0.0) == 1e-1
    fitted = regress(folds(3.0, 2000)[0], prior, RIDGES[0])[0]
    assert fitted[0, 0] == pytest.approx(3.0, abs=0.1)


def test_sums_that_overflow_in_single_precision_are_finite() -> None:
    large = np.full(4, np.finfo(np.float32).min)
    assert _finite(large)
    assert not _finite(np.array([0.0, np.nan], np.float32))
    assert not _finite(np.array([np.inf, -np.inf], np.float32))
