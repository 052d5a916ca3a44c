"""Quantize the rows of a weight matrix in blocks, each with its own scale.

A row of ``D`` weights is cut into ``B = ceil(D / b)`` blocks of ``b``; the last one is filled up
with zeros. A code ``q`` in ``[0, 2ⁿ - 1]`` stands for

    w = s (q - z)

with scale ``s`` and zero point ``z`` of its block. Invariants of every :class:`Blocks`:

- ``z`` is a code, so the weight 0, and with it the filling, is exact;
- on a symmetric grid ``z = 2ⁿ⁻¹``; there ``s`` may be *negative*, which puts the one code that has
  no counterpart (``q - z = -2ⁿ⁻¹``) on the side of the block's largest weight.

:func:`nearest` takes the finest grid that clips nothing: ``|w - s (q - z)| <= |s| / 2``.
:func:`fitted` searches the scale with the least squared error of the block: some clipping for finer
steps, then the scale that is best for the codes found,

    s* = Σ w (q - z) / Σ (q - z)²

Its error is never above that of :func:`nearest`, block by block.

Source: Frantar et al. 2023, "GPTQ: accurate post-training quantization for generative pre-trained
transformers" (:func:`with_feedback`); the layouts are those of ``com.microsoft::MatMulNBits`` in
onnxruntime's docs/ContribOperators.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.feedback import Factor

Codes: TypeAlias = npt.NDArray[np.uint8]
Float32: TypeAlias = npt.NDArray[np.float32]
Float64: TypeAlias = npt.NDArray[np.float64]

_RATIOS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.79, 0.74)
"""Shares of the full range that :func:`fitted` tries."""

_MIN_SCALE = np.float32(2.0**-40)

_CHUNK = 1 << 21
"""Weights that :func:`fitted` treats at a time, which bounds its memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """A quantized matrix of ``R`` rows and ``D`` columns.

    Attributes:
        codes: ``q``, [R, B, b].
        scale: ``s``, [R, B], not 0.
        zero: ``z``, [R, B].
        bits: ``n``, 4 or 8.
        columns: ``D``; ``B b`` minus the filling.
    """

    codes: Codes
    scale: Float32
    zero: Codes
    bits: int
    columns: int

    @property
    def block(self) -> int:
        """Weights per block, ``b``."""
        return int(self.codes.shape[2])

    def dequantized(self) -> Float32:
        """The matrix that the codes stand for, [R, D]."""
        steps = self.codes.astype(np.float32) - self.zero[..., None].astype(np.float32)
        steps *= self.scale[..., None]
        return steps.reshape(len(steps), -1)[:, : self.columns]

    def signed(self) -> npt.NDArray[np.int8]:
        """``q - 2ⁿ⁻¹``, [R, B, b]: the integers of a symmetric grid."""
        return (self.codes.astype(np.int16) - (1 << (self.bits - 1))).astype(np.int8)


def balanced(columns: int, wanted: int) -> int:
    """The block length that cuts ``columns`` into as many blocks as ``wanted`` would, evenly.

    The filling is then less than one weight per block. 0 stands for one block per row.
    """
    if wanted == 0 or columns <= wanted:
        return max(columns, 1)
    count = -(-columns // wanted)
    return -(-columns // count)


def split(matrix: Float32, block: int) -> Float32:
    """Cut the rows of a matrix [R, D] into blocks [R, B, b], filled up with zeros."""
    rows, columns = matrix.shape
    count = -(-columns // block)
    if count * block != columns:
        matrix = np.pad(matrix, ((0, 0), (0, count * block - columns)))
    return matrix.reshape(rows, count, block)


def nearest(matrix: Float32, *, bits: int, block: int, symmetric: bool) -> Blocks:
    """Round to the nearest code of the finest grid that clips nothing.

    Args:
        matrix: Finite weights, [R, D].
        bits: 4 or 8.
        block: ``b``.
        symmetric: Whether the zero point is fixed in the middle.
    """
    blocks = split(matrix, block)
    scale, zero = _widest(blocks, bits, symmetric)
    return Blocks(_codes(blocks, scale, zero, bits), scale, zero, bits, matrix.shape[1])


def fitted(
    matrix: Float32, *, bits: int, block: int, symmetric: bool, negative: bool = True
) -> Blocks:
    """Round to the nearest code of the grid with the least squared error of each block.

    Args:
        matrix: Finite weights, [R, D].
        bits: 4 or 8.
        block: ``b``.
        symmetric: Whether the zero point is fixed in the middle.
        negative: Whether scales may be negative (symmetric grids only).
    """
    step = max(1, _CHUNK // max(matrix.shape[1], 1))
    parts = [
        _fit(split(matrix[start : start + step], block), bits, symmetric, negative)
        for start in range(0, len(matrix), step)
    ]
    codes, scale, zero = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Blocks(codes, scale, zero, bits, matrix.shape[1])


def _fit(
    blocks: Float32, bits: int, symmetric: bool, negative: bool
) -> tuple[Codes, Float32, Codes]:
    scale, zero = _widest(blocks, bits, symmetric)
    codes = _codes(blocks, scale, zero, bits)
    best = codes, scale, zero, _error(blocks, codes, scale, zero)
    half = 1 << (bits - 1)
    if symmetric and negative:
        place = np.abs(blocks).argmax(-1)[..., None]
        extreme = np.take_along_axis(blocks, place, -1)[..., 0]
        full = _normal(extreme / np.float32(-half))
    elif symmetric:
        full = scale
    else:
        full = scale
    for ratio in _RATIOS:
        tried = _normal(full * np.float32(ratio))
        if symmetric:
            shift = zero
        else:
            low = np.minimum(blocks.min(-1), 0) * np.float32(ratio)
            shift = np.clip(np.rint(-low / tried), 0, 2 * half - 1).astype(np.uint8)
        best = _better(blocks, best, tried, shift, bits)
    codes, scale, zero, _ = best
    steps = codes.astype(np.float32) - zero[..., None]
    power = np.einsum("rbk,rbk->rb", steps, steps)
    product = np.einsum("rbk,rbk->rb", steps, blocks)
    refit = np.where(power > 0, product / np.maximum(power, 1), scale).astype(np.float32)
    refit = _normal(np.where(np.sign(refit) == np.sign(scale), refit, scale))
    codes, scale, zero, _ = _better(blocks, best, refit, zero, bits)
    return codes, scale, zero


_Best: TypeAlias = tuple[Codes, Float32, Codes, Float32]


def _better(blocks: Float32, best: _Best, scale: Float32, zero: Codes, bits: int) -> _Best:
    """Per block, the better of the best so far and the codes on another grid."""
    codes = _codes(blocks, scale, zero, bits)
    error = _error(blocks, codes, scale, zero)
    wins = error < best[3]
    return (
        np.where(wins[..., None], codes, best[0]),
        np.where(wins, scale, best[1]),
        np.where(wins, zero, best[2]),
        np.where(wins, error, best[3]),
    )


def _widest(blocks: Float32, bits: int, symmetric: bool) -> tuple[Float32, Codes]:
    """Scale and zero point, [R, B], of the finest grid that clips nothing."""
    half = 1 << (bits - 1)
    if symmetric:
        scale = _normal(np.abs(blocks).max(-1, initial=0) / np.float32(half - 1))
        return scale, np.full(scale.shape, half, np.uint8)
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    scale = _normal((high - low) / np.float32(2 * half - 1))
    zero = np.clip(np.rint(-low / scale), 0, 2 * half - 1).astype(np.uint8)
    # The rounded zero point moves the range by up to half a step: widen the steps until both ends
    # are within half a step of a code.
    below = -low / np.maximum(zero + np.float32(0.5), 0.5)
    above = high / (np.float32(2 * half - 0.5) - zero)
    return np.maximum(scale, np.maximum(below, above)).astype(np.float32), zero


def _normal(scale: Float32) -> Float32:
    """Keep scales away from 0; the sign stays (0 counts as positive)."""
    small = np.abs(scale) < _MIN_SCALE
    return np.where(small, np.copysign(_MIN_SCALE, scale), scale).astype(np.float32)


def _codes(blocks: Float32, scale: Float32, zero: Codes, bits: int) -> Codes:
    steps = blocks / scale[..., None]
    np.rint(steps, out=steps)
    steps += zero[..., None]
    np.clip(steps, 0, (1 << bits) - 1, out=steps)
    return steps.astype(np.uint8)


def _error(blocks: Float32, codes: Codes, scale: Float32, zero: Codes) -> Float32:
    """Squared error per block, [R, B]."""
    delta = codes.astype(np.float32)
    delta -= zero[..., None]
    delta *= scale[..., None]
    delta -= blocks
    return np.asarray(np.einsum("rbk,rbk->rb", delta, delta))


def with_feedback(matrix: Float32, start: Blocks, moment: Float64, *, damp: float = 0.01) -> Blocks:
    """Round again on the same grids, letting later columns make up for the error of earlier ones.

    See :mod:`onnxcompress.numerics.feedback`. Rows whose output error ``δ H δᵀ`` does not fall keep
    the codes of ``start``.

    Args:
        matrix: The weights, [R, D].
        start: Their codes so far, whose scales and zero points stay.
        moment: ``H = E[x xᵀ]`` of the inputs that meet the columns, [D, D].
        damp: ``λ`` relative to the mean diagonal of ``H``.
    """
    factor = Factor.of(moment, damp=damp)
    if factor is None:
        return start
    size, top = len(moment), (1 << start.bits) - 1
    scale = start.scale.astype(np.float64)
    zero = start.zero.astype(np.float64)
    codes = np.empty(matrix.shape, np.uint8)

    def project(places: npt.NDArray[np.int64], columns: Float64) -> Float64:
        step, middle = scale[:, places // start.block], zero[:, places // start.block]
        found = np.clip(np.rint(columns / step) + middle, 0, top)
        codes[:, places] = found
        return np.asarray(step * (found - middle))

    factor.replace(matrix.astype(np.float64), project)
    flat = start.codes.reshape(len(codes), -1).copy()
    flat[:, :size] = codes
    fed = Blocks(flat.reshape(start.codes.shape), start.scale, start.zero, start.bits, size)
    better = output_error(matrix, fed, moment) < output_error(matrix, start, moment)
    chosen = np.where(better[:, None, None], fed.codes, start.codes)
    return Blocks(chosen, start.scale, start.zero, start.bits, size)


def output_error(matrix: Float32, blocks: Blocks, moment: Float64) -> Float64:
    """Expected squared error of each output, ``δ H δᵀ`` with ``δ = W - Ŵ``, [R]."""
    delta = matrix.astype(np.float64) - blocks.dequantized()
    return np.asarray(np.einsum("rd,rd->r", delta @ moment, delta))


# --- packing -------------------------------------------------------------------------------------


def pack(codes: Codes, bits: int) -> Codes:
    """Put the codes of the last axis into bytes: two 4-bit codes each, the first one low.

    An odd count is filled up with a code 0.
    """
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], axis=-1)
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)


def unpack(packed: Codes, bits: int, count: int) -> Codes:
    """The inverse of :func:`pack`: ``count`` codes along the last axis."""
    if bits == 8:
        return packed
    codes = np.stack([packed & 0x0F, packed >> 4], axis=-1)
    return np.ascontiguousarray(codes.reshape(*packed.shape[:-1], -1)[..., :count])
