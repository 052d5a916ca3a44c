"""What the coupling analysis says about a model, in figures for people."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxcompress.graph import canonical, labels
from onnxcompress.graph.constants import constant_tensor
from onnxcompress.graph.cost import ModelCost, cost_of
from onnxcompress.graph.coupling import Coupling, Group
from onnxcompress.graph.emptying import Emptying
from onnxcompress.graph.macs import MacsModel


@dataclass(frozen=True, slots=True)
class CoupledGroup:
    """Channels, heads or cells of which any may go, each with all that belongs to it.

    Attributes:
        name: The node that makes them.
        units: How many there are.
        width: Channels of the maker per unit (the dimensions of a head).
        parameters: Elements of the weights that belong to one of the units.
        macs_ratio: Share of the model's MACs in the nodes that make or use them, 0 to 1.
        nodes: These nodes.
        last_stays: Why not all of them may go at once; "" if they may.
    """

    name: str
    units: int
    width: int
    parameters: int
    macs_ratio: float
    nodes: tuple[str, ...]
    last_stays: str


@dataclass(frozen=True, slots=True)
class FrozenReason:
    """Why some channels have to stay.

    Attributes:
        reason: In words a user can act on.
        places: How many tensor axes it holds.
        macs_ratio: Share of the model's MACs in the nodes that make or use these channels, 0 to 1.
            Other channels of these nodes may go all the same.
        examples: Up to three of the nodes that demand it.
    """

    reason: str
    places: int
    macs_ratio: float
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CouplingSummary:
    """Coupled channels of a model.

    Attributes:
        coverage: Share of the MACs in nodes that some removal makes cheaper, 0 to 1.
        groups: Largest share of MACs first.
        frozen: Largest share of MACs first.
        untouched: Nodes with MACs that no removal makes cheaper, most expensive first.
        states: Outputs that are written as zeros where cells of a state are removed.
    """

    coverage: float
    groups: tuple[CoupledGroup, ...]
    frozen: tuple[FrozenReason, ...]
    untouched: tuple[str, ...]
    states: tuple[str, ...]


def summarize(model: ir.Model) -> CouplingSummary:
    """Analyse ``model``, which is canonicalized in place.

    Args:
        model: A normalized model.
    """
    canonical.canonicalize(model)
    coupling = labels.analyse(model)
    cost = cost_of(model)
    macs = MacsModel(model, coupling)
    emptying = Emptying(model, coupling)
    return CouplingSummary(
        coverage=macs.covered() / macs.total if macs.total else 0.0,
        groups=tuple(
            sorted(
                (_group(model, g, cost, emptying) for g in coupling.groups),
                key=lambda g: -g.macs_ratio,
            )
        ),
        frozen=_reasons(coupling, cost),
        untouched=_untouched(coupling, cost),
        states=tuple(dict.fromkeys(p.state for p in coupling.ports if p.writes)),
    )


def _group(model: ir.Model, group: Group, cost: ModelCost, emptying: Emptying) -> CoupledGroup:
    places = group.sources or group.sinks
    made_by = [place.node for place in group.sources]
    nodes = tuple(dict.fromkeys(made_by + [place.node for place in group.sinks]))
    return CoupledGroup(
        name=group.name,
        units=group.size,
        width=int(places[0].positions.shape[1]) if places else 1,
        parameters=_parameters(model, group),
        macs_ratio=_share(cost, nodes),
        nodes=nodes,
        last_stays=emptying.reason(group.index) or "",
    )


def _parameters(model: ir.Model, group: Group) -> int:
    """Elements on the cut axes; an initializer cut on several axes counts once."""
    left: dict[str, float] = {}
    for cut in group.cuts:
        shape = _shape(model, cut.initializer)
        share = cut.indices.size / shape[cut.axis]
        left[cut.initializer] = left.get(cut.initializer, 1.0) * (1.0 - share)
    total = 0
    for name, kept in left.items():
        size = 1
        for length in _shape(model, name):
            size *= length
        total += round(size * (1.0 - kept))
    return total


def _shape(model: ir.Model, name: str) -> tuple[int, ...]:
    for graph in model.graphs():
        tensor = constant_tensor(graph.initializers.get(name))
        if tensor is not None:
            return tuple(int(d) for d in tensor.shape.numpy())
    return ()


def _share(cost: ModelCost, nodes: tuple[str, ...]) -> float:
    """Both branches of an If count here, while the cost of a model is that of the larger one."""
    touched = set(nodes)
    macs = sum(n.macs or 0 for n in cost.nodes if n.node in touched)
    return macs / max(sum(n.macs or 0 for n in cost.nodes), 1)


def _reasons(coupling: Coupling, cost: ModelCost) -> tuple[FrozenReason, ...]:
    places: dict[str, list[str]] = {}
    held: dict[str, list[str]] = {}
    for place in coupling.frozen:
        places.setdefault(place.reason, []).append(place.node or place.value)
        held.setdefault(place.reason, []).extend(place.holds)
    found = [
        FrozenReason(
            reason,
            len(nodes),
            _share(cost, tuple(dict.fromkeys(held[reason]))),
            tuple(dict.fromkeys(nodes))[:3],
        )
        for reason, nodes in places.items()
    ]
    return tuple(sorted(found, key=lambda f: (-f.macs_ratio, -f.places)))


def _untouched(coupling: Coupling, cost: ModelCost) -> tuple[str, ...]:
    touched = {
        term.node
        for term in coupling.macs
        for value, axis in term.axes
        if (axes := coupling.axes.get(value)) and axis < len(axes) and axes[axis] is not None
    }
    rest = [n for n in cost.nodes if n.macs and n.node not in touched]
    return tuple(n.node for n in sorted(rest, key=lambda n: -(n.macs or 0)))
