"""Affine quantization: real numbers on an integer grid.

A grid maps an integer ``q`` in ``[low, high]`` to the real number

    x = s (q - z)

with scale ``s > 0`` (float32) and integer zero point ``z``; the way back rounds half to even and
saturates:

    q = clip(round(x / s) + z, low, high)

Invariants, for every :class:`Affine` made here:

- 0 is exactly representable (``low <= z <= high``), so padding and ReLU cost nothing;
- ``|x - s (q - z)| <= s / 2`` for every ``x`` inside the range the grid was made for;
- ``s`` is a normal float32, and so is the product of an activation's and a weight's scale.

Source: Jacob et al. 2018, "Quantization and training of neural networks for efficient
integer-arithmetic-only inference"; Nagel et al. 2021, "A white paper on neural network
quantization".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float64]
ScaleArray: TypeAlias = npt.NDArray[np.float32]
IntArray: TypeAlias = npt.NDArray[np.integer]

IntegerType = Literal["uint8", "int8", "uint16", "int16"]

MIN_SCALE = 2.0**-40
"""Least scale: a tensor this close to 0 is 0, and the product of two such scales is normal."""

_BIAS_LIMIT = 2.0**30
"""Largest quantized bias; the other half of int32 is left to the products added to it."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The integers to quantize to.

    Attributes:
        dtype: Integer type they are stored as.
        low: Least integer used.
        high: Greatest integer used.
        symmetric: Whether the zero point is fixed at the middle of the range.
        power_of_two: Whether scales are powers of two: fixed point, multiplied by shifting.
    """

    dtype: IntegerType
    low: int
    high: int
    symmetric: bool
    power_of_two: bool = False

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid: 0 for int8 and int16, 128 for uint8."""
        return (self.low + self.high + 1) // 2

    @property
    def steps(self) -> int:
        """Steps between the least and the greatest integer."""
        return self.high - self.low


def activation_grid(dtype: IntegerType, *, symmetric: bool, power_of_two: bool = False) -> Grid:
    """The grid of activations: all of ``dtype``, to which ONNX's QuantizeLinear saturates."""
    info = np.iinfo(dtype)
    return Grid(dtype, int(info.min), int(info.max), symmetric, power_of_two)


def wide_grid(grid: Grid) -> Grid:
    """The 16-bit grid of the same sign and symmetry: steps 256 times finer over the same range."""
    dtype: IntegerType = "uint16" if grid.dtype.startswith("u") else "int16"
    return activation_grid(dtype, symmetric=grid.symmetric, power_of_two=grid.power_of_two)


def is_wide(grid: Grid) -> bool:
    """Whether the integers have 16 bits."""
    return grid.dtype in {"uint16", "int16"}


def weight_grid(*, reduce_range: bool = False, power_of_two: bool = False) -> Grid:
    """The grid of weights: [-127, 127], or [-64, 64] where sums of two products have 16 bits."""
    high = 64 if reduce_range else 127
    return Grid("int8", -high, high, True, power_of_two)


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """Scale and zero point, for a whole tensor or per channel.

    Attributes:
        scale: ``s``; rank 0 for a whole tensor, [C] per channel. Positive and finite.
        zero_point: ``z``, as ``scale``; of the grid's integer type.
        grid: The integers.
    """

    scale: ScaleArray
    zero_point: IntArray
    grid: Grid

    @property
    def minimum(self) -> FloatArray:
        """Least representable number."""
        return self.scale.astype(np.float64) * (self.grid.low - self.zero_point.astype(np.float64))

    @property
    def maximum(self) -> FloatArray:
        """Greatest representable number."""
        return self.scale.astype(np.float64) * (self.grid.high - self.zero_point.astype(np.float64))


def affine_from_range(minimum: npt.ArrayLike, maximum: npt.ArrayLike, grid: Grid) -> Affine:
    """The finest grid that reaches from ``minimum`` to ``maximum`` and holds 0.

    ``s = (max - min) / (high - low)`` and ``z = round(low - min / s)``; for a symmetric grid
    ``s = max(|min|, |max|) / (high - middle)`` and ``z = middle``.

    Args:
        minimum: Least value to represent, a number or [C].
        maximum: Greatest value to represent, as ``minimum``.
        grid: The integers.

    Raises:
        ValueError: If a bound is not finite or ``minimum > maximum`` somewhere.
    """
    low, high = np.asarray(minimum, np.float64), np.asarray(maximum, np.float64)
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low <= high).all()):
        raise ValueError(f"the range [{low}, {high}] is empty or not finite")
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    if grid.symmetric:
        width = np.maximum(-low, high) / (grid.high - grid.middle)
        scale = _as_scale(width, grid)
        return Affine(scale, np.full(scale.shape, grid.middle, grid.dtype), grid)
    scale = _as_scale((high - low) / grid.steps, grid)
    zero = np.rint(grid.low - low / scale.astype(np.float64))
    return Affine(scale, np.clip(zero, grid.low, grid.high).astype(grid.dtype), grid)


def _as_scale(width: FloatArray, grid: Grid) -> ScaleArray:
    """The scale for steps of ``width``; the next power of two above where the grid wants one."""
    wanted = np.asarray(np.maximum(width, MIN_SCALE), np.float32)
    if not grid.power_of_two:
        return wanted
    mantissa, exponent = np.frexp(wanted)
    return np.asarray(np.ldexp(np.float32(1), exponent - (mantissa == 0.5)), np.float32)


def fixed_point_format(affine: Affine) -> str:
    """The format ``Qm.n`` of a grid whose scales are powers of two.

    ``n = -log₂ s`` bits are behind the point, ``m`` of the integer's bits before it (the sign left
    out); either may be negative. ``UQm.n`` is the format of unsigned integers.

    Args:
        affine: The grid; per channel gives the range of formats.

    Raises:
        ValueError: If a scale is no power of two.
    """
    mantissa, exponent = np.frexp(np.atleast_1d(affine.scale))
    if (mantissa != 0.5).any():
        raise ValueError("a scale is no power of two")
    unsigned = affine.grid.dtype.startswith("u")
    bits = np.iinfo(affine.grid.dtype).bits - (0 if unsigned else 1)
    behind = sorted({1 - int(e) for e in exponent})
    return " to ".join(
        f"{'U' if unsigned else ''}Q{bits - n}.{n}" for n in dict.fromkeys((behind[0], behind[-1]))
    )


def quantize(values: npt.NDArray[np.floating], affine: Affine, axis: int | None = None) -> IntArray:
    """``q = clip(round(x / s) + z, low, high)``, rounding half to even.

    Args:
        values: ``x``, any shape.
        affine: The grid.
        axis: The axis that per-channel scales run along.
    """
    scale, zero = _spread(affine, values.ndim, axis)
    grid = affine.grid
    rounded = np.rint(np.asarray(values, np.float64) / scale) + zero
    return np.clip(rounded, grid.low, grid.high).astype(grid.dtype)


def dequantize(
    integers: IntArray, affine: Affine, axis: int | None = None
) -> npt.NDArray[np.float32]:
    """``x = s (q - z)`` in float32.

    Args:
        integers: ``q``, any shape.
        affine: The grid.
        axis: The axis that per-channel scales run along.
    """
    scale, zero = _spread(affine, integers.ndim, axis)
    return ((integers.astype(np.float64) - zero) * scale).astype(np.float32)


def _spread(affine: Affine, rank: int, axis: int | None) -> tuple[FloatArray, FloatArray]:
    """Scale and zero point in float64, shaped to broadcast along ``axis``."""
    scale, zero = affine.scale.astype(np.float64), affine.zero_point.astype(np.float64)
    if scale.ndim == 0 or axis is None:
        return scale, zero
    shape = [1] * rank
    shape[axis] = -1
    return scale.reshape(shape), zero.reshape(shape)


def clip_candidates(
    minimum: float, maximum: float, grid: Grid, *, count: int = 10, ratio: float = 0.85
) -> tuple[Affine, ...]:
    """Grids for the ranges ``[rᵏ min, rᵏ max]``, ``k = 0 ... count - 1``, the widest first.

    Clipping the few values at the ends makes the steps finer for all others; which trade is best
    depends on the distribution, so the error of each candidate is measured.

    Args:
        minimum: Least value seen.
        maximum: Greatest value seen.
        grid: The integers.
        count: Number of candidates.
        ratio: ``r``, in (0, 1).
    """
    return tuple(
        affine_from_range(minimum * ratio**k, maximum * ratio**k, grid) for k in range(count)
    )


def weight_affine(
    absolute_maximum: npt.ArrayLike,
    grid: Grid,
    *,
    input_scale: float = 0.0,
    bias: npt.NDArray[np.floating] | None = None,
) -> Affine:
    """Per-channel symmetric grids of a weight, wide enough for the bias as well.

    The bias is stored as int32 in units of ``s_x s_w``, so ``s_w >= |b| / (s_x 2³⁰)``. A dead
    channel (all weights 0) takes the median scale of the others: any scale represents it, and a
    tiny one would overflow the bias.

    Args:
        absolute_maximum: ``max |w|``: a number, or per output channel [O].
        grid: A symmetric grid.
        input_scale: ``s_x``; 0 when there is no bias to guard.
        bias: ``b``, [O].
    """
    top = np.asarray(absolute_maximum, np.float64)
    width = top / (grid.high - grid.middle)
    dead = width < MIN_SCALE
    if dead.any():
        width = np.where(dead, np.median(width[~dead]) if not dead.all() else 1.0, width)
    if bias is not None and input_scale > 0:
        need = np.abs(np.asarray(bias, np.float64)) / (input_scale * _BIAS_LIMIT)
        width = np.maximum(width, need if width.ndim else need.max(initial=0.0))
    scale = _as_scale(width, grid)
    return Affine(scale, np.full(scale.shape, grid.middle, grid.dtype), grid)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedBias:
    """``b ≈ s q`` with ``s = s_x s_w`` (float32, as the kernel multiplies) and ``q`` int32.

    Attributes:
        integers: ``q``, [O].
        scale: ``s``; rank 0 or [O].
    """

    integers: npt.NDArray[np.int32]
    scale: ScaleArray


def quantize_bias(
    bias: npt.NDArray[np.floating], input_scale: ScaleArray, weight_scale: ScaleArray
) -> QuantizedBias:
    """Quantize a bias in the unit of the integer products it is added to, ``s_x s_w``.

    Args:
        bias: ``b``, [O].
        input_scale: ``s_x``, rank 0.
        weight_scale: ``s_w``, rank 0 or [O].

    Raises:
        ValueError: If a bias does not fit int32 (make the weight's grid with
            :func:`weight_affine`).
    """
    scale = np.asarray(input_scale * weight_scale, np.float32)
    exact = np.rint(np.asarray(bias, np.float64) / scale.astype(np.float64))
    limit = np.iinfo(np.int32).max
    if np.abs(exact).max(initial=0.0) > limit:
        channel = int(np.abs(exact).argmax())
        raise ValueError(
            f"bias {float(bias[channel])} of channel {channel} needs more than 32 bits in units of "
            f"{float(np.broadcast_to(scale, bias.shape)[channel])}"
        )
    return QuantizedBias(exact.astype(np.int32), scale)
