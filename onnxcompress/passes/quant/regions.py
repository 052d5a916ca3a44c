"""Regions on integers that cost more time than they save go back to float.

A *region* is a set of integer nodes that pass integers to each other. Where the result is slower
than float, versions are timed in turns with one region, or one part of a long one, in float; the
part whose way back saves most time goes, until the model is not slower than float or nothing helps
any more.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxcompress.passes.quant.clock import run_times
from onnxcompress.passes.quant.operators import Kind, data_inputs
from onnxcompress.passes.quant.placement import Network, Plan, make_plan
from onnxcompress.progress import Progress
from onnxcompress.runtime import Array, SessionSettings, open_session

_PARTS = 4
"""A region with more weighted nodes is also tried in this many parts, one after the other."""

_MOST_RIVALS = 12
_ROUNDS = 6
_SECONDS_PER_RIVAL = 0.25
_HELPS = 0.99
"""A part goes back to float if that takes at least a hundredth off the time."""


@dataclass(frozen=True, slots=True)
class Repair:
    """What timing the regions ended with.

    Attributes:
        chosen: Nodes that stay on integers; empty when no part of them pays.
        timed: Versions timed.
    """

    chosen: frozenset[str]
    timed: int


def regions(network: Network, plan: Plan) -> list[tuple[str, ...]]:
    """Nodes of a plan that pass integers to each other; groups and nodes in graph order."""
    makers = {network.result(network.nodes[n]).name: n for n in plan.nodes}
    leaders: dict[str, str] = {}

    def find(name: str) -> str:
        while leaders.get(name, name) != name:
            name = leaders[name]
        return name

    for name in plan.nodes:
        for value in data_inputs(network.nodes[name]):
            maker = makers.get(value.name)
            if maker is not None and value.name in plan.points:
                leaders[find(name)] = find(maker)
    grouped: dict[str, list[str]] = {}
    for name in plan.nodes:
        grouped.setdefault(find(name), []).append(name)
    return [tuple(names) for names in grouped.values()]


def parts(network: Network, plan: Plan) -> list[frozenset[str]]:
    """What may go back to float together: whole regions, and parts of long ones; at most twelve."""
    found: list[frozenset[str]] = []
    for region in regions(network, plan):
        weighted = [n for n in region if network.rule(n).kind is Kind.WEIGHTED]
        found.append(frozenset(region))
        count = min(_PARTS, len(weighted))
        if count > 1:
            cuts = [round(k * len(weighted) / count) for k in range(count + 1)]
            found += [frozenset(weighted[low:high]) for low, high in itertools.pairwise(cuts)]
    joining = [n for n in plan.nodes if network.rule(n).kind is Kind.JOINING]
    if joining:
        found.append(frozenset(joining))
    found.sort(key=lambda names: -len(names))
    return list(dict.fromkeys(found))[:_MOST_RIVALS]


def repair(
    network: Network,
    chosen: frozenset[str],
    build: Callable[[frozenset[str]], ir.Model],
    feeds: Mapping[str, Array],
    *,
    seconds: float,
    progress: Progress,
    threads: int = 1,
) -> Repair:
    """Put slow parts back to float until the model is not slower than float.

    Args:
        network: The float model.
        chosen: Nodes on integers, with which it is slower.
        build: Makes the model with the given nodes on integers; none for the float model.
        feeds: One run's inputs.
        seconds: No further round starts after this time.
        progress: Where to report progress.
        threads: Threads with which it is slower.
    """
    started, timed = time.monotonic(), 0
    settings = SessionSettings(threads=threads)
    reference = open_session(build(frozenset()), settings)
    with progress.task("timing regions") as task:
        for _ in range(_ROUNDS):
            if time.monotonic() - started > seconds:
                break
            rivals = [
                rest
                for part in parts(network, make_plan(network, chosen))
                if (rest := chosen - part) and make_plan(network, rest).nodes
            ]
            sessions = [open_session(build(names), settings) for names in (chosen, *rivals)]
            times = run_times(
                [reference, *sessions],
                feeds,
                seconds=_SECONDS_PER_RIVAL * (len(sessions) + 1),
                threads=threads,
            )
            timed += len(rivals)
            task.advance()
            base, now, others = times[0], times[1], times[2:]
            best = min(range(len(others)), key=others.__getitem__, default=None)
            if best is None or others[best] > _HELPS * now:
                break
            progress.log(
                f"{len(chosen) - len(rivals[best])} nodes back in float: {now * 1e3:.3f} → "
                f"{others[best] * 1e3:.3f} ms, float {base * 1e3:.3f} ms"
            )
            chosen = rivals[best]
            if others[best] <= base:
                return Repair(chosen, timed)
    return Repair(frozenset(), timed)
