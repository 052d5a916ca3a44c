"""Replace an If by one of its branches where every run takes that one.

Exporters write ``If(rank == 2, Unsqueeze, Identity)`` around layers that take both, and
``If(length == 1, Squeeze, Identity)`` for ``squeeze()``. Two kinds are settled:

- The condition is the same on every run, as it depends on static shapes alone.
- One branch hands on a tensor whose rank makes a later operator fail on every path (an LSTM wants
  three axes): a run that took it would end in an error, so a run that succeeds takes the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of
from onnxcompress.graph.probe import Hypothesis, Shapes, probe

_BRANCHES = ("then_branch", "else_branch")
# Each round may make further conditions known.
_MAX_ROUNDS = 10


def settle_branches(model: ir.Model, shapes: Shapes) -> Shapes:
    """Settle what can be settled, in place.

    Args:
        model: A normalized model whose values have unique names across subgraphs.
        shapes: Its shapes.

    Returns:
        The shapes of the model as it is now.
    """
    for _ in range(_MAX_ROUNDS):
        nodes = [n for n in model.graph.all_nodes() if _is_if(n)]
        chosen = [(n, taken) for n in nodes if (taken := _condition(n, shapes)) is not None]
        if not chosen:
            chosen = _possible(model, nodes, shapes)[:1]
        if not chosen:
            break
        # Inner ones go with the branch that they are in; the next round takes those that are left.
        done: set[ir.Node] = set()
        for node, taken in chosen:
            if not _inside(node, done):
                _inline(node, node.attributes[_BRANCHES[0 if taken else 1]].as_graph())
                done.add(node)
        shapes = probe(model)
    return shapes


def _is_if(node: ir.Node) -> bool:
    return node.op_type == "If" and node.domain in {"", "ai.onnx"}


def _condition(node: ir.Node, shapes: Shapes) -> bool | None:
    """The condition, if it is the same on every run."""
    value = node.inputs[0]
    array = constant_of(value)
    if array is None and value is not None:
        array = shapes.constants.get(value)
    return None if array is None or array.size != 1 else bool(np.ravel(array)[0])


def _possible(
    model: ir.Model, nodes: Sequence[ir.Node], shapes: Shapes
) -> list[tuple[ir.Node, bool]]:
    """The Ifs of different ranks of which exactly one branch can run."""
    found = []
    for node in nodes:
        branches = [node.attributes[name].as_graph() for name in _BRANCHES]
        ranks = [[_rank(shapes, v) for v in b.outputs] for b in branches]
        if ranks[0] == ranks[1] or any(None in r for r in ranks):
            continue
        fails = [Hypothesis(model, node, number).fails() for number in range(2)]
        if fails[0] != fails[1]:
            found.append((node, fails[1]))
    return found


def _rank(shapes: Shapes, value: ir.Value) -> int | None:
    known = shapes.of(value)
    return None if known is None else len(known)


def _inside(node: ir.Node, done: Iterable[ir.Node]) -> bool:
    """Whether a node stands in a branch of a node that is gone."""
    graphs: set[ir.Graph] = set()
    for outer in done:
        for name in _BRANCHES:
            branch = outer.attributes[name].as_graph()
            graphs |= {branch, *branch.subgraphs()}
    return node.graph in graphs


def _inline(node: ir.Node, branch: ir.Graph) -> None:
    """Move a branch to where its If stands."""
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        return
    results = list(branch.outputs)
    for value in list(branch.initializers.values()):
        branch.initializers.pop(value.name or "")
        graph.register_initializer(value)
    inner = list(branch)
    for result in results:
        branch.outputs.remove(result)
    branch.remove(inner)
    graph.insert_before(node, inner)
    for output, result in zip(node.outputs, results, strict=True):
        places = [place for place, value in enumerate(graph.outputs) if value is output]
        if places:
            result = _named(graph, node, result, output)
            for place in places:
                graph.outputs[place] = result
        output.replace_all_uses_with(result)
    graph.remove(node, safe=True)


def _named(graph: ir.Graph, node: ir.Node, result: ir.Value, output: ir.Value) -> ir.Value:
    """An output of a graph keeps its name."""
    name, output.name = output.name, None
    copy = ir.Node("", "Identity", [result], name=f"{node.name}/canonical_branch")
    copy.outputs[0].name = name
    copy.outputs[0].type, copy.outputs[0].shape = output.type, output.shape
    graph.insert_before(node, copy)
    return copy.outputs[0]
