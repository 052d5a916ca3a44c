"""The search for a placement, with a clock that tells what the test wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.synthetic import synthetic_dataset
from onnxcompress.passes.quant import QuantOptions, QuantPass, by_clock, race, search
from onnxcompress.passes.quant.clock import Stopwatch, run_times
from onnxcompress.passes.quant.cores import Arena, Speed, Verdict
from onnxcompress.passes.quant.judge import Rated
from onnxcompress.passes.quant.options import Mode
from onnxcompress.passes.quant.placement import Network
from onnxcompress.passes.quant.search import Candidate, chosen_by
from onnxcompress.runtime import Array, Session
from onnxcompress.targets import detect_target
from tests.fixtures import fixture
from tests.running import SETTINGS, context

Cost = Callable[[frozenset[str]], float]
"""Time of a placement, or its SQNR, by the nodes on integers."""


def _model(name: str) -> ir.Model:
    model = fixture(name).build()
    model_io.normalize(model)
    return model


def _names(network: Network) -> frozenset[str]:
    return frozenset(n for n in network.nodes if n not in network.refusals)


def _search(
    monkeypatch: pytest.MonkeyPatch,
    model: ir.Model,
    cost: Cost,
    fidelity: Cost = lambda _: 30.0,
) -> search.Found:
    """Search ``model`` where a placement takes the time ``cost`` gives it."""
    network = Network(model, symmetric=False)
    allowed = chosen_by(network, _names(network), Candidate(pools=True))
    built: dict[int, frozenset[str]] = {}

    def fake_open(choice: frozenset[str], _: object) -> Session:
        session = object.__new__(Session)
        built[id(session)] = choice
        kept.append(session)
        return session

    kept: list[Session] = []

    class Fixed(Stopwatch):
        """Every turn takes the same time."""

        def turn(self, places: Sequence[int]) -> None:
            for place in places:
                self.times[place].append(cost(built[id(self._sessions[place])]))

    monkeypatch.setattr(search, "open_session", fake_open)
    monkeypatch.setattr(race, "Stopwatch", Fixed)

    def build(choice: frozenset[str]) -> ir.Model:
        return choice  # type: ignore[return-value]

    def rate(choice: ir.Model, _: Session) -> Rated:
        return Rated(choice, fidelity(choice), 1000)  # type: ignore[arg-type]

    progress = context(Path()).progress
    return search.search(network, allowed, build, rate, {}, seconds=60, progress=progress)


def _slow(*names: str) -> Cost:
    """Each of ``names`` costs 1 more on integers; every other node saves 0.1."""
    return lambda chosen: 10 + sum(1.0 if n in names else -0.1 for n in chosen)


def test_slow_stems_stay_float(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _search(monkeypatch, _model("residual_bn"), _slow("conv_0", "conv_1"))
    assert found.candidate.prefix == 2
    assert found.timed > 3


def test_slow_depthwise_convolutions_stay_float(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("depthwise_separable")
    depthwise = [
        n.name or ""
        for n in model.graph
        if n.op_type == "Conv" and n.attributes["group"].as_int() > 1
    ]
    found = _search(monkeypatch, model, _slow(*depthwise))
    network = Network(model, symmetric=False)
    chosen = chosen_by(network, _names(network), found.candidate)
    assert chosen
    assert chosen.isdisjoint(depthwise)


def test_where_integers_win_everywhere_everything_is_on_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = _search(monkeypatch, _model("conv_chain"), lambda chosen: 10.0 - len(chosen))
    assert (found.candidate.suffix, found.candidate.channels, found.candidate.prefix) == (0, 0, 0)


@pytest.mark.parametrize("cost", [0.01, -0.01])
def test_a_small_gain_is_noise(cost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _search(monkeypatch, _model("conv_chain"), lambda chosen: 10 + cost * len(chosen))
    # The first layer stays in float unless integers are clearly faster there.
    assert (found.candidate.suffix, found.candidate.prefix) == (0, 1)


@pytest.mark.parametrize(
    ("gain_db", "slower", "prefix"), [(3, 1.01, 1), (3, 1.06, 0), (8, 1.06, 1)]
)
def test_accuracy_decides_where_times_are_near(
    gain_db: float, slower: float, prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _search(
        monkeypatch,
        _model("conv_chain"),
        lambda chosen: 10 * slower ** ("conv_0" not in chosen) + len({"conv_1", "conv_2"} - chosen),
        lambda chosen: 25.0 + gain_db * ("conv_0" not in chosen),
    )
    assert found.candidate.prefix == prefix


@pytest.mark.parametrize(
    ("ratio", "integer", "said"),
    [(2.0, True, ""), (1.0, True, "not faster"), (0.5, False, "slower than in float")],
)
def test_a_result_slower_than_float_is_not_shipped(
    ratio: float, integer: bool, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    speed = Speed((float(np.log(ratio)),) * 5, 0.1)
    monkeypatch.setattr(by_clock, "run_times", lambda *_, **__: [ratio, 1.0])
    monkeypatch.setattr(Arena, "hear", lambda self, *_: Verdict(self.threads, speed, self.limit))
    model = _model("conv_chain")
    ctx = context(tmp_path, synthetic_dataset(model, samples=8, seed=0))
    ctx = type(ctx)(
        target=detect_target(), work_dir=tmp_path, calibration=ctx.calibration, session=SETTINGS
    )
    report = QuantPass(QuantOptions(mode=Mode.STATIC)).run(model, ctx)
    assert bool(report.figures["integer_nodes"]) == integer
    assert report.figures["speed_ratio"] == ratio
    assert any(said in note for note in report.notes) == bool(said)


class _Busy(Session):
    """A model that only keeps the processor busy."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        del feeds, outputs
        return {"y": np.asarray(sum(range(self.steps)))}


def test_the_clock_tells_more_work_from_less() -> None:
    little, much = run_times([_Busy(500), _Busy(20_000)], {}, seconds=0.05)
    assert 0 < 3 * little < much


def test_a_race_ends_when_it_is_decided() -> None:
    runs = [0, 0]

    class Counted(_Busy):
        def __init__(self, steps: int, place: int) -> None:
            super().__init__(steps)
            self.place = place

        def run(
            self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
        ) -> dict[str, Array]:
            runs[self.place] += 1
            return super().run(feeds, outputs)

    little, much = run_times([Counted(50_000, 0), Counted(500_000, 1)], {}, seconds=60, clear=1.1)
    assert 3 * little < much
    assert runs[1] < 20


def test_outputs_of_slow_placements_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[frozenset[str]] = []

    def fidelity(chosen: frozenset[str]) -> float:
        looked.append(chosen)
        return 30.0

    def cost(chosen: frozenset[str]) -> float:
        """Only the first layer is faster in float."""
        return 20.0 - sum(-4 if n == "conv_0" else 4 for n in chosen if n.startswith("conv"))

    found = _search(monkeypatch, _model("conv_chain"), cost, fidelity)
    assert found.timed >= 2
    assert {cost(chosen) for chosen in looked} == {min(map(cost, looked))}


def test_a_candidate_says_what_stays_float() -> None:
    words = str(Candidate(prefix=2, depthwise=128, joins=False))
    assert words == (
        "in float: the first 2 weighted nodes, depthwise convolutions of fewer than 128 channels, "
        "Add and Mul, average pools"
    )
    assert str(Candidate(pools=True)) == "all on integers"
