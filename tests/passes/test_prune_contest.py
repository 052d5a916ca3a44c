"""Several plans for one budget, and the one that turns out best."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from onnxcompress import model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.graph.canonical import canonicalize
from onnxcompress.graph.coupling import Group, Sink
from onnxcompress.graph.labels import analyse
from onnxcompress.interface import input_specs
from onnxcompress.passes.prune import PruneOptions, PrunePass
from onnxcompress.passes.prune.consumers import Layers
from onnxcompress.passes.prune.contest import VARIATIONS, distinct, varied, winner
from onnxcompress.passes.prune.score import Ranking
from tests.builder import ModelBuilder
from tests.fixtures import fixture
from tests.running import context


def ranking(index: int, sinks: int) -> Ranking:
    sink = Sink("reader", 0, 1, 1, "weight", 1, np.arange(4)[:, None])
    group = Group(index, f"g{index}", 4, (), (sink,) * sinks, ())
    return Ranking(group, np.arange(3), np.array([0.0, 1.0, 2.0, 4.0]), "obs")


def test_the_first_view_changes_nothing_and_others_make_shared_groups_dearer() -> None:
    plain = [ranking(0, sinks=1), ranking(1, sinks=3)]
    for number in range(VARIATIONS):
        alone, shared = (v.losses for v in varied(plain, number))
        same = np.array_equal(alone, plain[0].losses) and np.array_equal(shared, plain[1].losses)
        assert same == (number == 0)
        assert (np.diff(alone) > 0).all()
        assert (shared >= alone).all()


def test_plans_that_remove_equally_much_count_once() -> None:
    one, other = {0: np.array([1, 2])}, {1: np.array([3])}
    assert distinct([one, other, {0: np.array([1, 2])}]) == [one, other]


def test_the_plan_that_does_no_harm_wins(tmp_path: Path) -> None:
    """One plan removes channels whose readers ignore them, the other channels that matter."""
    model = fixture("residual_bn").build()
    model_io.normalize(model)
    canonicalize(model)
    coupling = analyse(model)
    group = next(g for g in coupling.groups if g.size >= 4)
    layers = Layers.of(model)
    rng = np.random.default_rng(0)
    feeds = {
        s.name: rng.normal(size=[32, *(int(d) for d in (s.shape or ())[1:])]).astype(s.dtype)
        for s in input_specs(model)
    }
    data = open_dataset(feeds, input_specs(model))
    harmless = {group.index: np.zeros(0, np.int64)}
    harmful = {group.index: np.arange(group.size - 1)}
    job = context(tmp_path, data)
    options = PruneOptions()
    for plans, place in (([harmful, harmless], 1), ([harmless, harmful], 0)):
        found, errors = winner(model, model, coupling, plans, layers, options, job)
        assert found == place
        assert errors[place] < 1e-9 < errors[1 - place]
    assert winner(model, model, coupling, [harmful], layers, options, job) == (0, [])
    half = {group.index: np.arange(group.size // 2)}
    both = [half, harmful]
    for times, place in (([1.0, 1.0], 0), ([1.0, 0.99], 0), ([1.0, 0.1], 1)):
        assert winner(model, model, coupling, both, layers, options, job, times)[0] == place


def test_the_report_says_how_plans_compare(tmp_path: Path) -> None:
    b = ModelBuilder("stream")
    y = b.op("Relu", b.conv(b.input("x", ["batch", 3, 6, 6]), 3, 12))
    for _ in range(2):
        inner = b.op("Relu", b.conv(y, 12, 16))
        y = b.op("Add", y, b.conv(inner, 16, 12))
    b.output(b.gemm(b.op("Flatten", b.op("GlobalAveragePool", y)), 12, 5))
    model = b.build()
    model_io.normalize(model)
    feeds = {"x": np.random.default_rng(0).normal(size=(48, 3, 6, 6)).astype(np.float32)}
    data = open_dataset(feeds, input_specs(model))
    notes = {
        count: PrunePass(PruneOptions(macs=0.4, align=1, plans=count))
        .run(model_io.clone(model), context(tmp_path, data))
        .notes
        for count in (1, VARIATIONS)
    }
    assert not any("plans" in n for n in notes[1])
    assert any("plans, refitted quickly" in n for n in notes[VARIATIONS])
