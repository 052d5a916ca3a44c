"""Many plans for one budget, and the one that turns out best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.context import PassContext
from onnxcompress.graph.canonical import canonicalize
from onnxcompress.graph.coupling import Group, Sink
from onnxcompress.graph.labels import analyse
from onnxcompress.interface import input_specs
from onnxcompress.passes.prune import PruneOptions, PrunePass
from onnxcompress.passes.prune.consumers import Layers
from onnxcompress.passes.prune.contest import FactoredLosses, Judge, Plan, Trial, Verdict, best_plan
from onnxcompress.passes.prune.samples import contest_size
from onnxcompress.passes.prune.score import Ranking
from tests.builder import ModelBuilder
from tests.fixtures import fixture
from tests.running import context


def ranking(index: int, sinks: int, *, whole: bool = False) -> Ranking:
    sink = Sink("reader", 0, 1, 1, "weight", 1, np.arange(4)[:, None])
    group = Group(index, f"g{index}", 4, (), (sink,) * sinks, ())
    losses = [0.0, 1.0, 2.0, 4.0, 10.0] if whole else [0.0, 1.0, 2.0, 4.0]
    return Ranking(group, np.arange(len(losses) - 1), np.array(losses), "obs")


def test_losses_are_multiplied_and_last_steps_have_a_factor_of_their_own() -> None:
    losses = FactoredLosses([ranking(0, sinks=1), ranking(1, sinks=3, whole=True)])
    assert losses.prior[1] > losses.prior[0] == 0.0 > losses.prior[2]
    alone, whole = losses.times(np.array([2.0, 3.0, 0.5]))
    np.testing.assert_array_equal(alone.losses, [0.0, 2.0, 4.0, 8.0])
    np.testing.assert_array_equal(whole.losses, [0.0, 3.0, 6.0, 12.0, 15.0])


def test_the_parts_of_a_plan_add_up_to_what_its_factors_make_of_it() -> None:
    rankings = [ranking(0, sinks=1), ranking(1, sinks=3, whole=True)]
    losses, factors = FactoredLosses(rankings), np.array([2.0, 3.0, 0.5])
    for plan in ({0: np.arange(2)}, {1: np.arange(4)}, {0: np.arange(3), 1: np.arange(1)}):
        seen = losses.times(factors)
        total = sum(seen[g].losses[len(units)] for g, units in plan.items())
        assert losses.parts(plan) @ factors == total


class Oracle(Judge):
    """Knows the true factors of two groups."""

    def __init__(self, true: tuple[float, float], *, blind: bool = False) -> None:
        self.true, self.blind, self.seen = true, blind, 0

    @property
    def judging(self) -> int:
        return 0 if self.blind else 256

    def learn(self, other: Judge) -> None:
        """There is nothing to learn about layers."""

    def errors_of(self, plans: Iterable[Plan]) -> Iterator[float]:
        for plan in plans:
            self.seen += 1
            yield sum(t * len(plan.get(g, ())) ** 2 for g, t in enumerate(self.true)) + 1e-3


def spend(rankings: Sequence[Ranking], timed: bool) -> Plan:
    """Eight units are to go from two groups of eight: the split of the least summed loss."""
    one, other = (r.losses for r in rankings)
    count = int(np.argmin([one[n] + other[8 - n] for n in range(9)]))
    return {0: np.arange(count), 1: np.arange(8 - count)}


def eights() -> list[Ranking]:
    sink = Sink("reader", 0, 1, 1, "weight", 1, np.arange(8)[:, None])
    return [
        Ranking(Group(i, f"g{i}", 9, (), (sink,), ()), np.arange(8), np.arange(9.0) ** 2, "obs")
        for i in range(2)
    ]


def tried(judges: Sequence[Judge], count: int, job: PassContext) -> Verdict | None:
    first = spend(eights(), timed=False)
    return best_plan(first, eights(), spend, lambda _: 1.0, judges, count, job, timed=False)


@pytest.mark.parametrize("true", [(1.0, 6.0), (9.0, 1.0)])
def test_plans_learn_that_a_group_costs_more_than_was_measured(
    tmp_path: Path, true: tuple[float, float]
) -> None:
    judge = Oracle(true)
    found = tried([judge], 8, context(tmp_path))
    assert found is not None
    assert len(found.first.plan[0]) == len(found.first.plan[1]) == 4  # as measured: both alike
    assert found.best.error < 0.7 * found.first.error
    assert judge.seen == found.count  # none twice


def test_without_a_choice_nothing_is_tried(tmp_path: Path) -> None:
    job = context(tmp_path)
    for judge, count in ((Oracle((1.0, 1.0)), 1), (Oracle((1.0, 1.0), blind=True), 8)):
        assert tried([judge], count, job) is None
        assert judge.seen == 0


class Few(Oracle):
    """Judges by few samples."""

    @property
    def judging(self) -> int:
        return 50


def test_where_few_samples_judge_the_best_are_judged_once_more(tmp_path: Path) -> None:
    job = context(tmp_path)
    misled, second = Few((1.0, 6.0)), Few((50.0, 1.0))
    found = tried([misled, second], 8, job)
    alone = tried([Few((1.0, 6.0)), Few((1.0, 6.0))], 8, job)
    assert found is not None
    assert alone is not None
    assert 0 < second.seen <= 4
    assert len(found.best.plan[0]) < len(alone.best.plan[0])


def test_time_makes_up_for_some_error() -> None:
    plan: Plan = {}
    slow, fast = Trial(plan, 1.0, 0.10), Trial(plan, 0.9, 0.11)
    assert fast.cost < slow.cost < Trial(plan, 0.99, 0.11).cost


def test_the_plan_that_does_no_harm_has_the_least_error(tmp_path: Path) -> None:
    """One plan removes channels whose readers ignore them, the other channels that matter."""
    model = fixture("residual_bn").build()
    model_io.normalize(model)
    canonicalize(model)
    coupling = analyse(model)
    group = next(g for g in coupling.groups if g.size >= 4)
    rng = np.random.default_rng(0)
    feeds = {
        s.name: rng.normal(size=[32, *(int(d) for d in (s.shape or ())[1:])]).astype(s.dtype)
        for s in input_specs(model)
    }
    job = context(tmp_path, open_dataset(feeds, input_specs(model)))
    judge = Judge(model, model, coupling, Layers.of(model), PruneOptions(), job, 256)
    harmless = {group.index: np.zeros(0, np.int64)}
    harmful = {group.index: np.arange(group.size - 1)}
    good, bad = judge.errors_of([harmless, harmful])
    assert good < 1e-9 < bad


def narrow_blocks() -> ir.Model:
    b = ModelBuilder("narrow_blocks")
    y = b.op("Relu", b.conv(b.input("x", ["batch", 3, 6, 6]), 3, 8))
    for _ in range(2):
        y = b.op("Relu", b.op("Add", y, b.conv(b.op("Relu", b.conv(y, 8, 16)), 16, 8)))
    b.output(b.gemm(b.op("Flatten", b.op("GlobalAveragePool", y)), 8, 5))
    model = b.build()
    model_io.normalize(model)
    canonicalize(model)
    return model


def test_what_the_first_plan_found_serves_the_others(tmp_path: Path) -> None:
    model = narrow_blocks()
    coupling = analyse(model)
    feeds = {"x": np.random.default_rng(0).normal(size=(48, 3, 6, 6)).astype(np.float32)}
    job = context(tmp_path, open_dataset(feeds, input_specs(model)))
    inner = [g.index for g in coupling.groups if g.size == 16]
    plan, other = ({g: np.arange(n) for g in inner} for n in (8, 6))

    def judge() -> Judge:
        return Judge(model, model, coupling, Layers.of(model), PruneOptions(), job, 256)

    asked = judge()
    (first,) = asked.errors_of([plan])
    again, later = asked.errors_of([plan, other])
    assert again == pytest.approx(first, rel=1e-4)
    (alone,) = judge().errors_of([other])
    assert later == pytest.approx(alone, rel=0.2)
    # The first one is remembered before the next is even made.
    beside, taken = judge(), []

    def plans() -> Iterator[Plan]:
        for made in (plan, other):
            taken.append(made)
            yield made

    errors = beside.errors_of(plans())
    assert next(errors) == first
    assert len(taken) == 1
    assert list(errors) == [later]
    assert list(beside.errors_of([plan, other])) == [again, later]
    # For other samples only the ridges are good.
    taught = judge()
    taught.learn(asked)
    (found,) = taught.errors_of([plan])
    assert found == pytest.approx(first, rel=1e-4)


def test_big_models_compare_fewer_plans_on_fewer_samples(tmp_path: Path) -> None:
    sizes = []
    for length in (8, 1024):
        b = ModelBuilder("deep")
        y = b.input("x", ["batch", 8, length, length])
        for _ in range(3):
            y = b.op("Relu", b.conv(y, 8, 8))
        b.output(y)
        model = b.build()
        model_io.normalize(model)
        feeds = {"x": np.zeros((300 if length == 8 else 1, 8, length, length), np.float32)}
        sizes.append(contest_size(model, open_dataset(feeds, input_specs(model)), 16))
    assert sizes[0] == (16, 256)
    assert sizes[1][0] == 4
    assert 4 <= sizes[1][1] < 256


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
        for count in (1, 6)
    }
    assert not any("plans" in n for n in notes[1])
    assert any("plans, refitted quickly" in n for n in notes[6])
