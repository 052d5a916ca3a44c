"""What a rule sees of one node while labels spread, and how its books are closed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.coupling import MacsTerm
from onnxcompress.graph.grouping import Freeze, Site
from onnxcompress.graph.probe import Dims
from onnxcompress.graph.rules.base import Axes
from onnxcompress.graph.unions import Labels

if TYPE_CHECKING:
    from onnxcompress.graph.walk import Walk


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
        self._walk.choose(self.node, choice, labels, last=last)

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
