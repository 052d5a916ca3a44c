"""Models run in turns until it is clear which of them is better, or the time is over.

Two models are compared by the ratio of their times in the *same* turn: what disturbs the machine
lasts longer than a turn and cancels out. The logarithm of that ratio has a median over the turns
and an error,

    error² = (1.2533 σ)² / (n - 3) + 0.005²,    σ = 1.4826 · median |r - median r|,

the error of a median of n turns, σ from the median absolute deviation (3 turns less, since few
turns seem to agree more than they do), and what the place of a session's memory adds. Beside a busy
processor the median of ratios scattered by 4 % between sessions where the ratio of two lower
quartiles scattered by 7 % (a small image classifier, 40 turns), by no more than the error says.

Where a session's memory happens to lie changes its speed too, by up to a tenth, for as long as it
is open. So what is not clearly slower in a first heat runs another one in new sessions; the gain is
the mean of both, weighted by their errors, and where they disagree the median with a third one.

A clock alone decides near ties by chance. So the first model keeps its place unless another one
gains more than a margin, and that clearly: more than two and a half times the error, or with a
merit that is greater by 0.01 at least, which is not measured in time and does not scatter. Turns go
on as long as a comparison is open. The best one wins, and of what the clock cannot tell apart from
it the one with the greatest fidelity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

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
"""A model of more merit wins without being clear of the noise: what does not scatter decides."""

_SHARE_TO_DROP = 0.25
"""Share of the time to find the models that are clearly slower."""

_LOOK_EVERY = 4
_FIRST_TURNS = 9
_MOST_TURNS = 400


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

    def agrees_with(self, other: Gain) -> bool:
        """Whether two heats differ by no more than their errors let expect."""
        return abs(self.value - other.value) < _Z * math.hypot(self.error, other.error)

    def may_exceed(self, margin: float) -> bool:
        """Whether the truth may be more than ``margin``."""
        return self.value + _Z * self.error > margin


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
        return Gain(
            middle, math.hypot(1.2533 * spread / math.sqrt(max(count - 3, 1)), _SESSION_ERROR)
        )

    def scores(
        self, merits: Mapping[int, float], *, margin: float, seconds: float
    ) -> dict[int, Gain]:
        """What models gain in time and merit over the first of them.

        Args:
            merits: Place to what counts besides the clock, in the unit of a logarithm of time, for
                places that :meth:`near` gave, or all.
            margin: What a model must gain: turns end where all gain clearly more, or less.
            seconds: About how much processor time to spend, at most.
        """
        first, *others = merits
        stop = self._watch.clock() + seconds
        turns = len(self._watch.times[first])
        while others and turns < _MOST_TURNS:
            if turns >= _FIRST_TURNS:
                late = self._watch.clock() > stop
                if late or not any(
                    self._score(p, first, merits).is_open(margin, _Z_EARLY) for p in others
                ):
                    break
            for _ in range(_LOOK_EVERY):
                self._watch.turn(list(merits))  # all of them, so that every pair is compared
            turns += _LOOK_EVERY
        return {place: self._score(place, first, merits) for place in others}

    def _score(self, place: int, first: int, merits: Mapping[int, float]) -> Gain:
        gain = self.gain(place, first)
        return Gain(gain.value + merits[place] - merits[first], gain.error)


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
    share = (1.0 - _SHARE_TO_DROP) / 2.0
    scores = heat.scores(merits, margin=margin, seconds=share * seconds)

    def again(places: Sequence[int]) -> dict[int, Gain]:
        """The scores of ``places`` in new sessions."""
        all_places = [0, *places]
        race = Race([open_one(place) for place in all_places], feeds)
        known = {k: merits[place] for k, place in enumerate(all_places)}
        found = race.scores(known, margin=margin, seconds=share * seconds)
        return {all_places[k]: each for k, each in found.items()}

    maybe = [place for place, score in scores.items() if score.may_exceed(margin)]
    if maybe:
        second = again(maybe)
        apart = [place for place in maybe if not scores[place].agrees_with(second[place])]
        third = again(apart) if apart else {}
        for place in maybe:
            heats = [scores[place], second[place], *(third[p] for p in apart if p == place)]
            scores[place] = _pooled(heats)
    winner = _decided(scores, found_merits, 0, margin)
    return Result(winner, heat.seconds, scores)


def _pooled(heats: Sequence[Gain]) -> Gain:
    """The mean of two heats that agree, weighted by their errors; the median of three.

    How far the nearest of the others is from the median counts as its error.
    """
    if len(heats) > 2:
        low, middle, high = sorted(heats, key=lambda heat: heat.value)
        near = min(middle.value - low.value, high.value - middle.value)
        return Gain(middle.value, max(middle.error, near))
    weights = [1.0 / heat.error**2 for heat in heats]
    value = sum(w * heat.value for w, heat in zip(weights, heats, strict=True)) / sum(weights)
    return Gain(value, 1.0 / math.sqrt(sum(weights)))


def _decided(
    scores: Mapping[int, Gain], merits: Mapping[int, Merit], first: int, margin: float
) -> int:
    """The winner among those that clearly gain over ``first``; ``first`` if none does."""
    least = merits[first].value + _SOME_MERIT
    clear = [
        score.value
        for place, score in scores.items()
        if score.value > max(margin, 0.0 if merits[place].value >= least else _Z * score.error)
    ]
    if not clear:
        return first
    best = max(clear)
    tied = [
        place
        for place, score in scores.items()
        if score.value > margin and best - score.value <= max(margin, min(score.error, _MOST_TIED))
    ]
    return max(tied, key=lambda place: (merits[place].fidelity, -place))
