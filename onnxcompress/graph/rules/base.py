"""What a rule sees of a node: :class:`Trace` while labels spread, :class:`Shrink` while cutting.

A rule has two halves. ``trace`` says which positions of which axes of a node's inputs and outputs
are the same channel. ``shrink`` mends the node's attributes and shape constants after some of the
channels are gone; most operators need none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.graph.naming import Namer
from onnxcompress.graph.probe import Dims
from onnxcompress.graph.unions import Labels

Array = npt.NDArray[np.generic]
# One entry per axis: the label of each position, None for an axis that nothing can be removed from
# (dynamic, of length one, or fixed by the model's interface).
Axes = tuple[Labels | None, ...]
Outputs = Sequence[Axes | None]

# Operators that hand a weight on without mixing its axes.
_WEIGHT_PATH = frozenset(
    {"Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Transpose", "Unsqueeze"}
)


class Trace(Protocol):
    """The view of one node while labels spread; what :mod:`onnxcompress.graph.labels` offers.

    An input axis that carries labels must be accounted for: returned as part of an output, tied,
    contracted, frozen or dropped. The engine freezes what a rule forgets.
    """

    node: ir.Node
    opset: int
    head_dims: bool

    def axes(self, index: int) -> Axes | None:
        """Labels of input ``index``; None if it is absent or of unknown rank."""

    def shape(self, index: int) -> Dims | None:
        """Static shape of input ``index``."""

    def output_shape(self, index: int = 0) -> Dims | None:
        """Static shape of output ``index``."""

    def probes(self, value: ir.Value) -> tuple[Dims | None, Dims | None]:
        """The concrete shapes of ``value`` in both probes."""

    def fresh(self, size: int) -> Labels:
        """New labels."""

    def fixed(self, size: int) -> Labels:
        """New labels that can never be removed."""

    def tie(self, left: Labels | None, right: Labels | None) -> Labels | None:
        """The same channels: unite position by position; freezes the other where one is None.

        Returns:
            The common labels, None if they are frozen.
        """

    def freeze(self, labels: Labels | None, reason: str) -> None:
        """These channels have to stay."""

    def drop(self, labels: Labels | None) -> None:
        """These channels are accounted for although they do not reach an output."""

    def contract(
        self,
        data_input: int,
        axis: int,
        weight_input: int | None = None,
        weight_axis: int | None = None,
    ) -> None:
        """Record that ``axis`` of ``data_input`` is summed over, against ``weight_axis``."""

    def produce(self, data_input: int, axis: int, weight_input: int, weight_axis: int) -> None:
        """Record that ``weight_axis`` makes the channels on ``axis`` of the first output."""

    def macs(self, axes: Sequence[tuple[ir.Value | None, int]]) -> None:
        """Record multiply-accumulates as the product of axis lengths."""

    def rejected(self) -> frozenset[int]:
        """Choices of this node that led to frozen channels in an earlier round."""

    def chose(self, choice: int, labels: Labels, *, last: bool) -> None:
        """This choice carries these labels; if all freeze, another is tried unless ``last``."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How an operator couples channels, and how it shrinks with them.

    Attributes:
        trace: Returns the labels of the outputs (None: no labels).
        shrink: Mends attributes and shape constants; None if nothing depends on channel counts.
    """

    trace: Callable[[Trace], Outputs]
    shrink: Callable[[Shrink], None] | None = None


def attribute_int(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.as_int()


def attribute_ints(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """An integer list attribute; None if absent."""
    found = node.attributes.get(name)
    return None if found is None else tuple(found.as_ints())


def attribute_text(node: ir.Node, name: str, default: str) -> str:
    """A string attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.as_string()


def input_value(node: ir.Node, index: int) -> ir.Value | None:
    """Input ``index`` of a node; None if it is absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def constant_ints(node: ir.Node, name: str, index: int) -> tuple[int, ...] | None:
    """Integers that are an attribute in old opsets and a constant input in new ones; else None."""
    given = attribute_ints(node, name)
    if given is not None:
        return given
    array = constant_of(input_value(node, index))
    return None if array is None else tuple(int(i) for i in array.ravel())


def normal(axis: int, rank: int) -> int:
    """A non-negative axis."""
    return axis + rank if axis < 0 else axis


def weight_of(value: ir.Value | None, axis: int) -> tuple[ir.Value, int] | None:
    """The initializer behind ``value`` and its axis that ``axis`` is; None if there is none."""
    while value is not None:
        if value.is_initializer() and not value.is_graph_input():
            return value, axis
        node = value.producer()
        if node is None or node.domain or node.op_type not in _WEIGHT_PATH:
            return None
        if node.op_type == "Transpose":
            perm = attribute_ints(node, "perm")
            if perm is None:
                rank = None if value.shape is None else len(value.shape)
                if rank is None:
                    return None
                perm = tuple(reversed(range(rank)))
            axis = perm[axis]
        elif node.op_type == "Unsqueeze":
            found = _squeezed(node, axis)
            if found is None:
                return None
            axis = found
        value = node.inputs[0]
    return None


def _squeezed(node: ir.Node, axis: int) -> int | None:
    """The input axis that ``axis`` of an Unsqueeze's output is; None for a new or unknown one."""
    added, shape = constant_ints(node, "axes", 1), node.inputs[0].shape if node.inputs[0] else None
    if added is None or shape is None:
        return None
    new = {normal(a, len(shape) + len(added)) for a in added}
    return None if axis in new else axis - sum(a < axis for a in new)


def is_weight(value: ir.Value | None) -> bool:
    """Whether an initializer stands behind ``value``."""
    return weight_of(value, 0) is not None


class Shrink:
    """The view of one node while channels are cut. Masks are those before anything was cut.

    Args:
        model: The model being cut.
        node: The node to mend.
        kept: Value name to one mask per axis; None where nothing is removed.
        namer: Names for private constants.
    """

    def __init__(
        self,
        model: ir.Model,
        node: ir.Node,
        kept: Mapping[str, tuple[npt.NDArray[np.bool_] | None, ...]],
        namer: Namer,
    ) -> None:
        self.model, self.node = model, node
        self._kept, self._namer = kept, namer
        self.opset = model.opset_imports.get("", 1)

    def kept(self, value: ir.Value | None, axis: int) -> npt.NDArray[np.bool_] | None:
        """Which positions of an axis stay; None if all do."""
        masks = None if value is None else self._kept.get(value.name or "")
        return None if masks is None or axis >= len(masks) else masks[axis]

    def rank(self, value: ir.Value | None) -> int:
        """Number of axes of a value that carries units; 0 for others."""
        return 0 if value is None else len(self._kept.get(value.name or "", ()))

    def input_kept(self, index: int, axis: int) -> npt.NDArray[np.bool_] | None:
        """:meth:`kept` of input ``index``."""
        return self.kept(input_value(self.node, index), axis)

    def output_kept(self, index: int, axis: int) -> npt.NDArray[np.bool_] | None:
        """:meth:`kept` of output ``index``."""
        return self.kept(self.node.outputs[index], axis)

    def set_int(self, name: str, value: int) -> None:
        """Write an integer attribute."""
        self.node.attributes[name] = ir.AttrInt64(name, value)

    def set_ints(self, name: str, values: Sequence[int]) -> None:
        """Write an integer list attribute."""
        self.node.attributes[name] = ir.AttrInt64s(name, list(values))

    def constant(self, role: str, array: Array) -> ir.Value:
        """A new private initializer for this node."""
        name = self._namer.value(f"{self.node.name}/prune_{role}")
        return set_initializer(self.model.graph, name, array)

    def set_constant(self, index: int, role: str, array: Array) -> None:
        """Give input ``index`` a private constant."""
        if index >= len(self.node.inputs):
            self.node.resize_inputs(index + 1)
        self.node.replace_input_with(index, self.constant(role, array))

    def set_integers(self, name: str, index: int, values: Sequence[int]) -> None:
        """Write what is an attribute in old opsets and an input in new ones; keeps the dtype."""
        if name in self.node.attributes:
            self.set_ints(name, values)
            return
        old = constant_of(input_value(self.node, index))
        dtype = np.int64 if old is None else old.dtype
        self.set_constant(index, name, np.array(values, dtype=dtype))

    def patch(self, index: int, role: str, entries: Mapping[int, int]) -> None:
        """Change single entries of a vector input, whether it is constant or computed.

        A computed vector ``v`` becomes ``Where(changed, numbers, v)``.
        """
        if not entries:
            return
        vector = input_value(self.node, index)
        old = constant_of(vector)
        if old is not None:
            new = old.copy()
            for position, number in entries.items():
                new[position] = number
            self.set_constant(index, role, new)
            return
        if vector is None:
            return
        self.node.replace_input_with(index, self.patched(vector, role, entries))

    def patched(self, vector: ir.Value, role: str, entries: Mapping[int, int]) -> ir.Value:
        """``Where(changed, numbers, vector)``, inserted before this node."""
        size = max(entries) + 1
        if vector.shape is not None and len(vector.shape) == 1 and isinstance(vector.shape[0], int):
            size = max(size, vector.shape[0])
        changed, numbers = np.zeros(size, dtype=np.bool_), np.ones(size, dtype=np.int64)
        for position, number in entries.items():
            changed[position], numbers[position] = True, number
        where = self.insert(
            "Where",
            [
                self.constant(f"{role}_where", changed),
                self.constant(f"{role}_lengths", numbers),
                vector,
            ],
            role,
        )
        where.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        where.outputs[0].shape = ir.Shape([size])
        return where.outputs[0]

    def insert(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        role: str,
        attributes: Sequence[ir.Attr] = (),
        *,
        after: bool = False,
    ) -> ir.Node:
        """Insert a node next to this one."""
        name = self._namer.node(f"{self.node.name}/prune_{role}")
        new = ir.Node("", op_type, inputs, attributes, name=name)
        new.outputs[0].name = self._namer.value(f"{name}_output")
        graph = self.node.graph
        assert graph is not None  # noqa: S101 - nodes of a loaded model belong to a graph
        if after:
            graph.insert_after(self.node, new)
        else:
            graph.insert_before(self.node, new)
        return new
