"""All groups ranked with calibration data: moments collected, groups scored side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress._threads import side_by_side, usable_cores
from onnxcompress.context import PassContext
from onnxcompress.errors import DataError
from onnxcompress.graph.coupling import Coupling, Group
from onnxcompress.graph.surgery import mask
from onnxcompress.passes._batches import batches_within
from onnxcompress.passes.prune.consumers import Layers
from onnxcompress.passes.prune.fronts import MOMENT_BYTES, with_fronts
from onnxcompress.passes.prune.options import PruneOptions
from onnxcompress.passes.prune.probe import PROBE_SAMPLES, OutputProbe
from onnxcompress.passes.prune.samples import split
from onnxcompress.passes.prune.score import (
    Ranking,
    Reader,
    Scored,
    State,
    moments_request,
    readers_of,
)
from onnxcompress.passes.prune.states import through_ports
from onnxcompress.passes.prune.suffix import SuffixProbe

Indices = npt.NDArray[np.int64]

_MAX_WORKERS = 8
"""Groups ranked at a time at most."""


def rank_with_data(
    model: ir.Model,
    coupling: Coupling,
    groups: Sequence[Group],
    layers: Layers,
    options: PruneOptions,
    ctx: PassContext,
    removed: Mapping[int, Indices],
    branches: Collection[int] = (),
    samples: int = PROBE_SAMPLES,
) -> list[Ranking]:
    """Rankings of all groups, with curves scaled by the measured change of the model's outputs.

    Args:
        model: The model, refitted after ``removed``.
        coupling: Its groups.
        groups: Those to rank.
        layers: The linear layers.
        options: The criterion.
        ctx: The job; it has calibration data.
        removed: Units already removed; they come first in every order.
        branches: Groups all of whose units may go.
        samples: Held-out samples to measure on, at most.
    """
    readers = {g.index: readers_of(g, layers.consumers) for g in groups}
    if ctx.calibration is None:
        raise DataError("ranking by activations needs calibration data and the job has none")
    fitting, held_out = split(ctx.calibration)
    workers = workers_of(ctx)
    session = dataclasses.replace(ctx.session, threads=1) if workers > 1 else ctx.session
    measuring = dataclasses.replace(ctx, session=session)
    ctx = dataclasses.replace(ctx, calibration=fitting)
    masked = mask(model, coupling, removed)
    whole = OutputProbe(masked, fitting if held_out is None else held_out, ctx, samples)
    state = State(model, coupling, coupling.kept(removed), removed, whole, frozenset(branches))
    places = {n.name: i for i, n in enumerate(masked.graph)}
    ordered = sorted(groups, key=lambda g: min((places.get(s.node, 0) for s in g.sinks), default=0))
    changed = {g.index: _changed(coupling, g, readers[g.index]) for g in ordered}
    rankings: dict[int, Ranking] = {}
    batches = list(_batches(ordered, readers))
    with (
        SuffixProbe(masked, whole, measuring, changed) as probe,
        ThreadPoolExecutor(workers) as pool,
    ):
        for number, batch in enumerate(batches, start=1):
            requests = {
                r.consumer.node: moments_request(r.consumer)
                for g in batch
                for r in readers[g.index]
            }
            part = f" ({number} of {len(batches)})" if len(batches) > 1 else ""
            statistics = ctx.collect(
                masked, requests.values(), description=f"prune: input moments{part}"
            )
            with ctx.progress.task("prune: ranking channels", len(batch)) as task:
                running: list[Future[Ranking]] = []
                for group in batch:
                    scored = Scored(state, group, readers[group.index], statistics)
                    suffix = probe.at(group.index)
                    if suffix is None:  # it changes graphs, which threads must not
                        rankings[group.index] = scored.rank(options, ctx.seed, None)
                        task.advance()
                        continue
                    running.append(pool.submit(scored.rank, options, ctx.seed, suffix))
                    if len(running) > workers:
                        _finish(running.pop(0), rankings)
                        task.advance()
                for future in running:
                    _finish(future, rankings)
                    task.advance()
    found = [rankings[g.index] for g in groups]
    if options.recover and not any(len(units) for units in removed.values()):
        with side_by_side(workers) as each:
            return with_fronts(
                model, coupling, found, branches, layers, whole, ctx, measuring, each
            )
    return found


def _finish(future: Future[Ranking], rankings: dict[int, Ranking]) -> None:
    ranking = future.result()
    rankings[ranking.group.index] = ranking


def workers_of(ctx: PassContext) -> int:
    """How many groups to rank at a time."""
    cores = ctx.session.threads or usable_cores()
    return min(cores, _MAX_WORKERS) if ctx.session.providers == ("CPUExecutionProvider",) else 1


def _changed(
    coupling: Coupling, group: Group, readers: Sequence[Reader]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Nodes and initializers that can express all that a group loses; nothing if none do."""
    consumers = [r.consumer for r in readers]
    nodes = {c.node for c in consumers}
    whole = nodes == {s.node for s in group.sinks} and len(nodes) == len(group.sinks)
    if not whole or any(c.obstacle for c in consumers) or through_ports(coupling, group):
        return (), ()
    weights = [n for c in consumers for n in (c.weight, c.bias) if n is not None]
    return tuple(sorted(nodes)), tuple(weights)


def _batches(
    groups: Sequence[Group], readers: Mapping[int, Sequence[Reader]]
) -> Iterator[list[Group]]:
    """Groups whose covariances fit into memory together."""
    return batches_within(
        groups,
        lambda g: sum(8 * r.consumer.groups * r.consumer.width**2 for r in readers[g.index]),
        MOMENT_BYTES,
    )
