"""Building nodes that compute something more inside a graph, in the operator set of the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcompress.calibration.arrays import Array
from onnxcompress.errors import ModelError
from onnxcompress.graph.naming import Namer

Attribute = int | float | str | Sequence[int]

# Reductions took their axes from an attribute before these versions.
_AXES_AS_INPUT = {
    "ReduceSum": 13,
    "ReduceMean": 18,
    "ReduceMin": 18,
    "ReduceMax": 18,
    "ReduceProd": 18,
    "ReduceSumSquare": 18,
}


class Emitter:
    """Makes nodes and constants; :meth:`take` hands the nodes over for insertion into the graph.

    Args:
        model: Gets the constants as initializers; its operator set decides the form of the nodes.
        role: What the names of nodes and values say they are for.
    """

    def __init__(self, model: ir.Model, role: str = "calibrate") -> None:
        self._graph = model.graph
        self._namer = Namer(model)
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._nodes: list[ir.Node] = []
        self._role = self._base = role
        self.opset = model.opset_imports.get("", 0)

    def about(self, name: str) -> None:
        """Name the following nodes after the value ``name``."""
        self._base = f"{name}/{self._role}"

    def need(self, opset: int, what: str) -> None:
        """Check that the model's operator set has what a statistic needs.

        Raises:
            ModelError: If it is older than ``opset``.
        """
        if self.opset < opset:
            raise ModelError(
                f"{what} needs operator set {opset}, the model has {self.opset}",
                hint="Raise the model's operator set (onnx.version_converter) first.",
            )

    def take(self) -> list[ir.Node]:
        """The nodes made since the last call, in order."""
        nodes, self._nodes = self._nodes, []
        return nodes

    def give_back(self, nodes: Sequence[ir.Node]) -> None:
        """Put nodes that were taken in front of those made since."""
        self._nodes = [*nodes, *self._nodes]

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """Add a node of one output."""
        return self.ops(op_type, inputs, 1, attributes)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        attributes: dict[str, Attribute],
    ) -> Sequence[ir.Value]:
        """Add a node."""
        name = self._namer.node(f"{self._base}_{op_type}")
        node = ir.node(
            op_type,
            list(inputs),
            attributes=dict(attributes),
            outputs=[ir.Value(name=self._namer.value(f"{name}_out{i}")) for i in range(outputs)],
            name=name,
        )
        self._nodes.append(node)
        return node.outputs

    def constant(self, array: Array) -> ir.Value:
        """An initializer; equal ones are shared."""
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = self._namer.value(f"{self._role}/constant_{len(self._constants)}")
            value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            value.shape = ir.Shape(array.shape)
            value.dtype = ir.DataType.from_numpy(array.dtype)
            self._graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def ints(self, *numbers: int) -> ir.Value:
        """A constant int64 vector."""
        return self.constant(np.array(numbers, dtype=np.int64))

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Convert the element type."""
        return self.op("Cast", value, to=int(dtype))

    def reduce(
        self, op_type: str, value: ir.Value, axes: Sequence[int] | None, *, keepdims: bool = False
    ) -> ir.Value:
        """Reduce over ``axes``, over all of them when None."""
        keep = int(keepdims)
        if axes is None:
            return self.op(op_type, value, keepdims=keep)
        if self.opset >= _AXES_AS_INPUT[op_type]:
            return self.op(op_type, value, self.ints(*axes), keepdims=keep)
        return self.op(op_type, value, axes=list(axes), keepdims=keep)

    def pad(self, value: ir.Value, pads: Sequence[int]) -> ir.Value:
        """Pad with zeros; ``pads`` as in ONNX, over all axes."""
        if self.opset >= 11:
            return self.op("Pad", value, self.ints(*pads))
        return self.op("Pad", value, pads=list(pads))

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        """Reshape to constants, 0 and -1 as in ONNX."""
        return self.op("Reshape", value, self.ints(*shape))

    def gather(self, value: ir.Value, indices: ir.Value, axis: int = 0) -> ir.Value:
        """Pick along an axis."""
        return self.op("Gather", value, indices, axis=axis)

    def count_up(self, length: ir.Value) -> ir.Value:
        """``0, 1, ..., length - 1`` as int64, for ``length`` of shape [1]."""
        ones = self.op("ConstantOfShape", length)
        filled = self.op("Add", ones, self.constant(np.array(1, np.float32)))
        return self.reshape(self.op("NonZero", filled), -1)

    def modulo(self, value: ir.Value, divisor: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Quotient and remainder of non-negative int64 values."""
        quotient = self.op("Div", value, divisor)
        return quotient, self.op("Sub", value, self.op("Mul", quotient, divisor))
