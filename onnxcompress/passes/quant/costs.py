"""What it costs to take nodes off 8-bit integers: lost time, or lost bytes.

Lost time is estimated in multiply-accumulates (MACs): those of the nodes, which integers do about
twice as fast, and for each value that changes between float and integer 12 per element and 1e5 for
the operator (chains of six convolutions of 64 to 256 channels with onnxruntime 1.31.1 on AVX-512
VNNI: integers save 0.0116 to 0.0144 ns per MAC, a change costs 10 to 16 MACs per element). Two
neighbours in float share the change between them, so the cost of a set is not the sum of its
nodes'. Lost bytes are exact: three of four bytes of each weight come back in float, one of two in
float16, none with 16-bit activations. Where bytes are equal the estimated time decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxcompress.graph.cost import cost_of, probe_shapes
from onnxcompress.passes.quant.operators import Kind, data_inputs
from onnxcompress.passes.quant.placement import Network, Plan
from onnxcompress.passes.quant.precision import Precision

_MACS_PER_ELEMENT = 12.0
_MACS_PER_CHANGE = 1e5

_TIE = 1e-9
"""Weight of the time where bytes count, and of bytes where time does."""

_WIDE_SLOWDOWN = 3.0
"""On a CPU 16-bit integers cost the way to float and back on top of computing in float."""

_BYTES = {
    Precision.INT8: 0.0,
    Precision.INT16: 0.0,
    Precision.FLOAT16: 1.0,
    Precision.FLOAT: 3.0,
}


@dataclass(frozen=True, slots=True)
class _Link:
    """Values of one scale that pass between nodes, moved at most.

    Attributes:
        makers: Nodes that make it; empty where float nodes do.
        readers: Nodes on integers that read it.
        leaves: Whether a float node or the caller reads it, too.
        price: What a change between float and integer costs there.
    """

    makers: frozenset[str]
    readers: frozenset[str]
    leaves: bool
    price: float


class Costs:
    """Costs of lifting nodes of one plan.

    Args:
        model: The float model.
        network: The same as placement sees it.
        plan: All nodes on integers.
        feeds_shapes: Shapes of one run's inputs.
        for_size: Whether bytes count rather than time.
    """

    def __init__(
        self,
        model: ir.Model,
        network: Network,
        plan: Plan,
        feeds_shapes: Mapping[str, tuple[int, ...]],
        *,
        for_size: bool,
    ) -> None:
        found = cost_of(model, feeds_shapes)
        self.total_macs = found.macs
        self._macs = {n.node: n.macs or 0 for n in found.nodes}
        self._parameters = {n.node: n.parameters for n in found.nodes}
        self._for_size = for_size
        self._links = _links(model, network, plan, feeds_shapes)
        self._base = self._changes({})

    def macs(self, node: str) -> int:
        """Multiply-accumulates of a node for one run."""
        return self._macs.get(node, 0)

    def of(self, lifted: Mapping[str, Precision]) -> float:
        """Cost of a set of lifts; 0 for none."""
        time = self._changes(lifted) - self._base
        size = 0.0
        for node, precision in lifted.items():
            slow = _WIDE_SLOWDOWN if precision is Precision.INT16 else 1.0
            time += slow * (self._macs.get(node, 0) + _MACS_PER_CHANGE * (slow - 1.0))
            size += _BYTES[precision] * self._parameters.get(node, 0)
        return size + _TIE * time if self._for_size else time + _TIE * size

    def _changes(self, lifted: Mapping[str, Precision]) -> float:
        """Cost of all changes between float and integer."""
        floats = {n for n, p in lifted.items() if p is not Precision.INT16}
        cost = 0.0
        for link in self._links:
            makers, readers = link.makers - floats, link.readers - floats
            if not makers and readers:
                cost += link.price
            if makers and (link.leaves or len(readers) < len(link.readers)):
                cost += link.price
        return cost


def _links(
    model: ir.Model,
    network: Network,
    plan: Plan,
    feeds_shapes: Mapping[str, tuple[int, ...]],
) -> list[_Link]:
    """The values of a plan that pass between nodes, those that are only moved joined into one."""
    shapes = probe_shapes(model, feeds_shapes)
    lengths = {value.name: math.prod(shape) for value, shape in shapes.items()}
    makers: dict[str, set[str]] = {}
    readers: dict[str, set[str]] = {}
    leaves: set[str] = set()
    members = set(plan.nodes)
    for name in plan.nodes:
        if network.rule(name).kind is Kind.MOVING:
            continue
        node = network.nodes[name]
        result = network.result(node)
        made = plan.ties.get(result.name or "")
        if made is not None:
            makers.setdefault(made, set()).add(name)
            outside = [n for n, _ in result.uses() if n.name not in members]
            if outside or result.is_graph_output():
                leaves.add(made)
        for value in data_inputs(node):
            readers.setdefault(plan.ties.get(value.name or "", value.name or ""), set()).add(name)
    return [
        _Link(
            frozenset(makers.get(leader, ())),
            frozenset(readers.get(leader, ())),
            leader in leaves,
            _MACS_PER_CHANGE + _MACS_PER_ELEMENT * lengths.get(leader, 1),
        )
        for leader in dict.fromkeys(plan.ties.values())
    ]
