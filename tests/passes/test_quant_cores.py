"""Whether a result is slower than float with several threads, by a noisy clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onnxcompress import _threads, model_io
from onnxcompress.calibration.synthetic import synthetic_dataset
from onnxcompress.passes.quant import by_clock, cores
from onnxcompress.passes.quant.clock import Stopwatch
from onnxcompress.passes.quant.cores import MAY_BE_SLOWER, Arena, Speed, Verdict, thread_counts
from onnxcompress.passes.quant.options import Mode, QuantOptions
from onnxcompress.passes.quant.quant_pass import QuantPass
from onnxcompress.runtime import Array, Session, SessionSettings, open_session
from onnxcompress.targets import detect_target
from tests.builder import ModelBuilder
from tests.running import context

_SEEDS = range(30)


class _Machine:
    """A wall clock on which a run of float takes 1 ms and one of the result ``1 / ratio``.

    Each run is disturbed by itself (``noise``) and each session by where it lies (``luck``); every
    third run is cut off and takes three times as long.
    """

    def __init__(self, ratio: float, noise: float, luck: float, seed: int) -> None:
        self.now = 0.0
        self.opened = 0
        self._random = np.random.default_rng(seed)
        self._noise, self._luck = noise, luck
        self._times = (1e-3, 1e-3 / ratio)

    def open(self, settings: SessionSettings) -> Session:
        assert settings.threads == 4
        self.opened += 1
        self.now += 0.01
        return object.__new__(Session)

    def watch(self) -> type[Stopwatch]:
        machine = self

        class Noisy(Stopwatch):
            def __init__(
                self, sessions: Sequence[Session], feeds: Mapping[str, Array], *, threads: int
            ) -> None:
                super().__init__(sessions, feeds, threads=threads)
                luck = machine._luck * machine._random.normal(size=len(sessions))
                self._each = np.array(machine._times) * np.exp(luck)

            def turn(self, places: Sequence[int]) -> None:
                for place in places:
                    cut = 1.0 + 2.0 * (machine._random.random() < 1 / 3)
                    alone = float(np.exp(machine._noise * machine._random.normal()))
                    self.times[place].append(float(self._each[place]) * cut * alone)
                    machine.now += 10 * self.times[place][-1]

        return Noisy


def _verdict(
    monkeypatch: pytest.MonkeyPatch, ratio: float, noise: float, luck: float, seed: int = 0
) -> tuple[Verdict, _Machine]:
    machine = _Machine(ratio, noise, luck, seed)
    monkeypatch.setattr(cores, "Stopwatch", machine.watch())
    arena = Arena(4, 0.98, clock=lambda: machine.now)
    return arena.hear(machine.open, machine.open, {}), machine


@pytest.mark.parametrize(
    ("ratio", "slower"), [(0.8, True), (0.9, True), (1.0, False), (1.5, False)]
)
def test_a_quiet_machine_tells_what_is_slower(
    ratio: float, slower: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in _SEEDS:
        verdict, _ = _verdict(monkeypatch, ratio, 0.03, 0.01, seed)
        assert verdict.slower == slower
        assert verdict.speed.ratio == pytest.approx(ratio, rel=0.05)


def test_a_busy_machine_condemns_nothing_that_is_not_slower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    condemned = [_verdict(monkeypatch, 1.0, 0.3, 0.15, seed)[0].slower for seed in _SEEDS]
    assert sum(condemned) <= 1
    condemned = [_verdict(monkeypatch, 0.6, 0.3, 0.15, seed)[0].slower for seed in _SEEDS]
    assert sum(condemned) >= 0.8 * len(_SEEDS)


def test_what_is_clearly_faster_takes_three_heats(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict, machine = _verdict(monkeypatch, 2.0, 0.03, 0.01)
    assert len(verdict.speed.heats) == 3
    assert machine.opened == 6
    assert verdict.notes == ()
    assert verdict.figures["cores_timed"] == 4


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict, machine = _verdict(monkeypatch, 0.98, 0.3, 0.2, 1)
    assert machine.now < 8
    assert verdict.speed.seconds == pytest.approx(machine.now)


def test_single_heats_do_not_decide() -> None:
    heats = (0.80, 0.81, 0.79, 0.80, 0.82, 0.80)
    usual, disturbed = (Speed(tuple(np.log(h)), 1.0) for h in (heats, (*heats, 5.4)))
    assert disturbed.ratio == pytest.approx(usual.ratio, rel=0.02)
    assert disturbed.is_below(0.98)
    assert not Speed(tuple(np.log(heats[:4])), 1.0).is_below(0.98)  # too few


def test_what_stays_open_is_said_and_not_acted_on() -> None:
    heats = (-0.3, 0.1, -0.2, 0.05, -0.1)
    verdict = Verdict(2, Speed(heats, 1.0), 0.98)
    assert not verdict.slower
    assert verdict.notes[0].startswith(f"{MAY_BE_SLOWER} with 2 threads: 0.92 times")
    clear = Verdict(2, Speed(tuple(h / 100 - 0.09 for h in heats), 1.0), 0.98)
    assert clear.slower
    assert clear.notes == ()


def test_what_the_user_asks_for_counts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 8)
    assert thread_counts(0) == (1, 8)
    assert thread_counts(1) == (1,)
    assert thread_counts(3) == (3,)
    monkeypatch.setattr(cores, "usable_cores", lambda: 1)
    assert thread_counts(0) == (1,)
    assert _threads.usable_cores() >= 1


def test_real_models_are_timed_on_threads() -> None:
    b = ModelBuilder("one")
    b.output(b.conv(b.input("x", [1, 4, 6, 6]), 4, 4))
    model = b.build()
    model_io.normalize(model)

    def opened(settings: SessionSettings) -> Session:
        return open_session(model, settings)

    verdict = Arena(2, 0.98, seconds=0.01).hear(
        opened, opened, {"x": np.zeros((1, 4, 6, 6), np.float32)}
    )
    assert 0.05 < verdict.speed.ratio < 20
    assert verdict.speed.seconds > 0


@pytest.mark.parametrize(("asked", "shown"), [(0, 2.0), (4, 0.5)])
def test_slower_with_the_threads_that_count_is_not_shipped(
    asked: int, shown: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    b = ModelBuilder("chain")
    value = b.input("x", [1, 8, 6, 6])
    for _ in range(3):
        value = b.conv(value, 8, 8)
    b.output(value)
    model = b.build()
    model_io.normalize(model)
    timed = []

    def hear(self: Arena, *_: object) -> Verdict:
        timed.append(self.threads)
        return Verdict(self.threads, Speed((float(np.log(0.5)),) * 5, 0.1), self.limit)

    monkeypatch.setattr(by_clock, "run_times", lambda *_, **__: [2.0, 1.0])
    monkeypatch.setattr(cores, "usable_cores", lambda: 4)
    monkeypatch.setattr(Arena, "hear", hear)
    ctx = replace(
        context(tmp_path, synthetic_dataset(model, samples=8, seed=0)),
        target=detect_target(),
        session=SessionSettings(threads=asked),
    )
    report = QuantPass(QuantOptions(mode=Mode.STATIC, cache=False, search_seconds=0.1)).run(
        model, ctx
    )
    assert report.figures["integer_nodes"] == 0
    assert report.figures["speed_ratio"] == shown
    assert report.figures["cores_speed_ratio"] == 0.5
    assert set(timed) == {4}
