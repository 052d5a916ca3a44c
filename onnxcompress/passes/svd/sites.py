"""The layers that can become chains, each read as a matrix on unfolded rows."""

from __future__ import annotations

import enum
import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.statistics import AxisUnfold, ConvUnfold, Unfold
from onnxcompress.errors import UsageError
from onnxcompress.graph.constants import constant_tensor
from onnxcompress.numerics.low_rank import Kernel
from onnxcompress.passes.base import Skip
from onnxcompress.passes.prune.consumers import MAX_WIDTH, Consumer, UnsupportedError, consumer_of
from onnxcompress.passes.svd.options import SvdOptions

Array = npt.NDArray[np.float64]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})


class Kind(enum.Enum):
    """How a layer's weight meets its data."""

    CONV = "convolution"
    GEMM = "Gemm"
    MATMUL = "MatMul"
    LEFT = "MatMul with the constant on the left"
    BATCHED = "MatMul with a stack of matrices"
    RECURRENT = "input weights of a recurrent layer"
    EMBEDDING = "embedding table"
    TRANSPOSED = "transposed convolution"


@dataclass(frozen=True, slots=True)
class Site:
    """A layer ``y = W x + b`` that can become a chain.

    Attributes:
        node: Node name.
        op_type: Its operator.
        kind: How its weight meets its data.
        weight: Initializer name.
        shape: Its shape as stored.
        kernel: The weight as a matrix.
        data: Name of the value the rows are unfolded from; for an embedding the output.
        unfold: What a row is.
        output: Name of ``y``, after the bias.
        target_axis: Axis of ``output`` that ``y`` runs along.
        bias: Initializer that takes up means; None where there is none yet.
        takes_bias: Whether there is one or one can be added.
        transposed: Whether the weight is stored as [D, O].
        gain: Factor of the weight (Gemm's alpha).
    """

    node: str
    op_type: str
    kind: Kind
    weight: str
    shape: tuple[int, ...]
    kernel: Kernel
    data: str
    unfold: Unfold
    output: str
    target_axis: int
    bias: str | None = None
    takes_bias: bool = False
    transposed: bool = False
    gain: float = 1.0

    @property
    def parameters(self) -> int:
        """Weights."""
        return math.prod(self.shape)

    @property
    def batch(self) -> int:
        """Number of matrices."""
        return math.prod(self.shape[:-2]) if self.kind is Kind.BATCHED else 1

    @property
    def measured_at_output(self) -> bool:
        """Whether the second moment of the outputs is collected instead of that of the inputs."""
        return self.kind is Kind.EMBEDDING or (
            self.kernel.width > MAX_WIDTH and self.kind in {Kind.CONV, Kind.GEMM, Kind.MATMUL}
        )

    @property
    def names(self) -> tuple[str, str]:
        """What a name pattern can match."""
        return self.node, self.weight

    def matrices(self, model: ir.Model) -> list[Array]:
        """``W`` of every batch entry, [O, D]; float64, an embedding table in its own type."""
        tensor = constant_tensor(model.graph.initializers[self.weight])
        if tensor is None:
            raise UnsupportedError(f"'{self.weight}' is not stored")
        stored = np.asarray(tensor.numpy())
        if self.kind is Kind.EMBEDDING:
            wide = stored.dtype if stored.dtype.kind == "f" and stored.itemsize > 2 else np.float32
            return [stored.astype(wide).T]
        matrix = stored.astype(np.float64) * self.gain
        if self.kind is Kind.BATCHED:
            return [m.T for m in matrix.reshape(-1, *self.shape[-2:])]
        if self.kind is Kind.TRANSPOSED:
            return [matrix.reshape(self.shape[0], -1).T]
        return [matrix.T if self.transposed else matrix.reshape(self.kernel.outputs, -1)]


@dataclass(frozen=True, slots=True)
class Found:
    """The sites of a model, and what cannot be one with the reason."""

    sites: tuple[Site, ...]
    skips: tuple[Skip, ...]


def find_sites(model: ir.Model, options: SvdOptions) -> Found:
    """Read all layers with weights of ``model``, which is not changed.

    Raises:
        UsageError: If a name pattern matches no layer with weights.
    """
    sites: list[Site] = []
    skips: list[Skip] = []
    patterns = [*options.include, *options.exclude, *(p for p, _ in options.ranks)]
    matched: set[str] = set()
    for node in model.graph.all_nodes():
        index = _weight_input(node)
        if index is None:
            continue
        weight = node.inputs[index]
        names = (node.name or "", (weight.name if weight is not None else "") or "")
        matched.update(p for p in patterns if fnmatch.filter(names, p))
        try:
            if node.graph is not model.graph:
                raise UnsupportedError("it stands in a branch of an If, Loop or Scan")
            _check_names(names, options)
            sites.append(_site(node, index))
        except UnsupportedError as error:
            skips.append(Skip(node.name or "", node.op_type, str(error)))
        if node.op_type in _RECURRENT:
            reason = (
                "its recurrent weights stay whole: the operator multiplies by them at every step "
                "itself"
            )
            skips.append(Skip(node.name or "", node.op_type, reason))
    for pattern in patterns:
        if pattern not in matched:
            raise UsageError(
                f"the pattern '{pattern}' of the pass 'svd' matches no layer with weights",
                hint="Use --dry-run to see the layers and their names.",
            )
    return Found(tuple(sites), tuple(skips))


def _check_names(names: Sequence[str], options: SvdOptions) -> None:
    if any(fnmatch.filter(names, p) for p in options.exclude):
        raise UnsupportedError("excluded by svd.exclude")
    if options.include and not any(fnmatch.filter(names, p) for p in options.include):
        raise UnsupportedError("not among the names of svd.include")


def _weight_input(node: ir.Node) -> int | None:
    """Which input of ``node`` is a weight of two or more axes; None if there is none."""
    if node.domain not in {"", "ai.onnx"} or node.op_type not in _INPUTS:
        return None
    for index in _INPUTS[node.op_type]:
        value = node.inputs[index] if len(node.inputs) > index else None
        tensor = constant_tensor(value)
        if tensor is not None and len(tensor.shape) > 1 and tensor.dtype.is_floating_point():
            return index
    return None


_INPUTS = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "Gemm": (1, 0),
    "MatMul": (1, 0),
    "Gather": (0,),
    "LSTM": (1,),
    "GRU": (1,),
    "RNN": (1,),
}


def _site(node: ir.Node, index: int) -> Site:
    """Read one layer.

    Raises:
        UnsupportedError: With the reason, if it cannot become a chain.
    """
    weight = node.inputs[index]
    tensor = constant_tensor(weight)
    if weight is None or tensor is None or not weight.is_initializer():
        raise UnsupportedError("its weight is computed, not stored")
    if tensor.dtype not in _FLOATS:
        raise UnsupportedError(f"its weight is of type {tensor.dtype.name}")
    if weight.is_graph_output():
        raise UnsupportedError("its weight is also an output of the model")
    others = {u.node.name or "" for u in weight.uses() if u.node is not node}
    if others or len(list(weight.uses())) > 1:
        other = min(others) if others else node.name
        raise UnsupportedError(f"its weight is shared with '{other}'; a chain would double it")
    shape = tuple(int(d) for d in tensor.shape.numpy())
    if not np.isfinite(np.asarray(tensor.numpy(), np.float32)).all():
        raise UnsupportedError("its weight holds numbers that are not finite")
    if node.op_type == "Gather":
        return _embedding(node, weight, shape)
    if node.op_type == "ConvTranspose":
        return _transposed(node, weight, shape)
    if node.op_type in _RECURRENT:
        return _recurrent(node, weight, shape)
    if node.op_type == "Gemm" and index == 0:
        raise UnsupportedError("its constant is on the left")
    if node.op_type == "MatMul" and index == 0:
        return _left(node, weight, shape)
    if node.op_type == "MatMul" and len(shape) > 2:
        return _batched(node, weight, shape)
    _data(node, 0)
    return _linear(consumer_of(node))


def _linear(layer: Consumer) -> Site:
    if layer.groups > 1:
        raise UnsupportedError("a grouped or depthwise convolution is already factorized")
    taps = layer.unfold.kernel if isinstance(layer.unfold, ConvUnfold) else ()
    kernel = Kernel(layer.outputs, layer.width // math.prod(taps), taps)
    kinds = {"Conv": Kind.CONV, "Gemm": Kind.GEMM, "MatMul": Kind.MATMUL}
    own_bias = layer.bias is not None and not layer.shared
    return Site(
        node=layer.node,
        op_type=layer.op_type,
        kind=kinds[layer.op_type],
        weight=layer.weight,
        shape=layer.shape,
        kernel=kernel,
        data=layer.data,
        unfold=layer.unfold,
        output=layer.output,
        target_axis=layer.target_axis,
        bias=layer.bias if own_bias else None,
        takes_bias=own_bias or (layer.bias is None and layer.op_type != "MatMul"),
        transposed=layer.transposed,
        gain=layer.gain,
    )


def _data(node: ir.Node, index: int) -> tuple[ir.Value, int]:
    """The data input and its rank."""
    value = node.inputs[index]
    if value is None or not value.name or value.shape is None:
        raise UnsupportedError("the rank of its data input is unknown")
    if constant_tensor(value) is not None:
        raise UnsupportedError("its data are constant")
    return value, len(value.shape)


def _plain(
    node: ir.Node, kind: Kind, weight: ir.Value, shape: tuple[int, ...], kernel: Kernel,
    data: ir.Value, axis: int, target_axis: int,
) -> Site:  # fmt: skip
    return Site(
        node=node.name or "",
        op_type=node.op_type,
        kind=kind,
        weight=weight.name or "",
        shape=shape,
        kernel=kernel,
        data=data.name or "",
        unfold=AxisUnfold(axis),
        output=node.outputs[0].name or "",
        target_axis=target_axis,
    )


def _left(node: ir.Node, weight: ir.Value, shape: tuple[int, ...]) -> Site:
    data, rank = _data(node, 1)
    if len(shape) != 2 or rank < 2:
        raise UnsupportedError(f"its operands have {len(shape)} and {rank} axes")
    return _plain(node, Kind.LEFT, weight, shape, Kernel(*shape), data, rank - 2, rank - 2)


def _batched(node: ir.Node, weight: ir.Value, shape: tuple[int, ...]) -> Site:
    data, rank = _data(node, 0)
    if rank < 2:
        raise UnsupportedError("its data input has one axis")
    kernel = Kernel(shape[-1], shape[-2])
    return _plain(node, Kind.BATCHED, weight, shape, kernel, data, rank - 1, -1)


def _recurrent(node: ir.Node, weight: ir.Value, shape: tuple[int, ...]) -> Site:
    data, rank = _data(node, 0)
    if len(shape) != 3 or rank != 3:
        raise UnsupportedError(f"its input has {rank} axes, its weight {len(shape)}; both need 3")
    kernel = Kernel(shape[0] * shape[1], shape[2])
    return _plain(node, Kind.RECURRENT, weight, shape, kernel, data, 2, 2)


def _transposed(node: ir.Node, weight: ir.Value, shape: tuple[int, ...]) -> Site:
    if node.attributes.get_int("group", 1) != 1:
        raise UnsupportedError("a grouped or depthwise convolution is already factorized")
    data, rank = _data(node, 0)
    if rank != len(shape):
        raise UnsupportedError(f"its operands have {rank} and {len(shape)} axes")
    kernel = Kernel(math.prod(shape[1:]), shape[0])
    return _plain(node, Kind.TRANSPOSED, weight, shape, kernel, data, 1, 1)


def _embedding(node: ir.Node, weight: ir.Value, shape: tuple[int, ...]) -> Site:
    if len(shape) != 2 or node.attributes.get_int("axis", 0) not in {0, -2}:
        raise UnsupportedError("it does not read whole rows of a table with two axes")
    output, indices = node.outputs[0], node.inputs[1]
    if indices is None or constant_tensor(indices) is not None:
        raise UnsupportedError("it reads the same rows on every run")
    if indices.shape is None or len(indices.shape) == 0 or not output.name:
        raise UnsupportedError("the rank of its indices is unknown or 0")
    kernel = Kernel(shape[1], shape[0])
    return _plain(node, Kind.EMBEDDING, weight, shape, kernel, output, -1, -1)
