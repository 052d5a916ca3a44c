"""Fold channel-wise affine operators into the convolution or matrix product beside them.

A *linear* node (Conv, ConvTranspose, Gemm, MatMul with a constant weight) computes y = W∗x + b.
What follows it is folded if it is, per output channel c, y'[c] = s[c]·y[c] + t[c]:

    BatchNormalization      s = γ / √(σ² + ε)      t = β − μ·s
    Mul, Div by a constant  s = k, 1/k             t = 0
    Add, Sub of a constant  s = 1                  t = k, −k
    constant − y            s = −1                 t = k

    s·(W∗x + b) + t  =  (s·W)∗x + (s·b + t)         s scales the rows of W that make channel c

A chain of them is composed first, (s₂, t₂)∘(s₁, t₁) = (s₂·s₁, s₂·t₁ + t₂), so the weights are
rounded once. For ``Gemm`` with α and β the new bias is β·s·C + t and β becomes 1. ``MatMul`` has no
bias: one ``Add`` of the composed constant remains, and on matrices both become one ``Gemm``.

BatchNormalization *in front of* a Conv or Gemm is folded into the input channels:

    W∗(s·x + t) + b  =  (W·s)∗x + (b + Σ W·t)       Σ over input channels and kernel positions

which is exact only without padding: a padded zero is a zero after the normalization, and would
become s·0 + t before it.

Everything is computed in float64 and rounded to the type of the weight. A refusal is reported with
its reason. Sources: Jacob et al. 2018 (arXiv 1712.05877, section 3.2), Krishnamoorthi 2018 (arXiv
1806.08342).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.statistics import Statistic
from onnxcompress.context import PassContext
from onnxcompress.graph.constants import is_constant, set_initializer
from onnxcompress.graph.naming import Namer
from onnxcompress.passes._affine import (
    ELEMENTWISE,
    LINEAR,
    Affine,
    Linear,
    RefusedError,
    array_of,
    batch_norm,
    bias_of,
    graph_of,
    is_candidate,
    is_op,
    label,
    linear_of,
    next_affine,
    only_user,
    required,
    scale_inputs,
    scale_outputs,
    shape_of,
)
from onnxcompress.passes.base import Change, PassOptions, PassReport, Skip, Stage, option

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldOptions(PassOptions):
    """Options of :class:`FoldPass`."""

    gemm: bool = option(True, "write MatMul and Add on matrices as one Gemm")
    before: bool = option(
        True, "also fold a BatchNormalization in front of an unpadded Conv or a Gemm"
    )


class FoldPass:
    """Fold BatchNormalization and constant Mul, Div, Add, Sub into the linear node before them."""

    name: ClassVar[str] = "fold"
    summary: ClassVar[str] = "fold normalizations and constant factors into weights and biases"
    stage: ClassVar[Stage] = Stage.PREPARE
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    options_type: ClassVar[type[PassOptions]] = FoldOptions

    def __init__(self, options: FoldOptions | None = None) -> None:
        self.options = options or FoldOptions()

    def plan(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Fold a copy, which shares the weights, and report what happened to it."""
        return self.run(model.clone(), ctx)

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Fold in place; values keep the names that they had in the unfolded graph."""
        del ctx
        before = sum(1 for _ in model.graph.all_nodes())
        folder = _Folder(Namer(model), self.options)
        for graph in model.graphs():
            for node in list(graph):
                if node.graph is not None and is_op(node, LINEAR):
                    folder.fold_after(node)
        if self.options.before:
            for graph in model.graphs():
                for node in list(graph):
                    if node.graph is not None and is_op(node, {"BatchNormalization"}):
                        folder.fold_before(node)
        after = sum(1 for _ in model.graph.all_nodes())
        return PassReport(
            changes=tuple(folder.changes),
            skips=tuple(folder.skips(model)),
            figures={"nodes_before": before, "nodes_after": after},
        )


@dataclass(slots=True)
class _Folder:
    """Folds node by node and keeps the report."""

    namer: Namer
    options: FoldOptions
    changes: list[Change] = field(default_factory=list)
    refused: dict[ir.Node, str] = field(default_factory=dict)

    def skips(self, model: ir.Model) -> Iterator[Skip]:
        """One skip for every candidate that is still there."""
        for node in model.graph.all_nodes():
            reason = self.refused.get(node)
            if reason is None and is_op(node, {"BatchNormalization"}):
                reason = f"its input comes from {_source(node.inputs[0])}, which has no weights"
            if reason is not None:
                yield Skip(node.name or "", node.op_type, reason)

    def fold_after(self, node: ir.Node) -> None:
        """Fold the affine chain behind a linear node into it."""
        value = node.outputs[0]
        if not any(is_candidate(user) for user, _ in value.uses()):
            return
        chain: list[ir.Node] = []
        try:
            linear = linear_of(node)
            bias = bias_of(linear)
            total = Affine(np.ones(linear.channels), np.zeros(linear.channels))
            while (found := next_affine(linear, value)) is not None:
                user, affine = found
                chain.append(user)
                total = total.then(affine)
                value = user.outputs[0]
        except RefusedError as error:
            self._refuse(value, str(error))
        if not chain:
            return
        if node.op_type == "MatMul":
            self._into_matmul(linear, chain, total)
        else:
            self._into_bias(linear, chain, total, bias)

    def fold_before(self, norm: ir.Node) -> None:
        """Fold a BatchNormalization into the linear node that is its only consumer."""
        value = norm.outputs[0]
        try:
            user = only_user(value, norm)
        except RefusedError:
            return  # the reason not to fold it into what is before it says more
        same_graph = user.graph is norm.graph
        if not same_graph or not is_op(user, {"Conv", "Gemm"}) or user.inputs[0] is not value:
            return
        try:
            linear = linear_of(user)
            weight, moved = scale_inputs(linear, batch_norm(norm))
            bias = bias_of(linear) + moved
        except RefusedError as error:
            self.refused.setdefault(norm, str(error))
            return
        if not self._fits(linear, (weight, bias), [norm]):
            return
        self._store(linear, weight, bias)
        value.replace_all_uses_with(required(norm.inputs[0]))
        self._drop([norm])
        self._changed(norm, f"folded into the input of {label(user)}")

    def _into_bias(
        self, linear: Linear, chain: list[ir.Node], total: Affine, bias: Float64
    ) -> None:
        """Conv, ConvTranspose, Gemm: scale the weight, write the bias, drop the chain."""
        node = linear.node
        weight = scale_outputs(linear, total.scale)
        bias = bias * total.scale + total.shift
        if not self._fits(linear, (weight, bias), chain):
            return
        self._store(linear, weight, bias)
        self._take_over(node.outputs[0], chain)
        for folded in chain:
            self._changed(folded, f"folded into {label(node)}")

    def _into_matmul(self, linear: Linear, chain: list[ir.Node], total: Affine) -> None:
        """MatMul: scale the weight; one Add remains where the shift is not zero, or a Gemm."""
        node, graph = linear.node, graph_of(linear.node)
        first_add = next((n for n in chain if n.op_type == "Add"), None)
        shifted = bool(np.any(total.shift))
        as_gemm = shifted and self._becomes_gemm(linear)
        if chain == [first_add] and shifted and not as_gemm:
            return  # MatMul and its bias: nothing to fold
        weight = scale_outputs(linear, total.scale)
        if not self._fits(linear, (weight, total.shift), chain):
            return
        self._store(linear, weight, None)
        output = node.outputs[0]
        self._take_over(output, chain)
        target = label(node)
        if shifted:
            bias = self._initializer(node, total.shift)
            if as_gemm:
                target = f"Gemm '{node.name}', made from it"
                kept = ir.node("Gemm", [*node.inputs, bias], name=node.name)
            else:
                name = first_add.name if first_add else self.namer.node(f"{node.name}/fold_add")
                kept = ir.node("Add", [output, bias], name=name)
            self._stand_in(output, kept)
            if as_gemm:
                graph.remove(node, safe=True)
        for folded in chain:
            if folded is first_add and not as_gemm and shifted:
                continue
            self._changed(folded, f"folded into {target}")

    def _becomes_gemm(self, linear: Linear) -> bool:
        data = linear.node.inputs[0]
        fast = linear.weight.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
        rank = None if data is None or data.shape is None else len(data.shape)
        return self.options.gemm and fast and rank == 2 and shape_of(linear.weight)[2:] == ()

    def _fits(self, linear: Linear, arrays: tuple[Float64, Float64], chain: list[ir.Node]) -> bool:
        """Whether new weight and bias are finite in the weight's type; refuses the chain if not."""
        dtype = array_of(linear.weight).dtype
        with np.errstate(over="ignore", invalid="ignore"):
            if all(bool(np.isfinite(array.astype(dtype)).all()) for array in arrays):
                return True
        for node in chain:
            self.refused[node] = f"the folded weights are not finite in {dtype.name}"
        return False

    def _store(self, linear: Linear, weight: Float64, bias: Float64 | None) -> None:
        """Round and write the weight, and the bias unless it is None or a needless zero."""
        rounded = weight.astype(array_of(linear.weight).dtype)
        node = linear.node
        if linear.weight.producer() is None:
            set_initializer(_owner(linear.weight), linear.weight.name or "", rounded)
        else:
            name = self.namer.value(f"{linear.weight.name}/fold_weight")
            node.replace_input_with(1, set_initializer(graph_of(node), name, rounded))
        has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
        if bias is not None and (has_bias or np.any(bias)):
            node.resize_inputs(3)
            old = node.inputs[2]
            node.replace_input_with(2, self._initializer(node, bias.reshape(-1)))
            _discard(old)
            node.attributes.pop("beta", None)

    def _initializer(self, node: ir.Node, data: Float64) -> ir.Value:
        dtype = array_of(required(node.inputs[1])).dtype
        name = self.namer.value(f"{node.name}/fold_bias")
        return set_initializer(graph_of(node), name, data.astype(dtype))

    def _stand_in(self, value: ir.Value, node: ir.Node) -> None:
        """Put ``node`` behind the producer of ``value`` and let its output replace that."""
        new, producer = node.outputs[0], value.producer()
        if producer is None:
            raise TypeError(f"'{value.name}' is not computed by a node")
        graph = graph_of(producer)
        graph.insert_after(producer, node)
        new.name, new.type, new.shape = value.name, value.type, value.shape
        value.name = self.namer.value(f"{value.name}/fold_product")
        for user, index in list(value.uses()):
            if user is not node:
                user.replace_input_with(index, new)
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = new

    def _take_over(self, output: ir.Value, chain: list[ir.Node]) -> None:
        """Let ``output`` stand for the last output of the chain, under that one's name."""
        last = chain[-1].outputs[0]
        name, shape, dtype = last.name, last.shape, last.type
        last.replace_all_uses_with(output, replace_graph_outputs=True)
        self._drop(chain)
        output.name, output.shape, output.type = name, shape, dtype

    def _drop(self, nodes: list[ir.Node]) -> None:
        inputs = [value for node in nodes for value in node.inputs]
        graph_of(nodes[0]).remove(nodes, safe=True)
        for value in inputs:
            _discard(value)

    def _changed(self, node: ir.Node, what: str) -> None:
        self.refused.pop(node, None)
        self.changes.append(Change(node.name or "", node.op_type, what))

    def _refuse(self, value: ir.Value, reason: str) -> None:
        """Note why what reads ``value`` stays.

        Arithmetic beside other consumers is part of an activation, the Add behind a MatMul is its
        bias, and the scale behind a product of two activations belongs to neither: no skips.
        """
        producer = value.producer()
        if producer is None:
            return
        product = producer.op_type == "MatMul"
        for user, _ in value.uses():
            if not is_candidate(user):
                continue
            if is_op(user, ELEMENTWISE):
                computed = product and not is_constant(producer.inputs[1])
                if len(value.uses()) > 1 or computed or (product and user.op_type == "Add"):
                    continue
            self.refused.setdefault(user, reason)


def _owner(value: ir.Value) -> ir.Graph:
    graph = value.graph
    if not isinstance(graph, ir.Graph):
        raise TypeError(f"initializer '{value.name}' belongs to no graph")
    return graph


def _source(value: ir.Value | None) -> str:
    producer = None if value is None else value.producer()
    return "a graph input" if producer is None else label(producer)


def _discard(value: ir.Value | None) -> None:
    """Remove an initializer that nothing reads any more."""
    if value is None or value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    if value.is_initializer() and isinstance(value.graph, ir.Graph):
        value.graph.initializers.pop(value.name or "", None)
