"""Weights as matrices: which axes of a tensor are output channels, and the way there and back.

A weight of any rank is quantized as a matrix [R, D]: its *row axes*, in order, make the rows (the
output channels, each with scales of its own), all others the columns (what is contracted).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor is a matrix.

    Attributes:
        shape: Shape of the tensor.
        rows: Its row axes, ascending.
    """

    shape: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of the tensor, row axes first."""
        return (*self.rows, *(a for a in range(len(self.shape)) if a not in self.rows))

    @property
    def row_count(self) -> int:
        """``R``."""
        return math.prod(self.shape[a] for a in self.rows)

    @property
    def columns(self) -> int:
        """``D``."""
        return math.prod(self.shape) // max(self.row_count, 1)

    @property
    def permuted(self) -> tuple[int, ...]:
        """The tensor's shape with the row axes first."""
        return tuple(self.shape[a] for a in self.order)

    @property
    def back(self) -> tuple[int, ...]:
        """The permutation from :attr:`permuted` to :attr:`shape`."""
        return tuple(int(a) for a in np.argsort(self.order))

    @property
    def per_row(self) -> tuple[int, ...]:
        """The shape of one number per row that broadcasts against the tensor."""
        return tuple(d if a in self.rows else 1 for a, d in enumerate(self.shape))

    def matrix(self, tensor: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """The tensor as [R, D]."""
        return tensor.transpose(self.order).reshape(self.row_count, self.columns)

    def tensor(self, matrix: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """The inverse of :meth:`matrix`."""
        return np.ascontiguousarray(matrix.reshape(self.permuted).transpose(self.back))


def row_axes(node: ir.Node, index: int, rank: int) -> tuple[int, ...] | None:
    """The row axes of a constant of rank ``rank`` at input ``index`` of ``node``.

    None if the node does not contract that input: then it is no weight there.
    """
    if node.domain != "":
        return None
    axes = tuple(range(rank))
    match node.op_type, index:
        case "Conv", 1:
            return (0,)
        case "ConvTranspose", 1:
            # Depthwise: one output channel per group, which only axis 0 tells apart.
            shape = None if node.inputs[1] is None else node.inputs[1].shape
            depthwise = shape is not None and shape[1] == 1
            return (0,) if depthwise and node.attributes.get_int("group", 1) != 1 else (1,)
        case "MatMul", 0 | 1 if rank >= 2:
            return tuple(a for a in axes if a != (rank - 2 if index else rank - 1))
        case "Gemm", 0:
            return (1,) if node.attributes.get_int("transA", 0) else (0,)
        case "Gemm", 1:
            return (0,) if node.attributes.get_int("transB", 0) else (1,)
        case (("LSTM" | "GRU" | "RNN"), (1 | 2)):
            return (0, 1)
        case "Gather", 0 if rank >= 2:
            return (node.attributes.get_int("axis", 0) % rank,)
        case "Einsum", _:
            return _einsum_rows(node, index, rank)
        case "Transpose", 0:
            return _through_transpose(node, rank)
        case "Identity", 0:
            return _first_rows(node.outputs[0], rank)
    return None


def _einsum_rows(node: ir.Node, index: int, rank: int) -> tuple[int, ...] | None:
    equation = node.attributes.get_string("equation", "") or ""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or index >= len(terms) or len(terms[index]) != rank:
        return None
    rows = tuple(a for a, letter in enumerate(terms[index]) if letter in right)
    return rows if 0 < len(rows) < rank else None


def _through_transpose(node: ir.Node, rank: int) -> tuple[int, ...] | None:
    found = _first_rows(node.outputs[0], rank)
    if found is None:
        return None
    perm = node.attributes.get_ints("perm", None) or tuple(reversed(range(rank)))
    return tuple(sorted(perm[a] for a in found))


def _first_rows(value: ir.Value, rank: int) -> tuple[int, ...] | None:
    """The row axes in the first use of ``value``; None if any use is no contraction."""
    found = [row_axes(user, index, rank) for user, index in value.uses()]
    if not found or None in found or value.is_graph_output():
        return None
    return found[0]
