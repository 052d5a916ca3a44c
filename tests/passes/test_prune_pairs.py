"""Layers on both sides of removed channels, fitted together."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.calibration.statistics import AxisUnfold, ConvUnfold
from onnxcompress.graph.canonical import canonicalize
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.graph.labels import analyse
from onnxcompress.graph.surgery import mask
from onnxcompress.interface import input_specs
from onnxcompress.passes.prune import PruneOptions
from onnxcompress.passes.prune.branches import Branches
from onnxcompress.passes.prune.consumers import Layers
from onnxcompress.passes.prune.jobs import jobs_of
from onnxcompress.passes.prune.pairs import Pair, pairs_of, tapped
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
        b.output(b.op("GlobalAveragePool", b.conv(inner, 16, 3)))
    model = b.build()
    model_io.normalize(model)
    canonicalize(model)
    return model


def pairs(model: ir.Model) -> dict[str, Pair]:
    coupling, layers = analyse(model), Layers.of(model)
    removed = {g.index: np.arange(0, g.size, 2) for g in coupling.groups if g.size == 16}
    masked, kept = mask(model, coupling, removed), coupling.kept(removed)
    branches = Branches.of(model, coupling, removed, layers)
    levels, _ = jobs_of(model, masked, coupling, kept, layers, True, branches)
    return pairs_of(model, masked, levels, layers.consumers, coupling, kept)


@pytest.mark.parametrize(
    ("activation", "nodes"), [("", 0), ("Relu", 1), ("Clip", 1), ("Tanh", 1), ("erf", 5)]
)
def test_only_an_activation_lies_between_a_pair(activation: str, nodes: int) -> None:
    (pair,) = pairs(block(activation)).values()
    assert pair.maker.weight == "inner"
    assert pair.inputs.all()
    assert len(pair.chain.nodes) == nodes
    assert len(pair.nodes) == nodes + 2  # the layer and the mask, too


@pytest.mark.parametrize("activation", ["", "Relu", "Clip", "Tanh", "erf"])
def test_an_activation_is_a_function_of_one_number(activation: str, tmp_path: Path) -> None:
    (pair,) = pairs(block(activation)).values()
    z = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32) * 2
    function = pair.chain.function(z, context(tmp_path))
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
    ],
    ids=["gated", "scaled by channel", "read twice", "depthwise"],
)
def test_other_layers_are_no_pair(model: Callable[[], ir.Model]) -> None:
    assert not pairs(model())


@pytest.mark.parametrize("activation", ["Relu", "Clip", "erf"])
def test_together_they_leave_less_error(activation: str, tmp_path: Path) -> None:
    model = block(activation)
    data, fresh = dataset(model, samples(model, 96)), samples(model, 64, seed=1)
    expected = run_model(model, fresh)

    def error(joint: bool) -> tuple[float, bool]:
        options = PruneOptions(keep=("inner:0.5",), rounds=1, align=1, joint=joint)
        result, report = pruned(model, options, tmp_path, data)
        found = run_model(result, fresh)
        missing = [found[n].astype(np.float64) - a.astype(np.float64) for n, a in expected.items()]
        told = any("fitted together" in c.what for c in report.changes)
        return sum(float(np.sum(m**2)) for m in missing), told

    (alone, silent), (together, told) = error(False), error(True)
    assert together < 0.6 * alone
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

    def last(again: set[str]) -> Array:
        running = model_io.clone(model)
        stages = plan_stages(running.graph, [["x", values[1]], [values[2]]], again)
        stream = Stream(running, stages, data, context(tmp_path), 2, ActivationStore(tmp_path))
        stream.advance(1, "first")
        set_initializer(running.graph, "w1", 2 * old)
        stream.advance(2, "second")
        return np.concatenate([found[values[2]] for _, found in stream.feeds([values[2]])])

    before, after = (run_model(m, feeds)[values[2]] for m in (model, changed))
    assert np.allclose(last(set()).astype(np.float64), before, rtol=1e-5, atol=1e-5)
    assert np.allclose(last(set(names[:2])).astype(np.float64), after, rtol=1e-5, atol=1e-5)
    assert not np.allclose(before.astype(np.float64), after, rtol=1e-2)
