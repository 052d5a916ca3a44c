"""Many plans for one budget, each made with what those before it taught, and the best of them.

The loss of a group is measured with the layers that read it refitted (of a whole branch, the layer
in front of it), and no others, and losses are added as if groups had nothing to do with each other.
Both are wrong in ways that depend on the network: what follows makes up for some losses better than
for others, and a residual stream, which all its readers repair at once in the measurement, looks
cheaper than it is. So a plan is made, refitted quickly on one part of the samples, and its outputs
are compared with the original's on the other part. Each such error is one equation for factors on
the groups' losses (:mod:`onnxcompress.numerics.additivity`), and the next plans are made with the
factors learned so far, and with factors drawn from what is still possible.

Half of the plans are made for time instead of multiply-accumulates: kernels compute channels in
blocks, so that some removals save none and others (a whole branch) save much. The least product of
error and a power of the time wins.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.context import PassContext
from onnxcompress.graph.coupling import Coupling
from onnxcompress.graph.surgery import mask
from onnxcompress.numerics.additivity import Factors, learned
from onnxcompress.passes.prune.consumers import Layers
from onnxcompress.passes.prune.fit import QUICK
from onnxcompress.passes.prune.memory import Memory
from onnxcompress.passes.prune.options import PruneOptions
from onnxcompress.passes.prune.probe import OutputProbe
from onnxcompress.passes.prune.ranking import workers_of
from onnxcompress.passes.prune.recover import recover
from onnxcompress.passes.prune.samples import split
from onnxcompress.passes.prune.score import Ranking
from onnxcompress.progress import SilentProgress

Array = npt.NDArray[np.float64]
Plan = Mapping[int, npt.NDArray[np.int64]]
Maker = Callable[[Sequence[Ranking], bool], Plan]
"""From rankings, and whether time is to be saved, to a plan that keeps the budget."""

TIME_POWER = 2
"""What time is worth: 1 % less of it makes up for 2 % more error. Where the same network gives up
more multiply-accumulates, 1 % less time costs about 6 % (docs/adr/0015), so this is a bargain; but
who asked for a budget of multiply-accumulates wants the error to be least in the first place."""
_ROUND = 4
"""Plans made from the same factors. Fixed, so that results do not depend on the number of cores."""
_PATIENCE = 2
"""Rounds without a better plan after which no more are tried."""
_FEW = 128
"""With fewer samples to judge by, the best plans are judged by others, too."""
_FINALISTS = 3
"""How many plans that are."""
_ATTEMPTS = 8
"""Draws that may give a plan that is known already, before a round is given up."""
_WIDTH = 0.5
"""How far the factors of groups are drawn: by what is possible all groups at once would change by a
factor of two, which is too far."""
_SHARED = float(np.log(2.0) / 2)
"""Believed before: losses of groups that several layers read are to be taken 1.4 times."""
_WHOLE = float(np.log(0.5))
"""Believed before: the step that leaves nothing of a branch counts half, for the layers behind it
make up for some of what the layer in front of it cannot do."""
_SPREAD = float(np.log(2.0))
"""Of the factor of a group's losses: twice or half is nothing unusual."""
_WHOLE_SPREAD = float(np.log(4.0))
"""Of the factor of last steps, of which less is known."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One plan and what became of it.

    Attributes:
        plan: Units to be removed, by group.
        time: What is left of the time, as a fraction.
        error: Of the outputs, as in :class:`OutputProbe`, once refitted quickly.
    """

    plan: Plan
    time: float
    error: float

    @property
    def cost(self) -> float:
        """What is to be least."""
        return float(self.error * self.time**TIME_POWER)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a contest found.

    Attributes:
        first: The plan of the least sum of losses as measured.
        best: The plan to take.
        count: How many were compared.
    """

    first: Trial
    best: Trial
    count: int


class FactoredLosses:
    """The losses of all groups as a function of factors: one for each, and one for last steps.

    Args:
        rankings: Losses as measured.
    """

    def __init__(self, rankings: Sequence[Ranking]) -> None:
        self._rankings = rankings
        shared = [len(r.group.sinks) > 1 for r in rankings]
        self.prior: Array = np.append(np.where(shared, _SHARED, 0.0), _WHOLE)
        self.spread: Array = np.append(np.full(len(rankings), _SPREAD), _WHOLE_SPREAD)
        self.width: Array = np.append(np.full(len(rankings), _WIDTH), 1.0)

    def times(self, factors: Array) -> list[Ranking]:
        """The rankings with their losses multiplied.

        Args:
            factors: [groups + 1].
        """
        found = []
        for ranking, factor in zip(self._rankings, factors, strict=False):
            losses = ranking.losses * factor
            if len(losses) > ranking.group.size:
                losses[-1] = losses[-2] + _last_step(ranking) * factors[-1]
            found.append(dataclasses.replace(ranking, losses=losses))
        return found

    def parts(self, plan: Plan) -> Array:
        """What a plan costs by each factor, [groups + 1]."""
        parts = np.zeros(len(self._rankings) + 1)
        for place, ranking in enumerate(self._rankings):
            count = min(len(plan.get(ranking.group.index, ())), len(ranking.losses) - 1)
            if count == ranking.group.size:
                parts[-1] += _last_step(ranking)
                count -= 1
            parts[place] = ranking.losses[count]
        return parts

    def learned(self, trials: Sequence[Trial]) -> Factors:
        """The factors that explain what became of plans."""
        parts = np.array([self.parts(t.plan) for t in trials]).reshape(-1, len(self.prior))
        return learned(parts, np.array([t.error for t in trials]), self.prior, self.spread)


def _last_step(ranking: Ranking) -> float:
    """The loss of the last unit of a group; the group can go whole."""
    return max(float(ranking.losses[-1] - ranking.losses[-2]), 0.0)


class Judge:
    """Refits plans quickly and measures what is left of the outputs.

    Args:
        model: The model; it is not changed.
        reference: The original.
        coupling: Its groups.
        layers: The linear layers.
        options: How to refit.
        ctx: The job; it has calibration data.
        samples: Samples to fit to, at most, and to judge by.
        place: Which of the samples judge, as in :func:`split`.
    """

    def __init__(
        self,
        model: ir.Model,
        reference: ir.Model,
        coupling: Coupling,
        layers: Layers,
        options: PruneOptions,
        ctx: PassContext,
        samples: int,
        place: int = -1,
    ) -> None:
        self._model, self._reference, self._coupling = model, reference, coupling
        self._layers, self._options = layers, options
        fitting, held_out = (
            (None, None) if ctx.calibration is None else split(ctx.calibration, place)
        )
        self.workers = min(workers_of(ctx), _ROUND)
        group = 1 if fitting is None else fitting.layout.group or 1
        some = None if fitting is None else fitting.spread(max(samples // group, 1) * group)
        self._alone = dataclasses.replace(ctx, calibration=some, progress=SilentProgress())
        threads = 1 if self.workers > 1 else ctx.session.threads
        session = dataclasses.replace(ctx.session, threads=threads)
        self._ctx = dataclasses.replace(self._alone, session=session)
        self._memory = Memory()
        self._probe = (
            None
            if held_out is None
            else OutputProbe(reference, held_out, self._ctx, samples=samples)
        )

    @property
    def judging(self) -> int:
        """Samples to judge by; 0 if there are too few to hold any back."""
        return 0 if self._probe is None else self._probe.data.sample_count

    def learn(self, other: Judge) -> None:
        """Take over what another judge of the same model knows that is no matter of samples."""
        self._memory = other._memory.without_answers

    def errors_of(self, plans: Iterable[Plan]) -> Iterator[float]:
        """The error of each plan on samples that it was not fitted to.

        A plan is taken, by the thread that asks for errors, while those before it are tried.
        """
        tasks = iter(plans)
        if not self._memory.filled:
            # What the first one finds serves all others, so it has all cores to itself.
            filling = Memory()
            for plan in itertools.islice(tasks, 1):
                error = self._error_of(self._copy(), plan, filling, self._alone)
                self._memory = dataclasses.replace(filling, filled=True)
                yield error
        memory, ctx = self._memory, self._ctx

        def error_of(task: tuple[ir.Model, Plan]) -> float:
            return self._error_of(*task, memory, ctx)

        with ThreadPoolExecutor(self.workers) as pool:
            yield from pool.map(error_of, ((self._copy(), plan) for plan in tasks))

    def _copy(self) -> ir.Model:
        """A model to refit. Threads must not read a graph while others do: one makes them all."""
        return model_io.clone(self._model)

    def _error_of(self, candidate: ir.Model, plan: Plan, memory: Memory, ctx: PassContext) -> float:
        if self._probe is None:
            return 0.0
        recover(
            candidate,
            self._reference,
            self._coupling,
            plan,
            self._layers,
            self._options,
            ctx,
            QUICK,
            memory,
        )
        return self._probe.error_of(mask(candidate, self._coupling, plan))


def best_plan(
    first: Plan,
    rankings: Sequence[Ranking],
    make: Maker,
    time_left: Callable[[Plan], float],
    judges: Sequence[Judge],
    count: int,
    ctx: PassContext,
    *,
    timed: bool,
) -> Verdict | None:
    """The plan that turns out best.

    Args:
        first: The plan of the least sum of losses as measured.
        rankings: The groups with their losses.
        make: Makes a plan.
        time_left: The time that a plan leaves, as a fraction.
        judges: The first one measures what a plan does. The best of many looks better than it is
            where few samples judge: then the others decide between the best few, too.
        count: Plans to be tried.
        ctx: The job: its seed, and where progress is shown.
        timed: Whether plans for time compete.

    Returns:
        None where there is nothing to compare.
    """
    judge, *others = judges
    if count < 2 or not rankings or not judge.judging:
        return None
    losses = FactoredLosses(rankings)
    rng = np.random.default_rng(ctx.seed)
    trials: dict[tuple[tuple[int, int], ...], Trial] = {}
    factors = losses.learned(())

    def plans(factors: Factors, fresh: list[Plan]) -> Iterator[Plan]:
        """The plans of a round, none of them known, as they are made; they are put down, too."""
        room = min(_ROUND, count - len(trials))
        known = set(trials)
        if not known:
            known.add(_key(first))
            fresh.append(first)
            yield first
        for attempt in range(_ATTEMPTS):
            if len(fresh) >= room:
                break
            likely = attempt < 1 + timed
            drawn = factors.likely if likely else factors.drawn(rng, losses.width)
            plan = make(losses.times(drawn), timed and attempt % 2 == 1)
            if _key(plan) not in known:
                known.add(_key(plan))
                fresh.append(plan)
                yield plan

    with ctx.progress.task("prune: comparing plans", count) as task:
        while len(trials) < count:
            fresh: list[Plan] = []
            for place, error in enumerate(judge.errors_of(plans(factors, fresh))):
                plan = fresh[place]
                trials[_key(plan)] = Trial(plan, time_left(plan), error)
                task.advance()
            if not fresh:
                break
            costs = [t.cost for t in trials.values()]
            if costs.index(min(costs)) < len(costs) - _PATIENCE * _ROUND:
                break
            factors = losses.learned(list(trials.values()))
    if len(trials) < 2:
        return None
    best = sorted(trials.values(), key=lambda t: t.cost)
    if judge.judging < _FEW:
        for other in others:
            other.learn(judge)
        best = _once_more(best[:_FINALISTS], others)
    return Verdict(trials[_key(first)], best[0], len(trials))


def _once_more(trials: Sequence[Trial], judges: Sequence[Judge]) -> list[Trial]:
    """Trials with the mean of the errors that more judges measure, the best first."""
    plans = [t.plan for t in trials]
    errors = [[t.error for t in trials], *(list(j.errors_of(plans)) for j in judges)]
    means = np.mean(errors, axis=0).tolist()
    again = [dataclasses.replace(t, error=e) for t, e in zip(trials, means, strict=True)]
    return sorted(again, key=lambda t: t.cost)


def _key(plan: Plan) -> tuple[tuple[int, int], ...]:
    """What makes plans alike: they remove equally many units of each group."""
    return tuple(sorted((g, len(u)) for g, u in plan.items() if len(u)))
