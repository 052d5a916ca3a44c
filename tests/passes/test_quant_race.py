"""Which model wins a race with a noisy clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from onnxcompress.passes.quant import race
from onnxcompress.passes.quant.clock import Stopwatch
from onnxcompress.passes.quant.race import Merit, Race
from onnxcompress.runtime import Array, Session

SEEDS = range(40)


def _race(
    monkeypatch: pytest.MonkeyPatch, times: Sequence[float], noise: float, seed: int
) -> tuple[Race, list[int]]:
    """A race of models that take ``times``, and the turns each model has run.

    Each turn is disturbed as a whole, up to twice its time, and each run by itself.
    """
    random = np.random.default_rng(seed)
    turns = [0] * len(times)

    class Noisy(Stopwatch):
        def __init__(self, sessions: Sequence[Session], feeds: Mapping[str, Array]) -> None:
            super().__init__(sessions, feeds)
            self.clock = lambda: float(sum(map(sum, self.times)))

        def turn(self, places: Sequence[int]) -> None:
            burst = 1.0 + (random.random() < 0.3) * random.random()
            for place in places:
                turns[place] += 1
                alone = float(np.exp(noise * random.normal()))
                self.times[place].append(times[place] * burst * alone)

    monkeypatch.setattr(race, "Stopwatch", Noisy)
    sessions = [object.__new__(Session) for _ in times]
    return Race(sessions, {}), turns


def _winner(
    monkeypatch: pytest.MonkeyPatch,
    times: Sequence[float],
    merits: Sequence[float],
    seed: int,
    noise: float,
    luck: float,
) -> int:
    random = np.random.default_rng(seed)
    opened: dict[int, int] = {}
    kept: list[Session] = []

    class Noisy(Stopwatch):
        def __init__(self, sessions: Sequence[Session], feeds: Mapping[str, Array]) -> None:
            super().__init__(sessions, feeds)
            self.clock = lambda: float(sum(map(sum, self.times)))
            self._factors = np.exp(luck * random.normal(size=len(sessions)))

        def turn(self, places: Sequence[int]) -> None:
            for place in places:
                alone = float(self._factors[place] * np.exp(noise * random.normal()))
                self.times[place].append(times[opened[id(self._sessions[place])]] * alone)

    def open_one(place: int) -> Session:
        kept.append(object.__new__(Session))
        opened[id(kept[-1])] = place
        return kept[-1]

    monkeypatch.setattr(race, "Stopwatch", Noisy)
    return race.contest(
        open_one,
        len(times),
        {},
        lambda place, _: Merit(merits[place], merits[place]),
        clear=1.5,
        margin=0.02,
        seconds=200.0,
    ).winner


def _winners(
    monkeypatch: pytest.MonkeyPatch,
    times: Sequence[float],
    merits: Sequence[float],
    noise: float = 0.05,
    luck: float = 0.0,
) -> list[int]:
    """Who wins with each seed; ``luck`` is how far times differ from session to session."""
    return [_winner(monkeypatch, times, merits, seed, noise, luck) for seed in SEEDS]


def test_what_is_no_faster_does_not_win(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _winners(monkeypatch, [1.0, 1.0, 1.01], [0.0, 0.0, 0.0]).count(0) >= len(SEEDS) - 1


def test_what_is_clearly_faster_wins_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(_winners(monkeypatch, [1.0, 0.9, 1.1], [0.0, 0.0, 0.0])) == {1}


def test_merit_counts_as_time_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(_winners(monkeypatch, [1.0, 1.02], [0.0, 0.12])) == {1}
    assert set(_winners(monkeypatch, [1.0, 1.15], [0.0, 0.05])) == {0}


def test_where_the_clock_is_in_doubt_merit_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    with_merit = _winners(monkeypatch, [1.0, 0.96], [0.0, 0.02], noise=0.2)
    without = _winners(monkeypatch, [1.0, 0.94], [0.0, 0.0], noise=0.2)
    assert sum(with_merit) > 0.7 * len(SEEDS) > sum(without)


def test_of_two_that_the_clock_cannot_tell_apart_the_better_outputs_win(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = _winners(monkeypatch, [1.0, 0.8, 0.803], [0.0, 0.0, 0.006], noise=0.02)
    assert found.count(2) >= 0.85 * len(SEEDS)
    assert 0 not in found


def test_a_gain_within_the_noise_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    lower_quartiles = []
    for seed in SEEDS:
        run, _ = _race(monkeypatch, [1.0, 1.0], 0.4, seed)
        run.near(10.0, 0.0)
        seconds = run.seconds
        lower_quartiles.append(int(seconds[1] < 0.98 * seconds[0]))
    assert sum(lower_quartiles) > 0.25 * len(SEEDS)  # what the noise alone would have decided
    assert sum(_winners(monkeypatch, [1.0, 1.0], [0.0, 0.0], noise=0.4)) <= 0.1 * len(SEEDS)


def test_the_luck_of_one_session_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _winners(monkeypatch, [1.0, 1.0], [0.0, 0.0], noise=0.02, luck=0.05)
    assert sum(found) <= 0.15 * len(SEEDS)
    assert sum(_winners(monkeypatch, [1.0, 0.8], [0.0, 0.0], 0.02, 0.05)) >= 0.85 * len(SEEDS)


def test_the_error_says_how_far_gains_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    gains = []
    for seed in SEEDS:
        run, _ = _race(monkeypatch, [1.0, 0.9], 0.1, seed)
        run.near(2.0, 80.0)
        gains.append(run.gain(1, 0))
    off = [abs(g.value - np.log(1 / 0.9)) / g.error for g in gains]
    assert 0.3 < float(np.median(off)) < 1.2
    assert max(off) < 5


def test_heats_end_when_all_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    real = race.Race

    class Counted(real):  # type: ignore[misc, valid-type]
        def __init__(self, sessions: Sequence[Session], feeds: Mapping[str, Array]) -> None:
            opened.append(len(sessions))
            super().__init__(sessions, feeds)

    monkeypatch.setattr(race, "Race", Counted)
    assert _winner(monkeypatch, [1.0, 0.7, 0.69], [0.0, 0.0, 0.0], 0, 0.02, 0.0) in {1, 2}
    assert opened == [3, 3, 3]
    opened.clear()
    assert _winner(monkeypatch, [1.0, 2.0, 3.0], [0.0, 0.0, 0.0], 0, 0.02, 0.0) == 0
    assert opened == [3]


def test_sessions_that_scatter_far_do_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _winners(monkeypatch, [1.0, 0.99], [0.0, -0.016], noise=0.05, luck=0.06)
    assert sum(found) <= 0.1 * len(SEEDS)


def test_more_merit_wins_where_the_clock_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _winners(monkeypatch, [1.0, 1.0], [0.0, 0.016], noise=0.05, luck=0.03)
    assert sum(found) >= 0.85 * len(SEEDS)
    assert sum(_winners(monkeypatch, [1.0, 1.1], [0.0, 0.016], noise=0.05, luck=0.03)) <= 2
