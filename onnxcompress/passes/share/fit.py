"""Fit codebooks to the weights of a model, with what calibration tells about their inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.statistics import MomentsRequest, Statistics
from onnxcompress.context import PassContext
from onnxcompress.numerics import codebook, vector_codebook
from onnxcompress.numerics.codebook import Coded, Fitting
from onnxcompress.numerics.even_codes import fit_even, is_even
from onnxcompress.numerics.feedback import InputMoments, output_error
from onnxcompress.numerics.halves import half_levels, half_scales
from onnxcompress.numerics.kmeans import may_repeat
from onnxcompress.numerics.least_squares import approximated
from onnxcompress.numerics.vector_codebook import VectorCoded
from onnxcompress.passes._batches import batches_within
from onnxcompress.passes._foldable import float_bytes, halves_save
from onnxcompress.passes.share.options import Assign, Codebook, ShareOptions
from onnxcompress.passes.share.select import Weight

Array = npt.NDArray[np.generic]
Codes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

_BATCH_BYTES = 512 * 2**20
"""Second moments collected in one pass over the data."""
MOST_BITS = 8
ROUNDS = 3
"""How often codes, scales and levels are fitted in turns."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A weight and its codebook.

    Attributes:
        weight: The weight.
        coded: Its codes and what they stand for.
        fed: Whether calibration data told where errors hurt.
        sqnr_db: Energy of the layer's output (of the weight where there are no data) over that of
            its error.
        shift: What a bias adds to take up the mean error, ``(W - Ŵ) x̄``, [R]; None without data.
    """

    weight: Weight
    coded: Coded | VectorCoded
    fed: bool
    sqnr_db: float
    shift: Float64 | None = None

    @property
    def level_count(self) -> int:
        """How many values a code tells apart."""
        if isinstance(self.coded, VectorCoded):
            return len(self.coded.table)
        return self.coded.levels.shape[1] if self.even else self._used()

    @property
    def even(self) -> bool:
        """Whether the codes are the numbers themselves, so that no levels need be stored."""
        if isinstance(self.coded, VectorCoded) or self.weight.scale is not None:
            return False
        return is_even(self.coded)

    def _used(self) -> int:
        return int(self.coded.codes.max(initial=0)) + 1

    @property
    def scale(self) -> Float32 | None:
        """The factor of each row that has to be stored, [R]."""
        return None if self.weight.scale is not None else self.coded.scale

    def stored_codes(self) -> tuple[Codes, tuple[int, ...] | None]:
        """The codes as they are stored, and the shape that what is gathered must be brought to.

        One code per weight has the shape of the weight already. Vectors lie along the columns of
        the weight as a matrix.
        """
        layout = self.weight.layout
        if isinstance(self.coded, VectorCoded):
            return self.coded.codes, layout.permuted
        return layout.tensor(self.coded.codes).astype(np.uint8), None

    def stored_levels(self) -> Array:
        """The codebook, [B · k] or [k, d], in the type of the weight."""
        if isinstance(self.coded, VectorCoded):
            return self.coded.table
        levels = self.coded.levels[:, : self._used()].reshape(-1)
        dtype = self.weight.value.dtype
        if self.weight.scale is None or dtype is None:
            return levels
        return np.rint(levels + self.weight.zero).astype(dtype.numpy())

    def first_levels(self) -> Array | None:
        """Where the codebook of each row begins, broadcast over the weight; None for one."""
        if isinstance(self.coded, VectorCoded) or len(self.coded.levels) == 1:
            return None
        first = (self.coded.book * self._used()).astype(np.int32)
        return first.reshape(self.weight.layout.per_row)

    def stored(self) -> Array:
        """The initializer that the codes stand for, in its own shape and type."""
        dtype = self.weight.value.dtype
        if self.weight.scale is None or dtype is None or isinstance(self.coded, VectorCoded):
            return self.tensor()
        levels = np.rint(self.coded.levels + self.weight.zero)[
            self.coded.book[:, None], self.coded.codes
        ]
        return self.weight.layout.tensor(levels.astype(dtype.numpy()))

    def tensor(self) -> Float32:
        """The weight that the codes stand for, in its own shape."""
        return np.asarray(self.weight.layout.tensor(self.coded.decoded()), np.float32)


def fit_all(
    model: ir.Model,
    weights: Sequence[Weight],
    options: ShareOptions,
    ctx: PassContext,
    centred: frozenset[str],
    *,
    bits: Mapping[str, int] | None = None,
    rounds: int = ROUNDS,
) -> Iterator[Fitted]:
    """Fit a codebook to each weight.

    Args:
        model: The model, whose activations are measured.
        weights: The weights.
        options: How.
        ctx: The job.
        centred: Weights whose layer has a bias that will take up the mean error, by name.
        bits: Bits of a code by name of the weight; those of the options when None.
        rounds: How often codes, scales and levels are fitted in turns.
    """
    with ctx.progress.task("fitting codebooks", total=len(weights)) as task:
        for batch in _batches(weights, options):
            statistics = _measure(model, batch, ctx)
            for weight in batch:
                moments = _moments(weight, statistics, centred=weight.name in centred)
                own = code_bits(weight, options) if bits is None else bits[weight.name]
                fitted = fit_one(weight, moments, options, own, rounds=rounds)
                if weight.name in centred and statistics is not None and fitted.fed:
                    fitted = dataclasses.replace(fitted, shift=_shift(fitted, statistics))
                yield fitted
                task.advance()


def _batches(weights: Sequence[Weight], options: ShareOptions) -> Iterator[list[Weight]]:
    """Weights in groups whose second moments fit into memory together."""
    measured = options.assign is Assign.FEEDBACK
    return batches_within(
        weights,
        lambda w: 8 * w.layout.columns**2 * len(w.requests) if measured else 0,
        _BATCH_BYTES,
    )


def _measure(model: ir.Model, batch: Sequence[Weight], ctx: PassContext) -> Statistics | None:
    wanted: dict[MomentsRequest, None] = dict.fromkeys(r for w in batch for r in w.requests)
    if not wanted or ctx.calibration is None:
        return None
    return ctx.collect(model, wanted, description="measuring the inputs of weights")


def _moments(
    weight: Weight, statistics: Statistics | None, *, centred: bool
) -> InputMoments | None:
    """``E[x xᵀ]`` (less that of the means if ``centred``) summed over the uses of a weight.

    Directions that few samples did not show are not free of error: the covariance is shrunk.
    """
    if statistics is None or not weight.requests:
        return None
    total: Float64 | None = None
    for request in weight.requests:
        found = statistics[request]
        moment = np.stack([approximated(c, found.count) for c in found.covariance])
        if not centred:
            moment = moment + found.mean[:, :, None] * found.mean[:, None, :]
        total = moment if total is None else total + moment
    rows, columns = weight.layout.row_count, weight.layout.columns
    if total is None or total.shape[1] != columns or rows % len(total):
        return None
    return InputMoments.shared(total, rows)


def _shift(fitted: Fitted, statistics: Statistics) -> Float64:
    """``(W - Ŵ) x̄`` of a weight with one use, [R]."""
    delta = fitted.weight.matrix().astype(np.float64) - fitted.coded.decoded()
    (mean,) = (statistics[request].mean for request in fitted.weight.requests)
    parts = delta.reshape(len(mean), -1, delta.shape[1])
    return np.asarray(np.einsum("god,gd->go", parts, mean).reshape(-1))


def fit_one(
    weight: Weight,
    moments: InputMoments | None,
    options: ShareOptions,
    bits: int,
    target: Float32 | None = None,
    *,
    rounds: int = ROUNDS,
) -> Fitted:
    """Fit the codebook of one weight.

    Args:
        weight: The weight.
        moments: Second moments of its inputs; None for the identity.
        options: How.
        bits: Bits of a code.
        target: What to approximate, [R, D]; the weight itself when None.
        rounds: How often codes, scales and levels are fitted in turns.
    """
    matrix = weight.matrix() if target is None else target
    feedback = options.assign is Assign.FEEDBACK
    moments = moments if feedback else None
    length = vector_length(weight, options)
    coded: Coded | VectorCoded
    if length > 1:
        coded = vector_codebook.fit(
            matrix, moments, bits=bits, length=length, scales=options.scales
        )
    elif even(weight, options, bits) and not may_repeat(matrix, 1 << bits):
        coded = fit_even(matrix, moments, rounds=rounds, snap=_storable_scales(weight))
    else:
        levels = _storable_levels(weight, 1 << bits, options)
        scales = _storable_scales(weight)
        fitting = Fitting(
            1 << bits, options.group, options.scales, feedback, rounds, levels, scales
        )
        coded = codebook.fit(matrix, moments, fitting, scale=weight.scale)
    exact = matrix.astype(np.float64)
    noise = float(coded.error(exact, moments).sum())
    signal = float(output_error(exact, moments).sum())
    sqnr = 10 * np.log10(max(signal, 1e-300) / max(noise, 1e-20 * max(signal, 1e-300)))
    return Fitted(weight, coded, moments is not None, float(sqnr))


def vector_length(weight: Weight, options: ShareOptions) -> int:
    """How many neighbouring weights one code stands for."""
    if options.codebook is not Codebook.VECTOR or weight.scale is not None:
        return 1
    return vector_codebook.divisor(weight.layout.columns, options.vector)


def code_bits(weight: Weight, options: ShareOptions) -> int:
    """Bits of a code where all weights have the same.

    Where vectors do not fit, single weights get their part of a vector's. Weights of which few make
    an output get all there are.
    """
    if options.codebook is Codebook.VECTOR and vector_length(weight, options) == 1:
        return max(options.bits // options.vector, 2)
    return MOST_BITS if weight.few else options.bits


def even(weight: Weight, options: ShareOptions, bits: int) -> bool:
    """Whether a table would take more bytes than one bit of each code.

    Integers, which need none, have an error of less than a bit more.
    """
    plain = options.codebook is Codebook.SCALAR and options.scales and not options.group
    whole = plain and weight.scale is None and bits == MOST_BITS and weight.layout.row_count > 1
    return whole and float_bytes(1 << bits) > weight.elements / 8


def _storable_scales(weight: Weight) -> codebook.Snap | None:
    """How scales are stored if not as they are."""
    return half_scales if halves_save(weight.layout.row_count) else None


def _storable_levels(weight: Weight, count: int, options: ShareOptions) -> codebook.Snap | None:
    """How levels are stored if not as they are."""
    if weight.scale is not None:
        return _integer_levels(weight)
    books = -(-weight.layout.row_count // options.group) if options.group else 1
    return half_levels if halves_save(books * count) else None


def _integer_levels(weight: Weight) -> codebook.Snap:
    """Levels that a quantized weight can have: integers, counted from its zero point."""
    dtype = weight.value.dtype
    limits = np.iinfo(np.int8 if dtype == ir.DataType.INT8 else np.uint8)
    low, high = limits.min - weight.zero, limits.max - weight.zero

    def snap(levels: Float64) -> Float64:
        return np.clip(np.rint(levels), low, high)

    return snap
