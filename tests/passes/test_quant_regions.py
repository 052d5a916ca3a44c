"""Regions on integers, what they cost, and which of them go back to float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.passes.quant import regions as module
from onnxcompress.passes.quant.costs import Costs
from onnxcompress.passes.quant.operators import Kind
from onnxcompress.passes.quant.placement import Network, make_plan
from onnxcompress.passes.quant.precision import Precision, wide_points
from onnxcompress.passes.quant.regions import parts, regions, repair
from onnxcompress.passes.quant.variants import only_plan
from onnxcompress.progress import SilentProgress
from onnxcompress.runtime import Array, Session
from tests.builder import ModelBuilder


def _two_regions() -> ir.Model:
    """Two chains of three convolutions with a Sigmoid, which stays float, between them."""
    b = ModelBuilder("two")
    value = b.input("x", [1, 8, 6, 6])
    for half in range(2):
        for _ in range(3):
            value = b.conv(value, 8, 8, bias=False)
        if half == 0:
            value = b.op("Sigmoid", value)
    b.output(value)
    model = b.build()
    model_io.normalize(model)
    return model


def _network(model: ir.Model) -> tuple[Network, frozenset[str]]:
    network = Network(model, symmetric=False)
    return network, frozenset(n.name or "" for n in network.of_kind(Kind.WEIGHTED))


def test_a_float_node_parts_regions() -> None:
    network, chosen = _network(_two_regions())
    found = regions(network, make_plan(network, chosen))
    assert [len(region) for region in found] == [3, 3]
    assert set().union(*found) == chosen


def test_parts_are_regions_and_pieces_of_them() -> None:
    network, chosen = _network(_two_regions())
    found = parts(network, make_plan(network, chosen))
    assert sorted(len(part) for part in found) == [1] * 6 + [3, 3]
    assert len(set(found)) == len(found)
    assert all(part <= chosen for part in found)


class FakeClock:
    """Times that follow from the number of integer convolutions, in place of a real clock."""

    def __init__(self, network: Network, times: Mapping[str, float]) -> None:
        self._times = times
        self._network = network
        self.built: list[frozenset[str]] = []

    def build(self, chosen: frozenset[str]) -> ir.Model:
        self.built.append(chosen)
        model = model_io.clone(_two_regions())
        model.metadata_props["chosen"] = ",".join(sorted(chosen))
        return model

    def time(
        self,
        sessions: Sequence[object],
        feeds: Mapping[str, Array],
        *,
        seconds: float,
        threads: int,
    ) -> list[float]:
        del feeds, seconds, threads
        assert all(isinstance(session, Session) for session in sessions)
        builds = self.built[-len(sessions) + 1 :]
        return [10.0, *(10.0 + sum(self._times[n] for n in names) for names in builds)]


@pytest.mark.parametrize(
    ("gains", "kept"),
    [
        ([-1, -1, -1, 2, 2, 2], [0, 1, 2]),  # the second region is slow: it goes as a whole
        ([-1, -1, 3, -1, -1, -1], [0, 1, 3, 4, 5]),  # one node is slow
        ([1, 1, 1, 1, 1, 1], []),  # nothing pays
    ],
)
def test_only_what_is_slow_goes_back(
    gains: list[float], kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, chosen = _network(_two_regions())
    order = [n for n in network.nodes if n in chosen]
    clock = FakeClock(network, dict(zip(order, gains, strict=True)))
    monkeypatch.setattr(module, "run_times", clock.time)
    found = repair(network, chosen, clock.build, {}, seconds=60.0, progress=SilentProgress())
    assert found.chosen == {order[k] for k in kept}
    assert found.timed > 0


def test_without_time_nothing_is_tried() -> None:
    network, chosen = _network(_two_regions())
    clock = FakeClock(network, {})
    found = repair(network, chosen, clock.build, {}, seconds=-1.0, progress=SilentProgress())
    assert found.chosen == frozenset()
    assert found.timed == 0


def test_the_cost_of_a_lift_is_its_products_and_the_changes_around_it() -> None:
    model = _two_regions()
    network, chosen = _network(model)
    plan = make_plan(network, chosen)
    time = Costs(model, network, plan, {}, for_size=False)
    size = Costs(model, network, plan, {}, for_size=True)
    first, second, third, *_ = [n for n in network.nodes if n in chosen]
    macs = 8 * 8 * 9 * 36
    change = 1e5 + 12 * 8 * 36

    def cost(*names: str, to: Precision = Precision.FLOAT) -> float:
        return time.of(dict.fromkeys(names, to))

    assert time.macs(first) == macs
    assert cost() == 0
    assert cost(first) == pytest.approx(macs)  # x changes later, no change more
    assert cost(second) == pytest.approx(macs + 2 * change)
    assert cost(second, third) == pytest.approx(2 * macs)
    assert cost(first, second, third) == pytest.approx(3 * macs - 2 * change)
    weights = 8 * 8 * 9
    sizes = [size.of({second: p}) for p in (Precision.INT16, Precision.FLOAT16, Precision.FLOAT)]
    assert sizes == pytest.approx([0, weights, 3 * weights], abs=0.01)


def test_wide_points_follow_a_node_and_what_only_moves() -> None:
    b = ModelBuilder("moved")
    x = b.input("x", [1, 4, 6, 6])
    y = b.op("Transpose", b.conv(x, 4, 4, kernel=1), perm=[0, 1, 3, 2])
    b.output(b.conv(b.conv(y, 4, 4, kernel=1), 4, 4, kernel=1))
    model = b.build()
    model_io.normalize(model)
    network, chosen = _network(model)
    plan = make_plan(network, chosen)
    first, _, last = [n for n in network.nodes if n in chosen]
    wide = wide_points(network, plan, frozenset({first}))
    moved = next(n.outputs[0].name for n in model.graph if n.op_type == "Transpose")
    assert "x" in wide
    assert moved in wide
    assert network.nodes[last].outputs[0].name not in wide
    assert wide_points(network, plan, frozenset()) == frozenset()


def test_a_node_alone_on_integers_has_its_points_only() -> None:
    network, chosen = _network(_two_regions())
    plan = make_plan(network, chosen)
    second = [n for n in network.nodes if n in chosen][1]
    alone = only_plan(network, plan, second)
    node = network.nodes[second]
    assert alone.nodes == (second,)
    assert set(alone.points) == {node.inputs[0].name, node.outputs[0].name}  # type: ignore[union-attr]
    assert np.isin(alone.points, plan.points).all()
