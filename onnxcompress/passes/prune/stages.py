"""Running a graph in stages: what each stage computes, and what has to be kept for later ones.

Recovery changes the weights of one layer after the other, so what lies before a layer is final by
the time it is reached. The graph is therefore run once in all: a stage goes on from the values that
earlier stages left, and keeps only the values that nodes still to run, or later measurements, read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxcompress.errors import ModelError


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the run; all entries are names of values of the graph.

    Attributes:
        inputs: What it reads; of the first stage graph inputs, of later ones what was kept.
        outputs: What is kept from then on: values it computes, and graph inputs after the first.
        dropped: What need not be kept any longer after it.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dropped: tuple[str, ...]


def reads(node: ir.Node) -> list[ir.Value]:
    """What a node reads, its subgraphs' captures included."""
    found = {v: None for v in node.inputs if v is not None}
    inner: set[ir.Value] = set()
    for graph in _subgraphs(node):
        inner.update(graph.inputs)
        for own in graph.all_nodes():
            inner.update(own.outputs)
            for attribute in own.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH:
                    inner.update(attribute.as_graph().inputs)
            found.update({v: None for v in own.inputs if v is not None})
        found.update(dict.fromkeys(graph.outputs))
    return [v for v in found if v not in inner]


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    graphs = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs.extend(attribute.as_graphs())
    return graphs


def _storable(value: ir.Value) -> bool:
    """Whether a value is a dense tensor (of a type that is assumed to be one where unknown)."""
    return value.type is None or isinstance(value.type, ir.TensorType)


def plan_stages(
    graph: ir.Graph, wanted: Sequence[Sequence[str]], again: Mapping[str, int] | None = None
) -> tuple[Stage, ...]:
    """Divide a graph into stages.

    Args:
        graph: The graph, nodes in topological order.
        wanted: The values to have at hand after each stage.
        again: Nodes by name that run in every stage that needs them, since their weights may
            change after one that did, with the number of the last stage after which they may.

    Returns:
        As many stages as there are entries in ``wanted``.

    Raises:
        ModelError: If a value does not exist.
    """
    nodes = list(graph)
    place = {node: i for i, node in enumerate(nodes)}
    needs = [[v for v in reads(n) if not v.is_initializer()] for n in nodes]
    values = {v.name: v for v in graph.inputs} | {v.name: v for n in nodes for v in n.outputs}
    missing = [name for names in wanted for name in names if name not in values]
    if missing:
        raise ModelError(f"the model has no tensor '{missing[0]}'")
    # A node whose output cannot be stored (a sequence) runs again in every stage that needs it.
    final = [
        (again or {}).get(n.name or "", -1) if all(map(_storable, n.outputs)) else len(wanted)
        for n in nodes
    ]

    def closure(names: Sequence[str], done: set[int]) -> set[int]:
        """Numbers of the nodes to run for ``names`` when those in ``done`` have run."""
        found: set[int] = set()
        todo = [values[name] for name in names]
        while todo:
            producer = todo.pop().producer()
            number = -1 if producer is None else place[producer]
            if number < 0 or number in found or number in done:
                continue
            found.add(number)
            todo.extend(needs[number])
        return found

    stages: list[Stage] = []
    done: set[int] = set()
    kept: set[str] = set()
    for k, names in enumerate(wanted):
        running = closure(names, done)
        made = {v for i in running for v in nodes[i].outputs}
        inputs = {v.name or "" for i in running for v in needs[i] if v not in made}
        done |= {i for i in running if k > final[i]}
        later = {name for rest in wanted[k:] for name in rest}
        for i in closure(sorted(later), done):
            later |= {v.name or "" for v in needs[i]}
        available = kept | {v.name or "" for v in made if _storable(v)}
        if k == 0:
            available |= {v.name or "" for v in graph.inputs}
        alive = {
            name
            for name in later & available
            if name in names or (p := values[name].producer()) is None or place[p] in done
        }
        stages.append(
            Stage(
                inputs=tuple(sorted(inputs)),
                outputs=tuple(sorted(alive - kept)),
                dropped=tuple(sorted(kept - alive)),
            )
        )
        kept = alive
    return tuple(stages)
