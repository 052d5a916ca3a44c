"""Which unfolding belongs to a layer, and where its rows lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.feeds import RunFeeds
from onnxcompress.calibration.statistics import AxisUnfold, ConvUnfold, Unfold
from onnxcompress.errors import ModelError


def unfold_of(node: ir.Node, data_input: int = 0) -> Unfold:
    """How to unfold the data input of a layer so that its weight is a matrix on the rows.

    Conv unfolds its receptive fields, with ``auto_pad`` turned into pads; Gemm, MatMul, RNN, GRU
    and LSTM the contracted axis; ConvTranspose its channels.

    Args:
        node: The layer.
        data_input: Number of the input that is data (for MatMul and Gemm it may be 1).

    Raises:
        ModelError: If the operator is no such layer, or its kernel or ``SAME`` padding is unknown.
    """
    if node.op_type == "Conv":
        return _conv_unfold(node)
    if node.op_type == "ConvTranspose":
        return AxisUnfold(1)
    if node.op_type in {"MatMul", "MatMulInteger"}:
        return AxisUnfold(-1 if data_input == 0 else -2)
    if node.op_type == "Gemm":
        transposed = node.attributes.get_int("transB" if data_input else "transA", 0)
        return AxisUnfold(1 if bool(transposed) == (data_input == 1) else 0)
    if node.op_type in {"RNN", "GRU", "LSTM"}:
        return AxisUnfold(-1)
    raise ModelError(f"{node.op_type} '{node.name}' has no input to unfold")


def _conv_unfold(node: ir.Node) -> ConvUnfold:
    label = f"Conv '{node.name}'"
    kernel = tuple(node.attributes.get_ints("kernel_shape", ()))
    if not kernel:
        weight = node.inputs[1]
        shape = None if weight is None else weight.shape
        if shape is None or not all(isinstance(d, int) for d in shape[2:]):
            raise ModelError(f"{label}: its kernel shape is unknown")
        kernel = tuple(int(d) for d in shape[2:] if isinstance(d, int))
    rank = len(kernel)
    strides = tuple(node.attributes.get_ints("strides", ())) or (1,) * rank
    dilations = tuple(node.attributes.get_ints("dilations", ())) or (1,) * rank
    groups = node.attributes.get_int("group", 1)
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    pads = tuple(node.attributes.get_ints("pads", ())) or (0,) * (2 * rank)
    if auto == "VALID":
        pads = (0,) * (2 * rank)
    elif auto in {"SAME_UPPER", "SAME_LOWER"}:
        data = node.inputs[0]
        lengths = [None] * rank if data is None or data.shape is None else data.shape[2:]
        pads = _same_pads(
            [d if isinstance(d, int) else None for d in lengths],
            [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)],
            strides,
            upper=auto == "SAME_UPPER",
            label=label,
        )
    return ConvUnfold(kernel, strides, dilations, pads, groups)


def _same_pads(
    lengths: Sequence[int | None],
    fields: Sequence[int],
    strides: Sequence[int],
    *,
    upper: bool,
    label: str,
) -> tuple[int, ...]:
    """The pads of ``auto_pad=SAME_*``: output length ``ceil(length / stride)``."""
    begins, ends = [], []
    for length, extent, stride in zip(lengths, fields, strides, strict=True):
        if length is None and stride > 1:
            raise ModelError(
                f"{label}: auto_pad=SAME with stride {stride} needs the length of its input's axes",
                hint="Fix the model's dynamic axes, or export explicit pads.",
            )
        steps = -(-length // stride) if length is not None else 0
        total = extent - 1 if length is None else max((steps - 1) * stride + extent - length, 0)
        half = total // 2
        begins.append(half if upper else total - half)
        ends.append(total - half if upper else half)
    return (*begins, *ends)


@dataclass(frozen=True, slots=True)
class ConvGrid:
    """The positions of a convolution over inputs of known lengths.

    Attributes:
        unfold: The geometry.
        padded: Lengths of the padded spatial axes.
    """

    unfold: ConvUnfold
    padded: tuple[int, ...]

    @classmethod
    def over(cls, unfold: ConvUnfold, lengths: Sequence[int]) -> ConvGrid:
        """The positions over inputs that are not padded yet.

        Args:
            unfold: The geometry.
            lengths: Lengths of the spatial axes.
        """
        half = len(unfold.kernel)
        ends = zip(lengths, unfold.pads[:half], unfold.pads[half:], strict=True)
        return cls(unfold, tuple(length + begin + end for length, begin, end in ends))

    @property
    def outputs(self) -> tuple[int, ...]:
        """Lengths of the output, ``(padded - (kernel - 1) dilation - 1) // stride + 1``."""
        return tuple(
            (length - (k - 1) * d - 1) // s + 1
            for length, k, d, s in zip(
                self.padded,
                self.unfold.kernel,
                self.unfold.dilations,
                self.unfold.strides,
                strict=True,
            )
        )

    @property
    def per_sample(self) -> int:
        """Rows of one sample."""
        return math.prod(self.outputs)

    def places(self) -> npt.NDArray[np.int64]:
        """Positions of the taps of each row within one flattened padded sample, [rows, taps]."""
        strides = np.cumprod((1, *self.padded[:0:-1]), dtype=np.int64)[::-1]
        starts = np.indices(self.outputs).reshape(len(self.padded), -1).T * self.unfold.strides
        taps = np.indices(self.unfold.kernel).reshape(len(self.padded), -1).T
        taps = taps * self.unfold.dilations
        places: npt.NDArray[np.int64] = (starts @ strides)[:, np.newaxis] + (taps @ strides)
        return places

    def positions(
        self, feeds: RunFeeds, places: npt.NDArray[np.int64], max_rows: int | None
    ) -> npt.NDArray[np.int64]:
        """Positions of the taps of a run's rows within all samples flattened, [k, taps].

        Args:
            feeds: The run.
            places: :meth:`places`.
            max_rows: As in a request.
        """
        if max_rows is None:
            rows = np.arange(feeds.count * self.per_sample)
        else:
            rows = feeds.rows(self.per_sample, max_rows)
        sample, row = np.divmod(rows, self.per_sample)
        picked: npt.NDArray[np.int64] = places[row]
        picked += (sample * math.prod(self.padded))[:, np.newaxis]
        return picked


def weight_order(unfold: Unfold, columns: int) -> npt.NDArray[np.int64]:
    """Where the columns of the weight's order lie in the order of :func:`emit_rows`.

    Args:
        unfold: The geometry.
        columns: ``D``.
    """
    taps = unfold.taps if isinstance(unfold, ConvUnfold) else 1
    return np.arange(columns).reshape(taps, columns // taps).T.ravel()


def shift_columns(
    shift: npt.NDArray[np.float64], groups: int, columns: int
) -> npt.NDArray[np.float64]:
    """The shift of every column, [G, D], from one per channel or one per column."""
    if shift.size == groups * columns:
        return shift.reshape(groups, columns)
    channels = shift.size // groups
    return np.tile(shift.reshape(groups, channels), (1, columns // channels))
