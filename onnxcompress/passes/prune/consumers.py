"""Linear layers as the regression sees them: ``y = W x + b`` for the unfolded input rows ``x``.

Convolutions, Gemm and MatMul keep their weights in different layouts; a :class:`Consumer` reads and
writes them all as ``W [G, O/G, D]`` with the input moments that go with it. What cannot be read
so is reported with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.statistics import AxisUnfold, ConvUnfold, Unfold
from onnxcompress.graph.constants import constant_tensor, set_initializer

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

MAX_WIDTH = 8192
"""Widest unfolded input whose covariance is collected (0.5 GiB in float64)."""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)


class UnsupportedError(Exception):
    """A contraction that the regression cannot treat; the message says why."""


@dataclass(frozen=True, slots=True)
class Consumer:
    """One linear layer.

    Attributes:
        node: Node name.
        op_type: Its operator.
        data: Name of the input value.
        unfold: What a row ``x`` is.
        weight: Initializer name of the weight.
        shape: Its shape as stored.
        transposed: Whether it is stored as [D, O] (Gemm without transB, MatMul).
        gain: Factor of the weight (Gemm's alpha).
        bias: Initializer name of the bias; None where there is none.
        output: Name of the value ``y``, after the bias.
        target_axis: Axis of ``output`` that ``y`` runs along.
        shared: Names of other nodes that read the same weight or bias.
    """

    node: str
    op_type: str
    data: str
    unfold: Unfold
    weight: str
    shape: tuple[int, ...]
    transposed: bool
    gain: float
    bias: str | None
    output: str
    target_axis: int
    shared: tuple[str, ...]

    @property
    def groups(self) -> int:
        """Number of groups ``G``; 1 except for grouped convolutions."""
        return self.unfold.groups if isinstance(self.unfold, ConvUnfold) else 1

    @property
    def taps(self) -> int:
        """Columns per input channel: the kernel's positions, or 1."""
        return self.unfold.taps if isinstance(self.unfold, ConvUnfold) else 1

    @property
    def width(self) -> int:
        """Columns ``D`` of one group."""
        return self.shape[0] if self.transposed else math.prod(self.shape[1:])

    @property
    def input_axis(self) -> int:
        """Axis of the stored weight that runs along the input channels (of one group)."""
        return 0 if self.transposed else 1

    @property
    def output_axis(self) -> int:
        """Axis of the stored weight that runs along the outputs."""
        return 1 - self.input_axis

    @property
    def outputs(self) -> int:
        """Number of outputs ``O``."""
        return self.shape[self.output_axis]

    @property
    def obstacle(self) -> str | None:
        """Why the layer cannot get new weights; None if it can."""
        if self.shared:
            return f"its weight or bias is shared with '{self.shared[0]}'"
        if self.width > MAX_WIDTH:
            return f"its input is too wide for a covariance ({self.width} > {MAX_WIDTH})"
        return None

    def matrix(self, model: ir.Model) -> Array:
        """``W``, [G, O/G, D], float64."""
        stored = _numpy(model, self.weight) * self.gain
        matrix = stored.T if self.transposed else stored.reshape(self.outputs, -1)
        return matrix.reshape(self.groups, self.outputs // self.groups, -1)

    def bias_vector(self, model: ir.Model) -> Array:
        """``b``, [O], float64; zeros where there is none."""
        if self.bias is None:
            return np.zeros(self.outputs)
        return np.broadcast_to(_numpy(model, self.bias).reshape(-1), (self.outputs,)).copy()

    def stored(
        self, model: ir.Model, matrix: Array, bias: Array
    ) -> dict[str, npt.NDArray[np.generic]]:
        """``W`` [G, O/G, D] and, if there is a bias, ``b`` [O] by initializer, as stored."""
        flat = matrix.reshape(self.outputs, -1) / self.gain
        weight = flat.T if self.transposed else flat.reshape(self.shape)
        return {self.weight: _typed(model, self.weight, weight)} | self._stored_bias(model, bias)

    def _stored_bias(self, model: ir.Model, bias: Array) -> dict[str, npt.NDArray[np.generic]]:
        if self.bias is None:
            return {}
        old = constant_tensor(model.graph.initializers[self.bias])
        shape = (1,) * (len(old.shape) - 1 if old is not None else 0) + (self.outputs,)
        return {self.bias: _typed(model, self.bias, bias.reshape(shape))}

    def write(self, model: ir.Model, matrix: Array, bias: Array) -> None:
        """Store ``W`` [G, O/G, D] and, if there is a bias, ``b`` [O], in the layer's own types."""
        for name, array in self.stored(model, matrix, bias).items():
            set_initializer(model.graph, name, array)

    def write_bias(self, model: ir.Model, bias: Array) -> None:
        """Store ``b``, [O], if there is a bias."""
        for name, array in self._stored_bias(model, bias).items():
            set_initializer(model.graph, name, array)

    def columns(self, channels: Indices) -> Indices:
        """The columns of ``x`` that belong to input channels (counted within a group).

        Args:
            channels: Any shape [..., m].

        Returns:
            [..., m · taps].
        """
        taps = np.arange(self.taps, dtype=np.int64)
        wide = channels[..., None] * self.taps + taps
        return wide.reshape(*channels.shape[:-1], channels.shape[-1] * self.taps)


@dataclass(frozen=True, slots=True)
class Layers:
    """The linear layers of a model's main graph.

    Attributes:
        consumers: Node name to layer.
        refused: Node name to the reason, for every other node.
    """

    consumers: Mapping[str, Consumer]
    refused: Mapping[str, str]

    @classmethod
    def of(cls, model: ir.Model) -> Layers:
        """Read all nodes of ``model``."""
        consumers: dict[str, Consumer] = {}
        refused: dict[str, str] = {}
        for node in model.graph:
            name = node.name or ""
            try:
                consumers[name] = consumer_of(node)
            except UnsupportedError as error:
                refused[name] = str(error)
        return cls(consumers, refused)

    def obstacle(self, node: str) -> str:
        """Why ``node`` cannot be refitted; "" if it can."""
        consumer = self.consumers.get(node)
        if consumer is not None:
            return consumer.obstacle or ""
        return self.refused.get(node, "it stands in a branch of an If or Loop")


def consumer_of(node: ir.Node) -> Consumer:
    """Read ``node`` as a linear layer.

    Raises:
        UnsupportedError: With the reason, if it cannot be read so.
    """
    if node.domain not in {"", "ai.onnx"} or node.op_type not in _READERS:
        raise UnsupportedError(f"{node.op_type} is not a linear layer that can be refitted")
    return _READERS[node.op_type](node)


def _conv(node: ir.Node) -> Consumer:
    weight, shape = _weight(node, 1, rank=None)
    kernel = shape[2:]
    rank = len(kernel)
    strides = _ints(node, "strides", (1,) * rank)
    dilations = _ints(node, "dilations", (1,) * rank)
    unfold = ConvUnfold(
        kernel, strides, dilations, _pads(node, kernel, strides, dilations), _int(node, "group", 1)
    )
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return _made(node, weight, shape, unfold, _bias(node, bias, shape[0]), target_axis=1)


def _gemm(node: ir.Node) -> Consumer:
    weight, shape = _weight(node, 1, rank=2)
    if _int(node, "transA", 0):
        raise UnsupportedError("its data input is transposed (transA)")
    if _float(node, "beta", 1.0) != 1.0:
        raise UnsupportedError("its bias has a factor (beta)")
    transposed = not _int(node, "transB", 0)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return _made(
        node,
        weight,
        shape,
        AxisUnfold(-1),
        _bias(node, bias, shape[1 if transposed else 0]),
        target_axis=1,
        transposed=transposed,
        gain=_float(node, "alpha", 1.0),
    )


def _matmul(node: ir.Node) -> Consumer:
    weight, shape = _weight(node, 1, rank=2)
    output = node.outputs[0]
    data = node.inputs[0]
    if data is None or data.shape is None or len(data.shape) < 2:
        raise UnsupportedError("the rank of its data input is unknown or 1")
    bias = None
    uses = list(output.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add" and not output.is_graph_output():
        add = uses[0].node
        other = add.inputs[1 - uses[0].idx]
        if other is not None and _spans(other, shape[1]):
            bias, output = other, add.outputs[0]
    return _made(
        node,
        weight,
        shape,
        AxisUnfold(-1),
        bias,
        target_axis=len(data.shape) - 1,
        transposed=True,
        output=output,
    )


_READERS = {"Conv": _conv, "Gemm": _gemm, "MatMul": _matmul}


def _made(
    node: ir.Node,
    weight: ir.Value,
    shape: tuple[int, ...],
    unfold: Unfold,
    bias: ir.Value | None,
    *,
    target_axis: int,
    transposed: bool = False,
    gain: float = 1.0,
    output: ir.Value | None = None,
) -> Consumer:
    data = node.inputs[0]
    if data is None or data.name is None:
        raise UnsupportedError("it has no data input")
    if gain == 0.0:
        raise UnsupportedError("its weight has the factor 0 (alpha)")
    final = node.outputs[0] if output is None else output
    last = final.producer()
    own = {node.name, None if last is None else last.name}
    readers = [*weight.uses(), *(() if bias is None else bias.uses())]
    return Consumer(
        node=node.name or "",
        op_type=node.op_type,
        data=data.name,
        unfold=unfold,
        weight=weight.name or "",
        shape=shape,
        transposed=transposed,
        gain=gain,
        bias=None if bias is None else bias.name,
        output=final.name or "",
        target_axis=target_axis,
        shared=tuple(sorted({u.node.name or "" for u in readers} - {n or "" for n in own})),
    )


def _weight(node: ir.Node, index: int, *, rank: int | None) -> tuple[ir.Value, tuple[int, ...]]:
    value = node.inputs[index] if len(node.inputs) > index else None
    tensor = constant_tensor(value)
    if value is None or tensor is None or not value.is_initializer():
        raise UnsupportedError("its weight is computed, not stored")
    if tensor.dtype not in _FLOATS:
        raise UnsupportedError(f"its weight is of type {tensor.dtype.name}")
    shape = tuple(int(d) for d in tensor.shape.numpy())
    if rank is not None and len(shape) != rank:
        raise UnsupportedError(f"its weight has {len(shape)} axes, not {rank}")
    return value, shape


def _bias(node: ir.Node, value: ir.Value | None, outputs: int) -> ir.Value | None:
    if value is None:
        return None
    if not _spans(value, outputs):
        raise UnsupportedError("its bias is computed or not one number per output")
    return value


def _spans(value: ir.Value, outputs: int) -> bool:
    """Whether ``value`` is a stored vector of one number per output (leading axes of 1 allowed)."""
    tensor = constant_tensor(value)
    if tensor is None or not value.is_initializer() or tensor.dtype not in _FLOATS:
        return False
    shape = tuple(int(d) for d in tensor.shape.numpy())
    return bool(shape) and shape[-1] == outputs and math.prod(shape) == outputs


def _pads(
    node: ir.Node, kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]
) -> tuple[int, ...]:
    """Explicit pads, computed from the input's shape where the node says SAME."""
    attribute = node.attributes.get("auto_pad")
    mode = "NOTSET" if attribute is None else attribute.as_string()
    if mode in {"NOTSET", ""}:
        return _ints(node, "pads", (0,) * (2 * len(kernel)))
    if mode == "VALID":
        return (0,) * (2 * len(kernel))
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    lengths = [] if shape is None else list(shape)[2:]
    begin, end = [], []
    for length, size, stride, dilation in zip(lengths, kernel, strides, dilations, strict=False):
        if not isinstance(length, int):
            break
        reach = (size - 1) * dilation + 1
        total = max((math.ceil(length / stride) - 1) * stride + reach - length, 0)
        small, large = total // 2, total - total // 2
        begin.append(large if mode == "SAME_LOWER" else small)
        end.append(small if mode == "SAME_LOWER" else large)
    if len(begin) != len(kernel):
        raise UnsupportedError(f"auto_pad={mode} needs an input of known size")
    return (*begin, *end)


def _ints(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return default if attribute is None else tuple(attribute.as_ints())


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _float(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def _numpy(model: ir.Model, name: str) -> Array:
    tensor = constant_tensor(model.graph.initializers[name])
    if tensor is None:
        raise UnsupportedError(f"'{name}' is not stored")
    return np.asarray(tensor.numpy()).astype(np.float64)


def _typed(model: ir.Model, name: str, array: Array) -> npt.NDArray[np.generic]:
    """``array`` in the type of an initializer."""
    tensor = constant_tensor(model.graph.initializers[name])
    dtype = np.dtype(np.float32) if tensor is None else tensor.numpy().dtype
    return np.ascontiguousarray(array).astype(dtype)
