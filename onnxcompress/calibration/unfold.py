"""Unfolding a tensor into rows inside the graph.

A convolution is a matrix product of ``W.reshape(O, C/G * prod(kernel))`` with its unfolded input
(im2col). Inside the graph the unfolding is one Gather of whole channel vectors: the padded input is
laid out channels last and flattened to ``[positions, C]``; row ``r`` takes the positions of its
kernel taps. This copies the data once, handles every stride, dilation and padding alike, and a
subset of the rows costs no more than its share. (Measured against one strided Slice per tap with a
Concat: 42 instead of 55 ms for 64 x 56 x 56 and a 3 x 3 kernel, 8 samples; a one-hot grouped Conv:
98 ms.) Columns come out tap first and are put into the order of the weight at the end, on the small
matrices of moments.

Where the graph declares the lengths of a sample's axes, the positions are computed outside and fed,
once for all layers of a geometry. Otherwise the graph computes them from the shapes at run time;
that takes some forty nodes per layer, and onnxruntime takes quadratic time to load them (18 s for a
residual network of 56 layers with its reference, 3 s without).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from onnxcompress.calibration.feeds import Feeder
from onnxcompress.calibration.geometry import ConvGrid
from onnxcompress.calibration.statistics import AxisUnfold, ConvUnfold, Unfold
from onnxcompress.errors import ModelError
from onnxcompress.graph.emit import Emitter


class Inputs(Protocol):
    """Where extra inputs of the graph come from."""

    @property
    def sample_count(self) -> int:
        """Samples of all runs."""

    def feed(self, key: str, feeder: Feeder, dtype: ir.DataType, *, rank: int = 1) -> ir.Value:
        """An input of ``rank`` axes that ``feeder`` fills at each run; one input per key."""


@dataclass(frozen=True, slots=True)
class Source:
    """The tensor to unfold.

    Attributes:
        value: It, in floating point.
        rank: Number of its axes.
        sample: Declared lengths of the axes after the first, None where unknown; None when the
            first axis is not known to count samples.
    """

    value: ir.Value
    rank: int
    sample: tuple[int | None, ...] | None


@dataclass(frozen=True, slots=True)
class Rows:
    """The unfolded rows of one batch.

    Attributes:
        matrix: [k, D] for one group, else [G, k, D]; columns tap first.
        chosen: int64 [k], the rows taken; None when all were.
        shift: Subtracted from the rows: per channel [C] when all rows were taken, else per column
            of ``matrix``.
        per_sample: Rows there are per sample, where ``sample`` was relied on.
        total: int64 [1], the rows there are, where it was not.
    """

    matrix: ir.Value
    chosen: ir.Value | None
    shift: ir.Value
    per_sample: int | None = None
    total: ir.Value | None = None


def emit_rows(
    e: Emitter, source: Source, unfold: Unfold, max_rows: int | None, inputs: Inputs
) -> Rows:
    """Add the nodes that unfold a tensor.

    Args:
        e: Receives the nodes.
        source: The tensor.
        unfold: What a row is.
        max_rows: As in a request.
        inputs: Gives the inputs that pick rows.

    Raises:
        ModelError: If the rank does not go with ``unfold``, or the operator set is too old.
    """
    if isinstance(unfold, AxisUnfold):
        return _emit_axis(e, source, unfold, max_rows, inputs)
    if source.rank != len(unfold.kernel) + 2:
        raise ModelError(
            f"tensor '{source.value.name}' has {source.rank} axes, a kernel of "
            f"{list(unfold.kernel)} unfolds {len(unfold.kernel) + 2}"
        )
    x, rank = source.value, source.rank
    if any(unfold.pads):
        x = e.pad(x, _spatial_pads(unfold.pads))
    last = e.op("Transpose", x, perm=[0, *range(2, rank), 1])
    flat = e.op("Flatten", last, axis=rank - 1)
    grid = _grid(unfold, source.sample)
    pointwise = unfold.taps == 1 and set(unfold.strides) == {1}
    if grid is not None:
        return _emit_grid(e, flat, grid, pointwise, max_rows, inputs)
    return _emit_dynamic(e, last, flat, unfold, pointwise, max_rows, inputs)


def _emit_axis(
    e: Emitter, source: Source, unfold: AxisUnfold, max_rows: int | None, inputs: Inputs
) -> Rows:
    x, rank = source.value, source.rank
    if not -rank <= unfold.axis < rank:
        raise ModelError(f"tensor '{x.name}' has {rank} axes, no axis {unfold.axis}")
    axis = unfold.axis % rank
    flat = axis_last(e, x, rank, axis)
    others = None
    if source.sample is not None and axis > 0:
        others = [length for i, length in enumerate(source.sample, 1) if i != axis]
    if others is not None and (lengths := _known(others)) is not None:
        return _centred(e, flat, *_fed_rows(math.prod(lengths), max_rows, inputs))
    total = e.gather(e.op("Shape", flat), e.ints(0))
    chosen = None if max_rows is None else _chosen_rows(e, total, max_rows, inputs)
    return _centred(e, flat, chosen, total=total)


def axis_last(e: Emitter, x: ir.Value, rank: int, axis: int) -> ir.Value:
    """Flatten to [rows, length of axis], the other axes in order."""
    if axis != rank - 1:
        x = e.op("Transpose", x, perm=[*(i for i in range(rank) if i != axis), axis])
    return e.op("Flatten", x, axis=rank - 1)


def _spatial_pads(pads: tuple[int, ...]) -> tuple[int, ...]:
    half = len(pads) // 2
    return (0, 0, *pads[:half], 0, 0, *pads[half:])


def _known(lengths: Sequence[int | None]) -> tuple[int, ...] | None:
    known = tuple(length for length in lengths if length is not None)
    return known if len(known) == len(lengths) else None


# ------------------------------------------------------------------ lengths known beforehand


def _grid(unfold: ConvUnfold, sample: tuple[int | None, ...] | None) -> ConvGrid | None:
    lengths = None if sample is None else _known(sample[1:])
    return None if lengths is None else ConvGrid.over(unfold, lengths)


def _fed_rows(per_sample: int, max_rows: int | None, inputs: Inputs) -> tuple[ir.Value | None, int]:
    """The input with the chosen rows (None: all), and the rows per sample."""
    if max_rows is None or per_sample * inputs.sample_count <= max_rows:
        return None, per_sample
    key = f"rows_{per_sample}_{max_rows}"
    chosen = inputs.feed(key, lambda run: run.rows(per_sample, max_rows), ir.DataType.INT64)
    return chosen, per_sample


def _emit_grid(
    e: Emitter,
    flat: ir.Value,
    grid: ConvGrid,
    pointwise: bool,
    max_rows: int | None,
    inputs: Inputs,
) -> Rows:
    chosen, per_sample = _fed_rows(grid.per_sample, max_rows, inputs)
    if pointwise:
        return _centred(e, flat, chosen, per_sample, groups=grid.unfold.groups)
    places, limit = grid.places(), None if chosen is None else max_rows
    positions = inputs.feed(
        f"positions_{_geometry_key(grid)}_{limit or 'all'}",
        lambda run: grid.positions(run, places, limit),
        ir.DataType.INT64,
        rank=2,
    )
    return _centred(e, flat, chosen, per_sample, groups=grid.unfold.groups, positions=positions)


def _geometry_key(grid: ConvGrid) -> str:
    parts = (grid.padded, grid.unfold.kernel, grid.unfold.strides, grid.unfold.dilations)
    return "_".join("x".join(map(str, part)) for part in parts)


# ------------------------------------------------------------------ lengths read at run time


def _emit_dynamic(
    e: Emitter,
    last: ir.Value,
    flat: ir.Value,
    unfold: ConvUnfold,
    pointwise: bool,
    max_rows: int | None,
    inputs: Inputs,
) -> Rows:
    e.need(9, "moments of convolutions whose input lengths are unknown")
    lengths = e.op("Shape", last)
    sizes = _output_lengths(e, lengths, unfold)
    every = e.op("Concat", e.gather(lengths, e.ints(0)), sizes, axis=0)
    total = e.reduce("ReduceProd", every, [0], keepdims=True)
    chosen = None if max_rows is None else _chosen_rows(e, total, max_rows, inputs)
    if pointwise:
        return _centred(e, flat, chosen, groups=unfold.groups, total=total)
    rows = chosen if chosen is not None else e.count_up(total)
    positions = _positions(e, lengths, sizes, unfold, rows)
    return _centred(
        e,
        flat,
        chosen,
        groups=unfold.groups,
        positions=positions,
        total=total,
    )


def _output_lengths(e: Emitter, lengths: ir.Value, unfold: ConvUnfold) -> ir.Value:
    """As :attr:`ConvGrid.outputs`, int64 [spatial]."""
    spatial = e.gather(lengths, e.ints(*range(1, len(unfold.kernel) + 1)))
    fields = [(k - 1) * d + 1 for k, d in zip(unfold.kernel, unfold.dilations, strict=True)]
    steps = e.op("Div", e.op("Sub", spatial, e.ints(*fields)), e.ints(*unfold.strides))
    return e.op("Add", steps, e.ints(1))


def _positions(
    e: Emitter, lengths: ir.Value, sizes: ir.Value, unfold: ConvUnfold, rows: ir.Value
) -> ir.Value:
    """Positions [k, taps] of the rows [k], all int64.

    Row ``r = (b, o_1, ..., o_n)`` in mixed radix, and by Horner's rule its first position is
    ``(b P_1 + o_1 s_1) P_2 + o_2 s_2 ...``; the offset of a tap likewise.
    """
    outputs: list[ir.Value] = []
    rest = rows
    for axis in reversed(range(len(unfold.kernel))):
        rest, place = e.modulo(rest, e.gather(sizes, e.ints(axis)))
        outputs.insert(0, place)
    base, offset = rest, e.constant(np.zeros(unfold.taps, np.int64))
    grid = np.indices(unfold.kernel).reshape(len(unfold.kernel), -1)
    for axis, (stride, dilation) in enumerate(zip(unfold.strides, unfold.dilations, strict=True)):
        length = e.gather(lengths, e.ints(axis + 1))
        step = e.op("Mul", outputs[axis], e.ints(stride))
        base = e.op("Add", e.op("Mul", base, length), step)
        taps = e.constant((grid[axis] * dilation).astype(np.int64))
        offset = e.op("Add", e.op("Mul", offset, length), taps)
    return e.op("Add", e.reshape(base, -1, 1), offset)


def _chosen_rows(e: Emitter, total: ir.Value, max_rows: int, inputs: Inputs) -> ir.Value:
    """As :meth:`RunFeeds.rows`, for a number of rows known at run time only; int64 [k]."""
    e.need(9, "moments of a subset of rows whose number is unknown")
    double, int64 = ir.DataType.DOUBLE, ir.DataType.INT64
    quota = inputs.feed(
        f"quota_{max_rows}", lambda run: np.array([run.quota(max_rows)], np.float64), double
    )
    uniform = inputs.feed(
        f"uniform_{max_rows}", lambda run: run.uniform(run.quota(max_rows)), double
    )
    number = e.cast(e.op("Min", e.cast(total, double), quota), int64)
    index = e.count_up(number)
    start = e.op("Div", e.op("Mul", index, total), number)
    after = e.op("Div", e.op("Mul", e.op("Add", index, e.ints(1)), total), number)
    width = e.cast(e.op("Sub", after, start), double)
    step = e.op("Mul", e.gather(uniform, index), width)
    return e.op("Add", start, e.cast(step, int64))


# ------------------------------------------------------------------ both


def _centred(
    e: Emitter,
    flat: ir.Value,
    chosen: ir.Value | None,
    per_sample: int | None = None,
    *,
    groups: int = 1,
    positions: ir.Value | None = None,
    total: ir.Value | None = None,
) -> Rows:
    """Pick positions from [positions, C], subtract their mean and split the groups.

    Args:
        e: Receives the nodes.
        flat: [positions, C].
        chosen: The rows to take; None takes all.
        per_sample: See :class:`Rows`.
        groups: ``G``.
        positions: int64 [k, taps]; None where rows are positions.
        total: See :class:`Rows`.
    """
    shift = None
    if chosen is None:
        # Shifting before the unfolding touches each element once and not once per tap.
        shift = e.reduce("ReduceMean", flat, [0])
        flat = e.op("Sub", flat, shift)
    picked = positions if positions is not None else chosen
    matrix = flat if picked is None else e.gather(flat, picked)
    if groups > 1:
        # [k, taps, C] -> [k, taps, G, C / G] -> [G, k, taps, C / G] -> [G, k, D]
        split = e.reshape(matrix, 0, 1 if positions is None else 0, groups, -1)
        matrix = e.reshape(e.op("Transpose", split, perm=[2, 0, 1, 3]), 0, 0, -1)
    elif positions is not None:
        matrix = e.op("Flatten", matrix, axis=1)
    if shift is None:
        shift = e.reduce("ReduceMean", matrix, [0 if groups == 1 else 1], keepdims=True)
        matrix = e.op("Sub", matrix, shift)
    return Rows(matrix, chosen, shift, per_sample, total)
