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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.constants import constant_tensor
from onnxcompress.graph.coupling import (
    Coupling,
    Cut,
    Frozen,
    Group,
    MacsTerm,
    Sink,
    Source,
)
from onnxcompress.graph.grouping import Freeze, Site, Spread, group_units
from onnxcompress.graph.probe import Dims, Shapes, probe
from onnxcompress.graph.rules import FROZEN, rule_of
from onnxcompress.graph.rules.base import Axes
from onnxcompress.graph.unions import Labels, Unions

__all__ = ["Coupling", "Cut", "Frozen", "Group", "MacsTerm", "Sink", "Source", "analyse"]

# Each round tries another carrier for the Reshape nodes whose channels froze.
_MAX_ROUNDS = 12

_FIXED = "meets an axis that is dynamic or fixed by the model's interface"


def analyse(
    model: ir.Model, *, reshape_policy: Literal["heads", "head_dims"] = "heads"
) -> Coupling:
    """Find the units that can be removed from ``model``, which is not changed.

    Args:
        model: A model after :func:`onnxcompress.model_io.normalize` and
            :func:`onnxcompress.graph.canonical.canonicalize`.
        reshape_policy: Which factor of a split axis carries the channels where there is a choice:
            the outermost ("heads" of an attention layer) or the innermost ("head_dims").
    """
    shapes = probe(model)
    rejected: dict[ir.Node, frozenset[int]] = {}
    for _ in range(_MAX_ROUNDS):
        walk = Walk(model, shapes, rejected, head_dims=reshape_policy == "head_dims")
        spread = walk.run()
        failed = _to_reject(walk.choices, spread)
        if not failed:
            break
        for choice in failed:
            rejected[choice.node] = rejected.get(choice.node, frozenset()) | {choice.choice}
    return group_units(spread)


def _to_reject(choices: Sequence[_Choice], spread: Spread) -> list[_Choice]:
    """Of each set of connected choices whose channels all froze, the one furthest downstream.

    A wrong choice freezes the right ones before it, so the latest is revised first.
    """
    frozen = spread.frozen_roots()
    latest: dict[int, _Choice] = {}
    for choice in choices:
        roots = spread.roots[choice.labels]
        if not choice.last and frozen[roots].all():
            latest[int(roots.flat[0])] = choice
    return list(latest.values())


@dataclass(frozen=True, slots=True)
class _Choice:
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
    """

    def __init__(
        self,
        model: ir.Model,
        shapes: Shapes,
        rejected: dict[ir.Node, frozenset[int]],
        *,
        head_dims: bool,
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
        self.choices: list[_Choice] = []
        self.macs: list[MacsTerm] = []
        self.path: tuple[tuple[str, int], ...] = ()

    def run(self) -> Spread:
        """Spread labels over the whole model."""
        self._graph(self.model.graph)
        for value in self.model.graph.outputs:
            self._freeze_value(value, "", "is an output of the model")
        return Spread(
            roots=self.unions.solve(),
            births=self.births,
            axes=self.axes,
            freezes=self.freezes,
            sinks=self.sinks,
            sources=self.sources,
            macs=self.macs,
        )

    def of(self, value: ir.Value) -> Axes | None:
        """Labels of a value, made on first sight for initializers and graph inputs."""
        if value not in self.axes:
            self.axes[value] = self._born(value)
        return self.axes[value]

    def _born(self, value: ir.Value) -> Axes | None:
        shape = self.shapes.of(value)
        if shape is None:
            return None
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

    # --- graphs and nodes ---------------------------------------------------------------------

    def _graph(self, graph: ir.Graph) -> None:
        for node in graph:
            if node.op_type == "If" and node.domain in {"", "ai.onnx"}:
                self._if(node)
            else:
                self._node(node)

    def _node(self, node: ir.Node) -> None:
        rule = rule_of(node)
        view = NodeTrace(self, node)
        outputs: Sequence[Axes | None] = () if rule is None else rule.trace(view)
        self._settle(node, outputs)
        view.account(self._reason(node) if rule is None else None)
        if rule is None:
            self._freeze_captured(node)

    @staticmethod
    def _reason(node: ir.Node) -> str:
        if node.domain in {"", "ai.onnx"} and node.op_type in FROZEN:
            return f"meets {node.op_type}, which {FROZEN[node.op_type]}"
        return f"meets {node.domain or 'ai.onnx'}::{node.op_type}, an operator without a rule"

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
                for inner in graph.all_nodes():
                    for value in inner.inputs:
                        if value is not None and value in self.axes:
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


class NodeTrace:
    """A :class:`~onnxcompress.graph.rules.base.Trace` of one node within a walk."""

    __slots__ = ("_accounted", "_walk", "head_dims", "node", "opset")

    def __init__(self, walk: Walk, node: ir.Node) -> None:
        self._walk, self.node = walk, node
        self.opset, self.head_dims = walk.opset, walk.head_dims
        self._accounted: list[Labels] = []

    def axes(self, index: int) -> Axes | None:
        """Labels of input ``index``."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return None if value is None else self._walk.of(value)

    def shape(self, index: int) -> Dims | None:
        """Static shape of input ``index``."""
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        return self._walk.shapes.of(value)

    def output_shape(self, index: int = 0) -> Dims | None:
        """Static shape of output ``index``."""
        return self._walk.shapes.of(self.node.outputs[index])

    def probes(self, value: ir.Value) -> tuple[Dims | None, Dims | None]:
        """Concrete shapes in both probes."""
        first, second = self._walk.shapes.probes
        return first.get(value), second.get(value)

    def fresh(self, size: int) -> Labels:
        """New labels."""
        return self._walk.unions.fresh(size)

    def fixed(self, size: int) -> Labels:
        """New labels that stay."""
        labels = self._walk.unions.fresh(size)
        if size:
            self._walk.freezes.append(Freeze(labels, self.node.name or "", "", 0, "is fixed"))
        return labels

    def tie(self, left: Labels | None, right: Labels | None) -> Labels | None:
        """Unite, or freeze one side where the other is fixed."""
        if left is None or right is None:
            for labels in (left, right):
                self.freeze(
                    labels, "meets an axis that is dynamic or fixed by the model's interface"
                )
            return None
        if left.ndim == right.ndim == 1 and len(left) != len(right):
            self.freeze(left, "meets an axis of another length")
            self.freeze(right, "meets an axis of another length")
            return None
        self._walk.unions.tie(left, right)
        self._accounted += [left, right]
        return left

    def freeze(self, labels: Labels | None, reason: str) -> None:
        """These channels have to stay."""
        if labels is not None and labels.size:
            self._walk.freeze(labels, self.node, reason)
            self._accounted.append(labels)

    def drop(self, labels: Labels | None) -> None:
        """Accounted for."""
        if labels is not None:
            self._accounted.append(labels)

    def contract(
        self,
        data_input: int,
        axis: int,
        weight_input: int | None = None,
        weight_axis: int | None = None,
    ) -> None:
        """Record a sum."""
        axes = self.axes(data_input)
        labels = None if axes is None or axis >= len(axes) else axes[axis]
        self.drop(labels)
        if weight_input is not None and weight_axis is not None:
            weight = self.axes(weight_input)
            self.drop(None if weight is None else weight[weight_axis])
        if labels is not None:
            self._walk.sinks.append(
                Site(self.node, data_input, axis, weight_input, weight_axis, labels)
            )

    def produce(self, data_input: int, axis: int, weight_input: int, weight_axis: int) -> None:
        """Record a weight that makes channels."""
        weight = self.axes(weight_input)
        labels = None if weight is None else weight[weight_axis]
        if labels is not None:
            self._walk.sources.append(
                Site(self.node, data_input, axis, weight_input, weight_axis, labels)
            )

    def macs(self, axes: Sequence[tuple[ir.Value | None, int]]) -> None:
        """Record multiply-accumulates."""
        named = tuple((v.name or "", axis) for v, axis in axes if v is not None)
        self._walk.macs.append(MacsTerm(self.node.name or "", named, self._walk.path))

    def rejected(self) -> frozenset[int]:
        """Choices that froze in earlier rounds."""
        return self._walk.rejected.get(self.node, frozenset())

    def chose(self, choice: int, labels: Labels, *, last: bool) -> None:
        """Remember a choice."""
        self._walk.choices.append(_Choice(self.node, choice, labels, last))

    def account(self, reason: str | None) -> None:
        """Freeze every input channel that is neither in an output nor otherwise accounted for."""
        outputs = [
            labels
            for output in self.node.outputs
            for labels in self._walk.axes.get(output) or ()
            if labels is not None
        ]
        known = {id(labels) for labels in (*outputs, *self._accounted)}
        pool: Labels | None = None
        for index in range(len(self.node.inputs)):
            for labels in self.axes(index) or ():
                if labels is None or id(labels) in known:
                    continue
                if pool is None:
                    parts = [a.ravel() for a in (*outputs, *self._accounted)]
                    pool = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
                lost = labels[~np.isin(labels, pool)]
                if lost.size:
                    self._walk.freeze(lost, self.node, reason or f"is lost in {self.node.op_type}")


def _is_real(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype.is_floating_point()


def _feeds_quantization(value: ir.Value) -> bool:
    """Integer weights and zero points carry channels; other integers number something."""
    users = value.consumers()
    return bool(users) and all(
        n.op_type in {"DequantizeLinear", "QuantizeLinear"} and n.domain == "" for n in users
    )
