"""Several plans for one budget, of which the one wins that turns out best once it is refitted.

The loss of a group is measured with the layers that read it refitted, and no others, and losses are
added as if groups had nothing to do with each other. Both are wrong in ways that depend on the
network:

- A group that one layer reads is repaired by that layer alone in the measurement, and by all that
  follow in the end. A group that many layers read (a residual stream) is repaired by all of them at
  once already: next to the others it looks cheaper than it is.
- What follows makes up for many small losses better than for one large one.

So plans are also made with the losses of shared groups doubled, and with all losses raised to a
power, which spreads them. Another one is made for time instead of multiply-accumulates: kernels
compute channels in blocks, so that some removals save none and others (a whole branch) save much.
In it the step that takes a branch counts half, for the layer before will do its work.

Each plan is refitted quickly on one part of the samples, and its outputs are compared with the
original's on the other. The least product of error and a power of the time wins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.context import PassContext
from onnxcompress.graph.coupling import Coupling
from onnxcompress.graph.surgery import mask
from onnxcompress.passes.prune.consumers import Layers
from onnxcompress.passes.prune.fit import QUICK
from onnxcompress.passes.prune.options import PruneOptions
from onnxcompress.passes.prune.probe import OutputProbe
from onnxcompress.passes.prune.ranking import workers_of
from onnxcompress.passes.prune.recover import recover
from onnxcompress.passes.prune.samples import split
from onnxcompress.passes.prune.score import Ranking
from onnxcompress.progress import SilentProgress

Plan = Mapping[int, npt.NDArray[np.int64]]

TIME_POWER = 4
"""What time is worth: 1 % less of it makes up for 4 % more error. Where the same network gives up
more multiply-accumulates, 1 % less time costs about 6 % (docs/adr/0015)."""
_SAMPLES = 256
"""Samples that plans are compared on, at most."""


@dataclass(frozen=True, slots=True)
class View:
    """Losses seen in another way: ``(shared · loss) ** power``.

    Attributes:
        shared: Factor for groups that several layers read.
        power: Of all losses.
        whole: Part that counts of the step that leaves nothing of a group.
        timed: Whether removals are to save time, not multiply-accumulates.
    """

    shared: float = 1.0
    power: float = 1.0
    whole: float = 1.0
    timed: bool = False

    def of(self, ranking: Ranking) -> npt.NDArray[np.float64]:
        """Losses after 0, 1, ... removals."""
        factor = self.shared if len(ranking.group.sinks) > 1 else 1.0
        losses = (ranking.losses * factor) ** self.power
        if len(losses) > ranking.group.size:
            losses[-1] = losses[-2] + max(losses[-1] - losses[-2], 0.0) * self.whole
        return losses


VIEWS = (
    View(),
    View(shared=2.0, whole=0.5, timed=True),
    View(shared=2.0),
    View(power=1.5),
)
VARIATIONS = len(VIEWS)
"""Ways to look at the losses; the first one takes them as they are."""


def varied(rankings: Sequence[Ranking], number: int) -> list[Ranking]:
    """The rankings with their losses seen in another way.

    Args:
        rankings: The rankings.
        number: Which of the :data:`VARIATIONS`; 0 changes nothing.
    """
    view = VIEWS[number]
    return [dataclasses.replace(r, losses=view.of(r)) for r in rankings]


def distinct(plans: Sequence[Plan]) -> list[Plan]:
    """Plans that remove different numbers of units, in their order."""
    found: dict[tuple[tuple[int, int], ...], Plan] = {}
    for plan in plans:
        found.setdefault(tuple(sorted((g, len(u)) for g, u in plan.items())), plan)
    return list(found.values())


def winner(
    model: ir.Model,
    reference: ir.Model,
    coupling: Coupling,
    plans: Sequence[Plan],
    layers: Layers,
    options: PruneOptions,
    ctx: PassContext,
    times: Sequence[float] = (),
) -> tuple[int, list[float]]:
    """The plan whose outputs are nearest to the original's on samples that it was not fitted to.

    Args:
        model: The model; it is not changed.
        reference: The original.
        coupling: Its groups.
        plans: Units to be removed, by group; at least one.
        layers: The linear layers.
        options: How to refit.
        ctx: The job.
        times: The time that is left with each plan, as a fraction; all alike if empty.

    Returns:
        Its place, and the error of each plan as in :class:`OutputProbe`; no errors where there are
        too few plans or samples to compare.
    """
    if len(plans) < 2 or ctx.calibration is None:
        return 0, []
    fitting, held_out = split(ctx.calibration)
    if held_out is None:
        return 0, []
    workers = min(workers_of(ctx), len(plans))
    session = dataclasses.replace(ctx.session, threads=1) if workers > 1 else ctx.session
    apart = dataclasses.replace(
        ctx, calibration=fitting, session=session, progress=SilentProgress()
    )
    probe = OutputProbe(reference, held_out, apart, samples=_SAMPLES)

    def error(number: int, candidate: ir.Model) -> float:
        recover(candidate, reference, coupling, plans[number], layers, options, apart, QUICK)
        return probe.error_of(mask(candidate, coupling, plans[number]))

    with (
        ctx.progress.task("prune: comparing plans", len(plans)) as task,
        ThreadPoolExecutor(workers) as pool,
    ):
        running = [pool.submit(error, i, model_io.clone(model)) for i in range(len(plans))]
        errors = []
        for future in running:
            errors.append(future.result())
            task.advance()
    worth = np.array(times or [1.0] * len(plans)) ** TIME_POWER
    return int(np.argmin(np.array(errors) * worth)), errors
