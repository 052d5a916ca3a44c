"""Models run in turns until it is clear which of them is better, or the time is over.

Two models are compared by the ratio of their times in the *same* turn: what disturbs the machine
lasts longer than a turn and cancels out. Beside a busy processor the median of ratios scattered by
4 % between sessions where the ratio of two lower quartiles scattered by 7 % (a small image
classifier, 40 turns).

Where a session's memory happens to lie changes its speed, for as long as it is open, and by far
more than turns scatter: the standard deviation between ten sessions of one model, timed in turns,
was 1 % to 4 % on image classifiers and 7 % on a small recurrent net, where the median of 40 turns
let expect 0.8 to 1.7 %. So a comparison is made of *heats* of a few turns, each in new sessions. A
heat gives the median of the logarithm of the ratio; what counts is the trimmed mean of the heats
(:mod:`onnxcompress.numerics.robust`) and its error, which holds all that sessions and turns
scatter. That error is at least the one within heats,

    error² = (1.2533 σ)² / (n - 3) / heats + 0.005²,    σ = 1.4826 · median |r - median r|,

the error of a median of n turns, σ from the median absolute deviation (3 turns less, since few
turns seem to agree more than they do): few heats may agree by chance.

A clock alone decides near ties by chance. So the first model keeps its place unless another one
gains more than a margin, and that clearly, more than two and a half times the error. A model whose
merit is greater by 0.01 at least, which is not measured in time and does not scatter, needs no more
than to be no worse within the error: where the clock cannot tell two apart, merit decides. Heats go
on as long as a comparison is open. The best one wins, and of what the clock cannot tell apart from
it the one with the greatest fidelity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcompress.numerics.robust import trimmed_mean
from onnxcompress.passes.quant.clock import Stopwatch
from onnxcompress.runtime import Array, Session

_Z = 2.5
"""Errors that a difference must exceed to be one."""

_Z_EARLY = 3.0
"""Errors that end a comparison before its time: it is looked at often."""

_SESSION_ERROR = 0.005
_MOST_TIED = 0.03
"""Further behind the best one no noise makes a tie."""

_SOME_MERIT = 0.01
"""A model of so much more merit wins without being clear of the noise, nor of the margin."""

_SHARE_TO_DROP = 0.25
"""Share of the time to find the models that are clearly slower."""

_HEAT_TURNS = 8
_SLOW_HEAT_TURNS = 4
"""Turns of one heat; of one that begins after its time."""

_FEWEST_HEATS = 3
_HEATS_TO_GIVE_UP = 5
"""Heats after which a model that is an error below its bar is not waited for."""

_MOST_HEATS = 16


@dataclass(frozen=True, slots=True)
class Gain:
    """How much faster one model is than another.

    Attributes:
        value: Logarithm of the other's time over its own, and merit where that counts.
        error: Standard error of ``value``.
    """

    value: float
    error: float

    def is_open(self, margin: float, errors: float) -> bool:
        """Whether the truth may lie on either side of ``margin``."""
        return abs(self.value - margin) < errors * self.error


@dataclass(frozen=True, slots=True)
class Merit:
    """What counts besides the clock.

    Attributes:
        value: In the unit of a logarithm of time.
        fidelity: What decides between models that are equally good by time and ``value``; more is
            better.
    """

    value: float
    fidelity: float


class Race:
    """Models that are run in turns.

    Args:
        sessions: Models opened with one thread.
        feeds: One run's inputs.
    """

    def __init__(self, sessions: Sequence[Session], feeds: Mapping[str, Array]) -> None:
        self._watch = Stopwatch(sessions, feeds)

    def near(self, clear: float, seconds: float) -> list[int]:
        """The first one, whose session may be an unlucky one, and those not clearly slower.

        Args:
            clear: How many times as long a run takes that is clearly slower.
            seconds: About how much processor time to spend, at most.
        """
        left = self._watch.run(seconds=seconds, clear=clear, keep=(0,))
        times = self.seconds
        least = min(times[place] for place in left)
        return [place for place in left if place == 0 or times[place] <= clear * least]

    @property
    def clock(self) -> Callable[[], float]:
        """What measures."""
        return self._watch.clock

    @property
    def seconds(self) -> list[float]:
        """Time of one run of each."""
        return self._watch.seconds

    def gain(self, place: int, over: int) -> Gain:
        """How much faster number ``place`` is than number ``over``."""
        mine, theirs = self._watch.times[place], self._watch.times[over]
        count = min(len(mine), len(theirs))
        ratios = np.log(np.asarray(theirs[:count]) / np.asarray(mine[:count]))
        middle = float(np.median(ratios))
        spread = 1.4826 * float(np.median(np.abs(ratios - middle)))
        return Gain(middle, 1.2533 * spread / math.sqrt(max(count - 3, 1)))

    def turns(self, count: int) -> None:
        """Run all of them some turns more."""
        for _ in range(count):
            self._watch.turn(range(len(self._watch.times)))


@dataclass(frozen=True, slots=True)
class Result:
    """How a contest ended.

    Attributes:
        winner: The place of the winner.
        seconds: Time of one run of each model.
        scores: What those gain over the first one that are near it in time.
    """

    winner: int
    seconds: Sequence[float]
    scores: Mapping[int, Gain]


def contest(
    open_one: Callable[[int], Session],
    count: int,
    feeds: Mapping[str, Array],
    merit: Callable[[int, Session], Merit],
    *,
    clear: float,
    margin: float,
    seconds: float,
) -> Result:
    """The best of some models by time and merit; the first of them unless one clearly gains.

    Args:
        open_one: Opens a model in a new session of one thread.
        count: How many models there are.
        feeds: One run's inputs.
        merit: What counts besides the clock, for a model and a session of it; asked for once for
            each model that is near the fastest.
        clear: How many times as long a run takes that is too slow for any merit.
        margin: What a model must gain.
        seconds: About how much processor time to spend, at most.
    """
    sessions = [open_one(place) for place in range(count)]
    heat = Race(sessions, feeds)
    near = heat.near(clear, _SHARE_TO_DROP * seconds)
    found_merits = {place: merit(place, sessions[place]) for place in near}
    merits = {place: each.value for place, each in found_merits.items()}
    heats = {place: [heat.gain(place, 0)] for place in near if place}

    def scores() -> dict[int, Gain]:
        """What models gain in time and merit over the first of them."""
        found = {place: _pooled(each) for place, each in heats.items()}
        return {p: Gain(g.value + merits[p] - merits[0], g.error) for p, g in found.items()}

    def is_open(place: int, score: Gain) -> bool:
        much = merits[place] >= merits[0] + _SOME_MERIT
        bar = 0.0 if much else margin
        hopeless = len(heats[place]) >= _HEATS_TO_GIVE_UP and score.value < bar - score.error
        return score.is_open(bar, _Z_EARLY) and not hopeless

    clock, open_places = heat.clock, list(heats)
    stop = clock() + (1.0 - _SHARE_TO_DROP) * seconds
    for count in range(2, _MOST_HEATS + 1):
        late = clock() > stop
        if not open_places or (late and count > _FEWEST_HEATS):
            break
        # In another order each time: what is closed leaves its memory to the next.
        order = [0, *open_places]
        order = [*order[count % len(order) :], *order[: count % len(order)]]
        race = Race([open_one(place) for place in order], feeds)
        race.turns(_SLOW_HEAT_TURNS if late else _HEAT_TURNS)
        for place in open_places:
            heats[place].append(race.gain(order.index(place), order.index(0)))
        if count >= _FEWEST_HEATS:
            open_places = [
                p for p, score in scores().items() if p in open_places and is_open(p, score)
            ]
    found = scores()
    return Result(_decided(found, found_merits, 0, margin), heat.seconds, found)


def _pooled(heats: Sequence[Gain]) -> Gain:
    """The trimmed mean of some heats."""
    mean = trimmed_mean([heat.value for heat in heats])
    within = math.sqrt(sum(heat.error**2 for heat in heats)) / len(heats)
    error = within if len(heats) == 1 else max(mean.error, within)
    return Gain(mean.value, math.hypot(error, _SESSION_ERROR))


def _decided(
    scores: Mapping[int, Gain], merits: Mapping[int, Merit], first: int, margin: float
) -> int:
    """The winner among those that are above their bar; ``first`` if none is."""
    above = [
        place
        for place, score in scores.items()
        if score.value > _bar(score, merits[place], merits[first], margin)
    ]
    if not above:
        return first
    best = max(scores[place].value for place in above)
    tied = [
        place
        for place, score in scores.items()
        if (place in above or score.value > margin)
        and best - score.value <= max(margin, min(score.error, _MOST_TIED))
    ]
    return max(tied, key=lambda place: (merits[place].fidelity, -place))


def _bar(score: Gain, merit: Merit, first: Merit, margin: float) -> float:
    """What a model must gain in all."""
    if merit.value >= first.value + _SOME_MERIT:
        return -min(score.error, _MOST_TIED)
    return max(margin, _Z * score.error)
