"""Which nodes run on integers, and where values change between float and integer.

A *plan* follows from a set of chosen weighted and joining nodes. Starting from all of them and all
moving nodes, nodes that would not pay are dropped until nothing changes:

- a joining or moving node stays only if its data already come as integers; one operand of a joining
  node may come in float where a weighted node reads it as integers anyway;
- a moving node (or a pool) stays only if some node after it wants its output as integers.

Each value between them that becomes integer is a *point*: it gets one QuantizeLinear and one
DequantizeLinear. Points whose scale must be equal (the two ends of a moving node) form one *group*.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxcompress.passes.quant.operators import (
    Kind,
    Rule,
    activation_bounds,
    data_inputs,
    refusal,
    rule_of,
)

CLIMBED = frozenset({"MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators over which onnxruntime moves QuantizeLinear backwards and DequantizeLinear forwards."""


_GEMM_TAKES_IN = frozenset(
    {
        "Elu",
        "HardSigmoid",
        "LeakyRelu",
        "Relu",
        "Selu",
        "Sigmoid",
        "Softplus",
        "Softsign",
        "Tanh",
        "ThresholdedRelu",
    }
)
"""Activations that onnxruntime merges with a Gemm before it looks for integer kernels."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where integers go. Names refer to the float model.

    Attributes:
        nodes: Nodes on integers, in graph order.
        folded: Activation node to the node whose output scale performs it.
        points: Values that become integer, in graph order.
        ties: Point to the first point of its group; points that share a scale are equal here.
        joints: Groups of points that gain from one common scale but do not need it (around a
            Concat).
        shields: Points that need a barrier before their QuantizeLinear, else onnxruntime moves it
            over a float MaxPool, which then runs on a slow integer kernel and loses the layout of
            the convolution before.
    """

    nodes: tuple[str, ...]
    folded: Mapping[str, str]
    points: tuple[str, ...]
    ties: Mapping[str, str]
    joints: tuple[tuple[str, ...], ...]
    shields: frozenset[str]


class Network:
    """The main graph of a model as placement sees it: nodes by name, and the part each plays.

    Args:
        model: The float model; it is read, never changed.
        symmetric: Whether activations are symmetric: then no range starts at 0, and Relu is kept.
        fixed_point: Whether scales are powers of two: then no range ends at a Clip's bound, and
            Clip is kept.
        tied: Operators whose output must share the scale of their input on the target.
    """

    def __init__(
        self,
        model: ir.Model,
        *,
        symmetric: bool,
        fixed_point: bool = False,
        tied: frozenset[str] = frozenset(),
    ) -> None:
        self.symmetric = symmetric
        self.fixed_point = fixed_point
        self.tied = tied
        self.nodes: dict[str, ir.Node] = {n.name: n for n in model.graph if n.name}
        self._rules = {
            name: rule
            for name, node in self.nodes.items()
            if (rule := rule_of(node)) is not None and rule.kind is not Kind.ACTIVATION
        }
        self.refusals: dict[str, str] = {
            name: reason
            for name in self._rules
            if (reason := refusal(self.nodes[name])) is not None
        }

    def rule(self, name: str) -> Rule:
        """The rule of a node that has one."""
        return self._rules[name]

    def has_rule(self, name: str) -> bool:
        """Whether a node has a rule."""
        return name in self._rules

    def of_kind(self, kind: Kind) -> Iterator[ir.Node]:
        """Nodes of a kind that can be quantized, in graph order."""
        for name, rule in self._rules.items():
            if rule.kind is kind and name not in self.refusals:
                yield self.nodes[name]

    def refuse(self, points: Collection[str], reason: str) -> None:
        """Refuse the nodes that read or write one of ``points``."""
        for name in self._rules:
            node = self.nodes[name]
            around = (*data_inputs(node), node.outputs[0], self.result(node))
            if any(value.name in points for value in around):
                self.refusals.setdefault(name, reason)

    def activation_after(self, node: ir.Node) -> ir.Node | None:
        """The Relu or Clip that is the only reader of ``node``'s output."""
        output = node.outputs[0]
        uses = list(output.uses())
        if output.is_graph_output() or len(uses) != 1:
            return None
        reader, place = uses[0]
        fits = place == 0 and reader.graph is node.graph and activation_bounds(reader) is not None
        return reader if fits else None

    def result(self, node: ir.Node) -> ir.Value:
        """The value that leaves ``node`` as integers: behind its activation, if one follows."""
        if self.rule(node.name or "").kind is Kind.MOVING:
            return node.outputs[0]
        activation = self.activation_after(node)
        return node.outputs[0] if activation is None else activation.outputs[0]

    def must_write_integers(self, node: ir.Node) -> bool:
        """Whether ``node`` has no integer kernel that writes float here.

        Before a Relu or Clip that no QuantizeLinear follows, onnxruntime takes no product for an
        integer one; and a Gemm becomes one float kernel with the activation behind it. Integers
        between the two keep them apart.
        """
        if self.rule(node.name or "").needs_output_scale:
            return True
        readers = [reader.op_type for reader, _ in node.outputs[0].uses()]
        if len(readers) != 1:
            return False
        merges = _GEMM_TAKES_IN if node.op_type == "Gemm" else frozenset()
        return readers[0] in {"Clip", "Relu"} | merges

    def folds(self, activation: ir.Node) -> bool:
        """Whether the saturation of integers can perform ``activation``."""
        bounds = activation_bounds(activation)
        if bounds is None or (self.symmetric and abs(bounds[0]) != abs(bounds[1])):
            return False
        return not self.fixed_point or bounds == (0.0, float("inf"))


def make_plan(network: Network, chosen: frozenset[str]) -> Plan:
    """The plan for the weighted and joining nodes ``chosen``.

    Args:
        network: The float model.
        chosen: Names of nodes to run on integers; joining ones among them are dropped where they do
            not pay.
    """
    members, wanted = _members(network, chosen)
    folded: dict[str, str] = {}
    points: dict[str, None] = {}
    ties = _Ties()
    joints: list[tuple[str, ...]] = []
    for node in members:
        rule, inputs, result = (
            network.rule(node.name or ""),
            data_inputs(node),
            network.result(node),
        )
        for value in inputs:
            points.setdefault(value.name or "")
        if not network.must_write_integers(node) and result not in wanted:
            continue  # it writes float: its activation stays, too
        points.setdefault(result.name or "")
        activation = result.producer()
        if activation is not None and activation is not node and network.folds(activation):
            folded[activation.name or ""] = node.name or ""
        if rule.tied or node.op_type in network.tied:
            ties.join(inputs[0].name or "", result.name or "")
        if node.op_type == "Concat":
            joints.append(tuple(v.name or "" for v in (*inputs, result)))
    produced = {network.result(node) for node in members}
    return Plan(
        nodes=tuple(node.name or "" for node in members),
        folded=folded,
        points=tuple(points),
        ties={point: ties.find(point) for point in points},
        joints=tuple(joints),
        shields=frozenset(
            value.name or ""
            for node in members
            for value in data_inputs(node)
            if value not in produced and _behind_max_pool(value)
        ),
    )


def _members(network: Network, chosen: frozenset[str]) -> tuple[list[ir.Node], set[ir.Value]]:
    """Nodes that run on integers, and the values that some of them want as integers."""
    moving = {node.name for node in network.of_kind(Kind.MOVING)}
    active = [n for name, n in network.nodes.items() if name in chosen or name in moving]
    while True:
        ready: set[ir.Value] = set()
        at_hand: set[ir.Value] = set()
        fed: list[ir.Node] = []
        for node in active:
            if network.rule(node.name or "").kind is Kind.WEIGHTED:
                at_hand.update(data_inputs(node))
        for node in active:
            kind, inputs = network.rule(node.name or "").kind, data_inputs(node)
            near = ready | at_hand if kind is Kind.JOINING else ready
            joins = all(v in near for v in inputs) and any(v in ready for v in inputs)
            if kind is Kind.WEIGHTED or joins:
                fed.append(node)
                ready.add(network.result(node))
        wanted: set[ir.Value] = set()
        kept: list[ir.Node] = []
        for node in reversed(fed):
            rule = network.rule(node.name or "")
            alone = rule.kind is not Kind.MOVING and rule.useful_alone
            if alone or network.result(node) in wanted:
                kept.append(node)
                wanted.update(data_inputs(node))
        kept.reverse()
        if len(kept) == len(active):
            return kept, wanted
        active = kept


def _behind_max_pool(value: ir.Value) -> bool:
    """Whether onnxruntime would move a QuantizeLinear of ``value`` over a MaxPool."""
    node = value.producer()
    while node is not None and node.op_type in CLIMBED:
        if node.op_type == "MaxPool":
            return True
        source = node.inputs[0]
        node = None if source is None else source.producer()
    return False


class _Ties:
    """A union-find over point names; the first point of a group stands for it."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def find(self, point: str) -> str:
        root = point
        while self._parents.get(root, root) != root:
            root = self._parents[root]
        return root

    def join(self, first: str, second: str) -> None:
        a, b = self.find(first), self.find(second)
        if a != b:
            self._parents[b] = a


def source_points(network: Network, plan: Plan) -> tuple[str, ...]:
    """Points whose values are not merely moved from another point: the ones worth measuring."""
    moved = {
        network.result(network.nodes[name]).name
        for name in plan.nodes
        if network.rule(name).kind is Kind.MOVING
    }
    return tuple(point for point in plan.points if point not in moved)
