"""Layers on both sides of hidden tensors, fitted together."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.calibration.statistics import REFERENCE_PREFIX, AxisUnfold, ConvUnfold
from onnxcompress.graph.canonical import canonicalize
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.graph.labels import analyse
from onnxcompress.graph.surgery import mask
from onnxcompress.interface import input_specs
from onnxcompress.passes.prune import PruneOptions
from onnxcompress.passes.prune.branches import Branches
from onnxcompress.passes.prune.consumers import Layers
from onnxcompress.passes.prune.jobs import jobs_of
from onnxcompress.passes.prune.junctions import (
    Junction,
    junctions_of,
    made_shape,
    read_places,
    tapped,
)
from onnxcompress.passes.prune.rows import unfolded
from onnxcompress.passes.prune.stages import plan_stages
from onnxcompress.passes.prune.store import ActivationStore
from onnxcompress.passes.prune.stream import Stream
from tests.builder import Array, ModelBuilder
from tests.passes.test_prune import dataset, pruned, samples
from tests.running import context, run_model


@pytest.mark.parametrize(
    "unfold",
    [
        ConvUnfold((3, 3), (1, 1), (1, 1), (1, 1, 1, 1)),
        ConvUnfold((3, 2), (2, 1), (1, 2), (0, 1, 2, 0)),
        ConvUnfold((1, 1), (2, 2), (1, 1), (0, 0, 0, 0)),
        ConvUnfold((5, 5), (1, 1), (1, 1), (2, 2, 2, 2)),
    ],
    ids=str,
)
def test_taps_find_the_rows_that_a_convolution_reads(unfold: ConvUnfold) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 7, 6)).astype(np.float32)
    padded = [n + unfold.pads[i] + unfold.pads[i + 2] for i, n in enumerate((7, 6))]
    sizes = [
        (n - (k - 1) * d - 1) // s + 1
        for n, k, d, s in zip(padded, unfold.kernel, unfold.dilations, unfold.strides, strict=True)
    ]
    there = 2 * sizes[0] * sizes[1]
    rows = np.arange(0, there, 2)
    wanted = unfolded(x, unfold, np.ones(3, np.bool_), rows, there)[0]
    places = tapped(unfold, x.shape, rows)
    flat = np.moveaxis(x, 1, -1).reshape(-1, 3)
    found = np.where(places[:, :, np.newaxis] >= 0, flat[places], 0)
    np.testing.assert_array_equal(found.reshape(len(rows), -1), wanted)


def test_a_row_of_an_axis_reads_itself() -> None:
    rows = np.array([0, 3, 5])
    np.testing.assert_array_equal(tapped(AxisUnfold(), (2, 3, 8), rows), rows[:, np.newaxis])


def block(activation: str, *, read_twice: bool = False, groups: int = 1) -> ir.Model:
    """Hidden channels come in twos that are read alike; one between them would nearly do."""
    b = ModelBuilder("block")
    x = b.input("x", ["batch", 6, 6, 6])
    between, apart = (b.rng.normal(size=(8, 6, 3, 3)) for _ in range(2))
    made = np.stack([between + apart / 3, between - apart / 3], axis=1).reshape(16, 6, 3, 3)
    read = np.repeat(b.rng.normal(size=(6, 8, 3, 3)), 2, axis=1)
    inner = b.op(
        "Conv", x, b.constant((made / 8).astype(np.float32), "inner"), b.weight(16), pads=[1] * 4
    )
    if activation == "Clip":
        limits = (b.constant(np.array(v, np.float32), n) for v, n in ((0.0, "l"), (2.0, "h")))
        inner = b.op("Clip", inner, *limits)
    elif activation == "erf":  # GELU as PyTorch exports it
        scaled = b.op("Div", inner, b.constant(np.array(np.sqrt(2), np.float32)))
        one = b.op("Add", b.op("Erf", scaled), b.constant(np.ones((1, 1, 1), np.float32)))
        half = b.op("Mul", b.constant(np.array(0.5, np.float32)), inner)
        inner = b.op("Mul", half, one)
    elif activation == "gated":
        inner = b.op("Mul", b.op("Sigmoid", b.op("ReduceMax", inner, keepdims=1)), inner)
    elif activation == "scaled":
        inner = b.op("Mul", inner, b.weight(16, 1, 1))
    elif activation:
        inner = b.op(activation, inner)
    if groups > 1:
        inner = b.op("Conv", inner, b.weight(16, 1, 1, 1), b.weight(16), group=groups)
    weight = b.constant((read / 8).astype(np.float32))
    y = b.op("Conv", inner, weight, b.weight(6), pads=[1] * 4)
    b.output(b.op("Relu", b.op("Add", y, x)))
    if read_twice:
        b.output(b.op("GlobalAveragePool", inner))
    model = b.build()
    model_io.normalize(model)
    canonicalize(model)
    return model


def fire(
    between: str = "", *, joined: bool = True, split: bool = False, flat: bool = False
) -> ir.Model:
    """Two layers make a tensor, joined, and one or two read it."""
    b = ModelBuilder("fire")
    x = b.input("x", ["batch", 6, 9, 8])

    def conv(data: str, channels: int, width: int, kernel: int, name: str) -> str:
        weight = b.weight(width, channels, kernel, kernel, name=name)
        pads = [kernel // 2] * 4
        return b.op("Conv", data, weight, b.weight(width, fan_in=16), pads=pads)

    first = conv(x, 6, 8, 3, "e3")
    made = b.op("Relu", first)
    if joined:
        made = b.op("Concat", b.op("Relu", conv(x, 6, 8, 1, "e1")), made, axis=-3)
    width = 16 if joined else 8
    if between == "pool":
        made = b.op("MaxPool", made, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 0, 1, 0])
    elif between == "pool, Relu":
        made = b.op("Relu", b.op("MaxPool", made, kernel_shape=[2, 2], strides=[2, 2]))
    elif between == "pool, Tanh":
        made = b.op("Tanh", b.op("MaxPool", made, kernel_shape=[2, 2]))
    elif between == "pool that rounds up":
        made = b.op("MaxPool", made, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
    elif between == "mean":
        made = b.op("AveragePool", made, kernel_shape=[2, 2])
    b.output(b.op("Relu", conv(made, width, 5, 3, "r3")))
    if split:
        b.output(conv(made, width, 4, 1, "r1"))
    if flat:
        b.output(b.op("GlobalAveragePool", first))
    model = b.build()
    model_io.normalize(model)
    canonicalize(model)
    return model


def masked_with_junctions(model: ir.Model) -> tuple[ir.Model, dict[str, Junction]]:
    """The model without every other unit of its hidden tensors, and what can be fitted together."""
    coupling, layers = analyse(model), Layers.of(model)
    removed = {g.index: np.arange(0, g.size, 2) for g in coupling.groups if g.size in {8, 16}}
    masked, kept = mask(model, coupling, removed), coupling.kept(removed)
    branches = Branches.of(model, coupling, removed, layers)
    levels, _ = jobs_of(model, masked, coupling, kept, layers, True, branches)
    return masked, junctions_of(model, masked, levels, layers.consumers, coupling, kept)


def junctions(model: ir.Model) -> dict[str, Junction]:
    return masked_with_junctions(model)[1]


@pytest.mark.parametrize(
    ("activation", "nodes"), [("", 0), ("Relu", 1), ("Clip", 1), ("Tanh", 1), ("erf", 5)]
)
def test_an_activation_lies_between_two_layers(activation: str, nodes: int) -> None:
    (junction,) = junctions(block(activation)).values()
    (maker,) = junction.makers
    assert maker.branch.layer.weight == "inner"
    assert maker.inputs.all()
    assert not maker.outputs.all()
    (chain,) = maker.branch.chains
    assert len(chain.nodes) == nodes
    assert len(junction.nodes) == nodes + 2  # the layer and the mask, too


@pytest.mark.parametrize(
    ("model", "makers", "readers", "pooled"),
    [
        (lambda: fire(), ["e1", "e3"], ["r3"], 1),
        (lambda: fire(split=True), ["e1", "e3"], ["r1", "r3"], 1),
        (lambda: fire(joined=False, split=True), ["e3"], ["r1", "r3"], 1),
        (lambda: fire("pool"), ["e1", "e3"], ["r3"], 9),
        (lambda: fire("pool, Relu", split=True), ["e1", "e3"], ["r1", "r3"], 4),
    ],
    ids=["joined", "read by two", "made by one, read by two", "pooled", "pooled, read by two"],
)
def test_several_layers_make_a_tensor_and_several_read_it(
    model: Callable[[], ir.Model], makers: list[str], readers: list[str], pooled: int
) -> None:
    (junction,) = junctions(model()).values()
    assert [m.branch.layer.weight for m in junction.makers] == makers
    assert sorted(r.consumer.weight for r in junction.readers) == readers
    assert junction.hidden.pooled == pooled


@pytest.mark.parametrize("activation", ["", "Relu", "Clip", "Tanh", "erf"])
def test_an_activation_is_a_function_of_one_number(activation: str, tmp_path: Path) -> None:
    (junction,) = junctions(block(activation)).values()
    z = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32) * 2
    function = junction.makers[0].branch.function(z, context(tmp_path))
    assert function is not None
    wanted = {
        "": z,
        "Relu": np.maximum(z, 0),
        "Clip": np.clip(z, 0, 2),
        "Tanh": np.tanh(z),
        "erf": np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in z.flat]).reshape(
            z.shape
        ),
    }[activation]
    np.testing.assert_allclose(function.value(z), wanted, atol=1e-4)


@pytest.mark.parametrize(
    "model",
    [
        lambda: block("gated"),
        lambda: block("scaled"),
        lambda: block("Relu", read_twice=True),
        lambda: block("Relu", groups=16),
        lambda: fire("pool, Tanh"),
        lambda: fire("pool that rounds up"),
        lambda: fire("mean"),
        lambda: fire(flat=True),
    ],
    ids=[
        "gated",
        "scaled by channel",
        "read by another operator",
        "depthwise",
        "not only clipped behind a pooling",
        "pooling that rounds up",
        "mean",
        "read before the Concat",
    ],
)
def test_other_layers_are_no_junction(model: Callable[[], ir.Model]) -> None:
    assert not junctions(model())


@pytest.mark.parametrize("model", ["joined", "read by two", "pooled"])
def test_rows_and_weights_of_a_junction_give_what_the_network_gives(
    model: str, tmp_path: Path
) -> None:
    """What the fit is made from, computed as it is written, is what the masked network answers."""
    between, split = {
        "joined": ("", False),
        "read by two": ("pool, Relu", True),
        "pooled": ("pool", False),
    }[model]
    built = fire(between, split=split)
    masked, found = masked_with_junctions(built)
    (junction,) = found.values()
    # Without the original beside it the target is what the layer itself answers.
    asked = [name for reader in junction.readers for name in reader.wanted]
    names = {name: name.removeprefix(REFERENCE_PREFIX) for name in asked}
    wanted = dict.fromkeys([*junction.data, *names.values()])
    stages = plan_stages(masked.graph, [list(wanted)])
    data = open_dataset(samples(built, 48), input_specs(built))
    stream = Stream(masked, stages, data, context(tmp_path), 6, ActivationStore(tmp_path))
    stream.advance(1, "run")
    ridges = [1e-3] * len(junction.readers)
    fitted = junction.fitted(masked, stream, names, ridges, context(tmp_path))
    stream.close()
    assert fitted is not None
    assert fitted.before < 1e-6


@pytest.mark.parametrize("pool", [ConvUnfold((3, 2), (2, 1), (1, 2), (1, 0, 1, 1)), None], ids=str)
def test_a_layer_behind_a_pooling_reads_all_of_its_places(pool: ConvUnfold | None) -> None:
    unfold = ConvUnfold((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    x = np.random.default_rng(0).permutation(2 * 7 * 6).reshape(2, 1, 7, 6).astype(np.float32)
    pooled = x
    if pool is not None:
        whole = np.full((2, 1, 7 + 2, 6 + 1), -np.inf, np.float32)
        whole[:, :, 1:8, :6] = x
        shape = made_shape(pool, x.shape)
        assert shape == (2, 1, 4, 5)
        places = unfolded(
            whole,
            ConvUnfold(pool.kernel, pool.strides, pool.dilations, (0,) * 4),
            np.ones(1, np.bool_),
            None,
            math.prod(shape),
        )[0]
        pooled = places.max(axis=1).reshape(shape)
    rows = np.arange(0, math.prod(pooled.shape), 3)
    wanted = unfolded(pooled, unfold, np.ones(1, np.bool_), rows, math.prod(pooled.shape))[0]
    places = read_places(unfold, pool, x.shape, rows).reshape(len(rows), 9, -1)
    seen = np.where(places >= 0, x.ravel()[places], -np.inf).max(axis=2)
    np.testing.assert_array_equal(np.where(np.isfinite(seen), seen, 0), wanted)


@pytest.mark.parametrize(
    ("model", "keep", "most"),
    [
        (lambda: block("Relu"), ("inner:0.5",), 0.6),
        (lambda: block("Clip"), ("inner:0.5",), 0.6),
        (lambda: block("erf"), ("inner:0.5",), 0.6),
        (lambda: fire("pool", split=True), ("e1:0.5", "e3:0.5"), 0.97),
    ],
    ids=["Relu", "Clip", "erf", "several"],
)
def test_together_they_leave_less_error(
    model: Callable[[], ir.Model], keep: tuple[str, ...], most: float, tmp_path: Path
) -> None:
    built = model()
    data, fresh = dataset(built, samples(built, 96)), samples(built, 64, seed=1)
    expected = run_model(built, fresh)

    def error(joint: bool) -> tuple[float, bool]:
        options = PruneOptions(keep=keep, rounds=1, align=1, joint=joint)
        result, report = pruned(built, options, tmp_path, data)
        found = run_model(result, fresh)
        missing = [found[n].astype(np.float64) - a.astype(np.float64) for n, a in expected.items()]
        told = any("fitted together" in c.what for c in report.changes)
        return sum(float(np.sum(m**2)) for m in missing), told

    (alone, silent), (together, told) = error(False), error(True)
    assert together < most * alone
    assert told
    assert not silent


def test_nodes_may_run_again_with_other_weights(tmp_path: Path) -> None:
    """What was kept of them before is not what later stages go on from."""
    b = ModelBuilder("twice")
    x = b.input("x", ["batch", 4])
    hidden = b.op("Relu", b.op("Gemm", x, b.weight(4, 5, name="w1"), b.weight(5)))
    b.output(b.op("Gemm", hidden, b.weight(5, 3), b.weight(3)))
    model = b.build()
    model_io.normalize(model)
    names = [n.name or "" for n in model.graph]
    values = [n.outputs[0].name or "" for n in model.graph]
    feeds = {"x": np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)}
    data = open_dataset(feeds, input_specs(model))
    changed = model_io.clone(model)
    old = constant_of(changed.graph.initializers["w1"])
    assert old is not None
    set_initializer(changed.graph, "w1", 2 * old)

    def last(again: dict[str, int]) -> Array:
        running = model_io.clone(model)
        stages = plan_stages(running.graph, [["x", values[1]], [values[2]]], again)
        stream = Stream(running, stages, data, context(tmp_path), 2, ActivationStore(tmp_path))
        stream.advance(1, "first")
        set_initializer(running.graph, "w1", 2 * old)
        stream.advance(2, "second")
        return np.concatenate([found[values[2]] for _, found in stream.feeds([values[2]])])

    before, after = (run_model(m, feeds)[values[2]] for m in (model, changed))
    assert np.allclose(last({}).astype(np.float64), before, rtol=1e-5, atol=1e-5)
    assert np.allclose(last(dict.fromkeys(names[:2], 0)).astype(np.float64), after, rtol=1e-5)
    assert not np.allclose(before.astype(np.float64), after, rtol=1e-2)


def test_nodes_that_nothing_changes_any_longer_run_once_more_and_not_again() -> None:
    b = ModelBuilder("thrice")
    x = b.input("x", ["batch", 4])
    for _ in range(4):
        x = b.op("Gemm", x, b.weight(4, 4), b.weight(4))
    b.output(x)
    model = b.build()
    model_io.normalize(model)
    names = [n.name or "" for n in model.graph]
    values = ["x", *(n.outputs[0].name or "" for n in model.graph)]
    wanted = [[values[1]], [values[2]], [values[3]], [values[4]]]
    stages = plan_stages(model.graph, wanted, {names[0]: 1})
    assert [s.inputs for s in stages] == [("x",), ("x",), (values[2],), (values[3],)]
