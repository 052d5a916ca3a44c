"""One pass over the graph that spreads labels from the initializers over every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxcompress.graph.constants import constant_tensor
from onnxcompress.graph.coupling import MacsTerm
from onnxcompress.graph.grouping import Freeze, Site, Spread
from onnxcompress.graph.probe import Shapes
from onnxcompress.graph.rules import frozen_reason, rule_of
from onnxcompress.graph.rules.base import Axes
from onnxcompress.graph.states import State, Writer, matches
from onnxcompress.graph.trace import NodeTrace
from onnxcompress.graph.unions import Labels, Unions


@dataclass(frozen=True, slots=True)
class Choice:
    """A carrier that a Reshape took; ``last`` if it has no other left."""

    node: ir.Node
    choice: int
    labels: Labels
    last: bool


class Walk:
    """One pass over the graph that spreads labels from the initializers.

    Args:
        model: The model.
        shapes: Its static shapes.
        rejected: Carriers of Reshape nodes that turned out frozen in earlier rounds.
        head_dims: Prefer the innermost factor of a split axis.
        states: States of the interface whose cells may go.
        tied: Whether the cells that a state's writer and reader share are one channel. If not,
            only what the graph itself ties is.
    """

    def __init__(
        self,
        model: ir.Model,
        shapes: Shapes,
        rejected: dict[ir.Node, frozenset[int]],
        *,
        head_dims: bool,
        states: Sequence[State] = (),
        tied: bool = True,
    ) -> None:
        self.model, self.shapes, self.rejected = model, shapes, rejected
        self.head_dims = head_dims
        self.opset = model.opset_imports.get("", 1)
        self.unions = Unions()
        self.axes: dict[ir.Value, Axes | None] = {}
        self.births: list[tuple[ir.Value, int, Labels]] = []
        self.freezes: list[Freeze] = []
        self.sinks: list[Site] = []
        self.sources: list[Site] = []
        self.choices: list[Choice] = []
        self.macs: list[MacsTerm] = []
        self.path: tuple[tuple[str, int], ...] = ()
        self.states, self.tied = states, tied
        self.outside: frozenset[ir.Node] = frozenset().union(*(s.nodes for s in states))
        self._joined = {value for state in states for value in state.joined}
        self._readers = {value for state in states for value in state.readers}
        self._exits: Mapping[tuple[ir.Node | ir.Graph, int], Writer] = {
            (w.user, w.index): w for state in states for w in state.writers
        }

    def run(self) -> Spread:
        """Spread labels over the whole model."""
        self._graph(self.model.graph)
        for index, value in enumerate(self.model.graph.outputs):
            if (self.model.graph, index) not in self._exits:
                self._freeze_value(value, "", "is an output of the model")
        for state in self.states if self.tied else ():
            self._tie(state)
        return Spread(
            roots=self.unions.solve(),
            births=self.births,
            axes=self.axes,
            freezes=self.freezes,
            sinks=self.sinks,
            sources=self.sources,
            macs=self.macs,
        )

    def _tie(self, state: State) -> None:
        """What is written is what the next call reads."""
        for writer, reader, a, b, (ours, theirs) in matches(state):
            left, right = (
                (self.of(v) or ())[i : i + 1] for v, i in ((writer.value, a), (reader, b))
            )
            if left and right and left[0] is not None and right[0] is not None:
                self.unions.tie(left[0][ours], right[0][theirs])

    def of(self, value: ir.Value) -> Axes | None:
        """Labels of a value, made on first sight for initializers and graph inputs."""
        if value not in self.axes:
            self.axes[value] = self._born(value)
        return self.axes[value]

    def _born(self, value: ir.Value) -> Axes | None:
        shape = self.shapes.of(value)
        if shape is None:
            return None
        if value in self._readers:
            return self._fresh(value)
        tensor = constant_tensor(value)
        if tensor is None or not (_is_real(tensor) or _feeds_quantization(value)):
            return (None,) * len(shape)
        axes: list[Labels | None] = []
        for axis, length in enumerate(shape):
            if length is None or length < 2:
                axes.append(None)
                continue
            labels = self.unions.fresh(length)
            self.births.append((value, axis, labels))
            axes.append(labels)
        return tuple(axes)

    def _fresh(self, value: ir.Value) -> Axes:
        """New labels for the cells that are read here."""
        lengths = self.shapes.of(value) or ()
        return tuple(self.unions.fresh(n) if n is not None and n > 1 else None for n in lengths)

    def freeze(self, labels: Labels, node: ir.Node | None, reason: str) -> None:
        """Freeze labels; where they are is looked up among the node's values."""
        value, axis = self._where(labels, node)
        self.freezes.append(
            Freeze(labels, "" if node is None else node.name or "", value, axis, reason)
        )

    def _where(self, labels: Labels, node: ir.Node | None) -> tuple[str, int]:
        if node is None:
            return "", 0
        near = [v for v in (*node.inputs, *node.outputs) if v is not None]
        for value in near:
            for axis, found in enumerate(self.axes.get(value) or ()):
                if found is labels:
                    return value.name or "", axis
        first = labels.ravel()[:1]
        for value in near:
            for axis, found in enumerate(self.axes.get(value) or ()):
                if found is not None and first.size and first[0] in found:
                    return value.name or "", axis
        return near[0].name or "" if near else "", 0

    def _freeze_value(self, value: ir.Value, node: str, reason: str) -> None:
        for axis, labels in enumerate(self.of(value) or ()):
            if labels is not None:
                self.freezes.append(Freeze(labels, node, value.name or "", axis, reason))

    def choose(self, node: ir.Node, choice: int, labels: Labels, *, last: bool) -> None:
        """Remember the carrier that a Reshape took."""
        self.choices.append(Choice(node, choice, labels, last))

    # --- graphs and nodes ---------------------------------------------------------------------

    def _graph(self, graph: ir.Graph) -> None:
        for node in graph:
            if node.op_type == "If" and node.domain in {"", "ai.onnx"}:
                self._if(node)
            else:
                self._node(node)

    def _node(self, node: ir.Node) -> None:
        if node in self.outside:
            self._move_state(node)
            return
        rule = rule_of(node)
        view = NodeTrace(self, node)
        outputs: Sequence[Axes | None] = () if rule is None else rule.trace(view)
        self._settle(node, outputs)
        view.account(frozen_reason(node) if rule is None else None)
        if rule is None:
            self._freeze_captured(node)

    def _move_state(self, node: ir.Node) -> None:
        """Outside of its readers and writers a state keeps its size: it has no labels there."""
        for output in node.outputs:
            if output in self._readers:
                self.axes[output] = self._fresh(output)
            else:
                shape = self.shapes.of(output)
                self.axes[output] = None if shape is None else (None,) * len(shape)

    def _settle(self, node: ir.Node, outputs: Sequence[Axes | None]) -> None:
        """Take the labels of a node's outputs as far as they agree with the inferred shapes."""
        for index, output in enumerate(node.outputs):
            axes = outputs[index] if index < len(outputs) else None
            shape = self.shapes.of(output)
            if axes is None:
                self.axes[output] = None if shape is None else (None,) * len(shape)
                continue
            if shape is not None and len(shape) != len(axes):
                for labels in axes:
                    if labels is not None:
                        self.freeze(labels, node, "has another rank than shape inference says")
                self.axes[output] = (None,) * len(shape)
                continue
            self.axes[output] = tuple(
                self._checked(node, labels, None if shape is None else shape[axis])
                for axis, labels in enumerate(axes)
            )

    def _checked(self, node: ir.Node, labels: Labels | None, length: int | None) -> Labels | None:
        if labels is None:
            return None
        if length is not None and len(labels) != length:
            self.freeze(labels, node, "has another length than shape inference says")
            return None
        if len(labels) < 2:
            self.freeze(labels, node, "becomes an axis of length one, which would broadcast")
            return None
        return labels

    def _freeze_captured(self, node: ir.Node) -> None:
        """Tensors that the body of a Loop, Scan or unknown operator reads from outside."""
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                graphs = [attribute.as_graph()]
            elif attribute.type == ir.AttributeType.GRAPHS:
                graphs = list(attribute.as_graphs())
            else:
                continue
            for graph in graphs:
                inside = {graph, *graph.subgraphs()}
                read = [v for inner in graph.all_nodes() for v in inner.inputs if v is not None]
                for value in dict.fromkeys((*read, *graph.outputs)):
                    if value.graph not in inside:
                        self._freeze_value(
                            value, node.name or "", f"is read inside a {node.op_type}"
                        )

    def _if(self, node: ir.Node) -> None:
        """Both branches see the labels around them; their results are the same channels."""
        branches = [node.attributes[n].as_graph() for n in ("then_branch", "else_branch")]
        outer = self.path
        for number, branch in enumerate(branches):
            self.path = (*outer, (node.name or "", number))
            self._graph(branch)
        self.path = outer
        view = NodeTrace(self, node)
        outputs: list[Axes | None] = []
        for index in range(len(node.outputs)):
            if node.outputs[index] in self._joined:
                outputs.append(None)
                continue
            then, other = (self.of(branch.outputs[index]) for branch in branches)
            if then is None or other is None or len(then) != len(other):
                for branch in branches:
                    self._freeze_value(
                        branch.outputs[index],
                        node.name or "",
                        "differs between the branches of an If",
                    )
                outputs.append(None)
                continue
            outputs.append(tuple(view.tie(a, b) for a, b in zip(then, other, strict=True)))
        self._settle(node, outputs)


def _is_real(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype.is_floating_point()


def _feeds_quantization(value: ir.Value) -> bool:
    """Integer weights and zero points carry channels; other integers number something."""
    users = value.consumers()
    return bool(users) and all(
        n.op_type in {"DequantizeLinear", "QuantizeLinear"} and n.domain in {"", "com.microsoft"}
        for n in users
    )
