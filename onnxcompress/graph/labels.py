"""Find the channels of a model that can be removed, and all the places they live.

Every axis of every tensor carries an array of labels, one per position. Each operator's rule says
which positions are the same channel (:mod:`onnxcompress.graph.rules`); a union-find merges their
labels. A connected component is a unit: its positions disappear together or not at all. This
module keeps the books, so that no rule can forget a channel:

- an input axis that a rule neither returns, ties nor contracts is frozen;
- an output axis of length one freezes its label (a lost axis would broadcast);
- graph outputs, integer constants, captured tensors of loops and unknown operators are frozen;
- a unit that no weight and no sum ever contracts is no unit.

Source: Fang 2023 (DepGraph) and Wang 2024 (SPA, arXiv 2403.18955) have the same aim; here with
labels per position instead of a graph of layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import onnx_ir as ir

from onnxcompress.graph.coupling import (
    Coupling,
    Cut,
    Frozen,
    Group,
    MacsTerm,
    Port,
    Sink,
    Source,
)
from onnxcompress.graph.grouping import Spread, group_units
from onnxcompress.graph.probe import Shapes, probe
from onnxcompress.graph.states import State, candidates, matches
from onnxcompress.graph.walk import Choice, Walk

__all__ = ["Coupling", "Cut", "Frozen", "Group", "MacsTerm", "Port", "Sink", "Source", "analyse"]

# Each round tries another carrier for the Reshape nodes whose channels froze.
_MAX_ROUNDS = 12


def analyse(
    model: ir.Model,
    *,
    reshape_policy: Literal["heads", "head_dims"] = "heads",
    states: bool = True,
) -> Coupling:
    """Find the units that can be removed from ``model``, which is not changed.

    Args:
        model: A model after :func:`onnxcompress.model_io.normalize` and
            :func:`onnxcompress.graph.canonical.canonicalize`.
        reshape_policy: Which factor of a split axis carries the channels where there is a choice:
            the outermost ("heads" of an attention layer) or the innermost ("head_dims").
        states: Whether cells of a state that is an input and an output of the model may go. The
            interface stays as it is: such a cell is not read and is written as zero.
    """
    shapes = probe(model)
    head_dims = reshape_policy == "head_dims"
    found = _states(model, shapes, head_dims=head_dims) if states else []
    rejected: dict[ir.Node, frozenset[int]] = {}
    for _ in range(_MAX_ROUNDS):
        walk = Walk(model, shapes, rejected, head_dims=head_dims, states=found)
        spread = walk.run()
        failed = _to_reject(walk.choices, spread)
        if not failed:
            break
        for choice in failed:
            rejected[choice.node] = rejected.get(choice.node, frozenset()) | {choice.choice}
    return dataclasses.replace(group_units(spread, found), shapes=_concrete(model, shapes))


def _concrete(model: ir.Model, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The lengths of all values of the main graph in both probes, where they are known."""
    found: dict[str, tuple[int, ...]] = {}
    first, second = shapes.probes
    for value in (*model.graph.inputs, *(o for n in model.graph for o in n.outputs)):
        lengths = (*first.get(value, (None,)), *second.get(value, (None,)))
        if value.name and None not in lengths:
            found[value.name] = tuple(n for n in lengths if n is not None)
    return found


def _states(model: ir.Model, shapes: Shapes, *, head_dims: bool) -> list[State]:
    """The candidates whose written cells the graph itself ties to those that are read.

    A state that no path ties (the hidden state of an LSTM made of single operators) is found by
    its company: its cells are those of a state that is tied.
    """
    possible = candidates(model, shapes)
    if not possible:
        return []
    walk = Walk(model, shapes, {}, head_dims=head_dims, states=possible, tied=False)
    spread = walk.run()
    chosen: list[State] = []

    def free(state: State) -> bool:
        return all(state.source is not c.source and state.target is not c.target for c in chosen)

    for state in possible:
        if free(state) and _returns(state, spread):
            chosen.append(state)  # noqa: PERF401 - free() looks at what was chosen
    cells = {r for s in chosen for r in _written_roots(s, spread)}
    for state in possible if chosen else ():
        if free(state) and cells & _written_roots(state, spread):
            chosen.append(state)  # noqa: PERF401 - free() looks at what was chosen
    # A model of nothing but states is no recurrent model: its data would be taken for a state.
    ends = {id(v) for s in chosen for v in (s.source, s.target)}
    graph = model.graph
    if any(all(id(v) in ends for v in side) for side in (graph.inputs, graph.outputs)):
        return []
    return chosen


def _returns(state: State, spread: Spread) -> bool:
    """Whether some cells come back in the place that they were read from."""
    for writer, reader, a, b, (ours, theirs) in matches(state):
        left, right = spread.axes.get(writer.value), spread.axes.get(reader)
        if left is None or right is None:
            continue
        here, there = left[a], right[b]
        if here is None or there is None:
            continue
        if (spread.roots[here[ours]] == spread.roots[there[theirs]]).all():
            return True
    return False


def _written_roots(state: State, spread: Spread) -> set[int]:
    """The components that are written to a state."""
    return {
        int(root)
        for writer in state.writers
        for labels in spread.axes.get(writer.value) or ()
        if labels is not None
        for root in spread.roots[labels]
    }


def _to_reject(choices: Sequence[Choice], spread: Spread) -> list[Choice]:
    """Of each set of connected choices whose channels all froze, the one furthest downstream.

    A wrong choice freezes the right ones before it, so the latest is revised first.
    """
    frozen = spread.frozen_roots()
    latest: dict[int, Choice] = {}
    for choice in choices:
        roots = spread.roots[choice.labels]
        if not choice.last and frozen[roots].all():
            latest[int(roots.flat[0])] = choice
    return list(latest.values())
