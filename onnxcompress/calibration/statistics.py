"""What can be measured of a model's tensors over calibration data, and the form of the results.

A pass asks with *requests*; :func:`onnxcompress.calibration.collector.collect` answers with
*results*. Both are plain frozen values. The sums run over every element (or row) of a tensor over
all samples; the equations below write ``N`` for their number. All results are float64 and do not
depend on how the samples were batched, beyond the rounding of the float32 arithmetic inside the
model.

Moments serve every method that replaces a weight ``W`` by something cheaper: with rows ``x`` (the
unfolded input of a layer) and targets ``y``, least squares, optimal brain surgery, GPTQ and
whitened factorization all need only ``E[x]``, ``Cov(x, x)`` and ``Cov(x, y)``.

Source: T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances", 1979 (how partial moments merge, see
:mod:`onnxcompress.calibration.accumulate`).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.histogram import Histogram

FloatArray: TypeAlias = npt.NDArray[np.float64]

REFERENCE_PREFIX = "reference/"
"""Values whose name starts with this belong to the reference model given to ``collect``."""


class Statistic(enum.Enum):
    """The kinds of statistics, for a pass to declare what calibration it needs."""

    RANGE = "range"
    TAIL = "tail"
    MEAN = "mean"
    MOMENTS = "moments"
    HISTOGRAM = "histogram"
    CROSS_MOMENTS = "cross_moments"


@dataclass(frozen=True, slots=True)
class ConvUnfold:
    """Rows are the receptive fields of a convolution: one per sample and output position.

    The ``D = C / groups * prod(kernel)`` columns of a group are in the order of
    ``W.reshape(O, C // groups * prod(kernel))``: channel first, then the kernel's axes. Padding
    counts as 0.

    Attributes:
        kernel: Kernel length per spatial axis.
        strides: Step per spatial axis.
        dilations: Distance between kernel taps per spatial axis.
        pads: Padding at the beginning of each spatial axis, then at the end of each.
        groups: Number of groups ``G`` of channels.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        rank = len(self.kernel)
        lengths = (len(self.strides), len(self.dilations), len(self.pads))
        if lengths != (rank, rank, 2 * rank):
            raise ValueError(
                f"a kernel of rank {rank} does not go with strides, dilations, pads of {lengths}"
            )
        if min((*self.kernel, *self.strides, *self.dilations, self.groups), default=1) < 1:
            raise ValueError(f"kernel, strides, dilations and groups must be positive: {self}")
        if min(self.pads, default=0) < 0:
            raise ValueError(f"pads must not be negative: {self.pads}")

    @property
    def taps(self) -> int:
        """Kernel positions, ``prod(kernel)``."""
        return int(np.prod(self.kernel, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class AxisUnfold:
    """Rows run over all other axes, columns along ``axis`` (negative: from the end); one group."""

    axis: int = -1


Unfold: TypeAlias = ConvUnfold | AxisUnfold


@dataclass(frozen=True, slots=True)
class RangeRequest:
    """Least and greatest element, of the whole tensor or per index of ``axis``."""

    statistic: ClassVar[Statistic] = Statistic.RANGE
    value: str
    axis: int | None = None


@dataclass(frozen=True, slots=True)
class MovingRangeRequest:
    """Moving average of the least and of the greatest element of each sample.

    ``m_t = m_{t-1} + (x_t - m_{t-1}) / min(t, memory)``: the mean of the first ``memory`` samples,
    then an exponential average. Where the first axis of the tensor is not known to count samples,
    each run of the model counts as one.

    Attributes:
        value: Tensor name.
        memory: Samples that count.
    """

    statistic: ClassVar[Statistic] = Statistic.RANGE
    value: str
    memory: int = 100

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise ValueError(f"the memory of '{self.value}' must be positive, not {self.memory}")


@dataclass(frozen=True, slots=True)
class TailRequest:
    """The exact quantiles ``fraction`` and ``1 - fraction``, ``0 < fraction < 0.5``."""

    statistic: ClassVar[Statistic] = Statistic.TAIL
    value: str
    fraction: float

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction < 0.5:
            raise ValueError(f"the tail of '{self.value}' must be in (0, 0.5), not {self.fraction}")


@dataclass(frozen=True, slots=True)
class MeanRequest:
    """Mean and variance per index of ``axis``."""

    statistic: ClassVar[Statistic] = Statistic.MEAN
    value: str
    axis: int


@dataclass(frozen=True, slots=True)
class MomentsRequest:
    """Mean and covariance of the unfolded rows of a tensor.

    Attributes:
        value: Tensor name.
        unfold: What a row is.
        max_rows: About how many rows to use over all samples, drawn evenly and at random (seeded)
            from each batch; all when None. Requests with the same ``max_rows`` on tensors with
            equally many rows see the same rows.
    """

    statistic: ClassVar[Statistic] = Statistic.MOMENTS
    value: str
    unfold: Unfold
    max_rows: int | None = None

    def __post_init__(self) -> None:
        _check_max_rows(self.value, self.max_rows)


@dataclass(frozen=True, slots=True)
class HistogramRequest:
    """How often which values occur, in bins of equal width that hold 0 as an edge.

    Attributes:
        value: Tensor name.
        bins: Number of bins, a multiple of 4.
        max_elements: About how many elements to count over all samples, evenly spaced in each
            batch; all when None or where the lengths of the tensor are unknown.
    """

    statistic: ClassVar[Statistic] = Statistic.HISTOGRAM
    value: str
    bins: int = 8192
    max_elements: int | None = None

    def __post_init__(self) -> None:
        if self.bins < 4 or self.bins % 4:
            raise ValueError(f"bins of '{self.value}' must be a multiple of 4, not {self.bins}")
        if self.max_elements is not None and self.max_elements < 1:
            raise ValueError(f"max_elements of '{self.value}' must be positive")


@dataclass(frozen=True, slots=True)
class CrossMomentsRequest:
    """Moments of rows ``x`` and their covariance with targets ``y = sum_i sign_i * target_i``.

    Attributes:
        value: Tensor that the rows ``x`` are unfolded from.
        unfold: What a row is.
        target: Pairs of a tensor name and its factor. The tensors have equal shapes. Names starting
            with ``reference/`` are tensors of the reference model.
        target_axis: Axis of the targets that ``y`` runs along; the other axes, in order, are the
            rows, as many as ``x`` has (batch and spatial axes of the layer's output).
        max_rows: As in :class:`MomentsRequest`.
    """

    statistic: ClassVar[Statistic] = Statistic.CROSS_MOMENTS
    value: str
    unfold: Unfold
    target: tuple[tuple[str, float], ...]
    target_axis: int
    max_rows: int | None = None

    def __post_init__(self) -> None:
        _check_max_rows(self.value, self.max_rows)
        if not self.target:
            raise ValueError(f"cross moments of '{self.value}' need a target")


def _check_max_rows(value: str, max_rows: int | None) -> None:
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows of '{value}' must be positive, not {max_rows}")


@dataclass(frozen=True, slots=True, eq=False)
class RangeResult:
    """Least and greatest element.

    Attributes:
        minimum: Scalar array, or [C] per index of the axis asked for.
        maximum: As ``minimum``.
        count: Elements seen (per index of the axis).
    """

    minimum: FloatArray
    maximum: FloatArray
    count: int


@dataclass(frozen=True, slots=True)
class TailResult:
    """Quantiles ``low = q(fraction)`` and ``high = q(1 - fraction)``.

    Between two elements they are interpolated linearly, as ``numpy.quantile`` does.
    """

    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class MeanResult:
    """``mean[c] = E[x_c]``, ``variance[c] = E[(x_c - mean[c])²]``, each [C].

    ``count`` is the number of elements per index.
    """

    mean: FloatArray
    variance: FloatArray
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class MomentsResult:
    """``mean[g] = E[x]``, ``covariance[g] = E[(x - mean)(x - mean)ᵀ]`` over ``count`` rows.

    Attributes:
        count: Rows used.
        mean: [G, D].
        covariance: [G, D, D], divided by ``count``. The second moment about 0 is
            ``covariance + mean meanᵀ``.
    """

    count: int
    mean: FloatArray
    covariance: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class HistogramResult:
    """The histogram of the elements counted; see :mod:`onnxcompress.numerics.histogram`.

    ``minimum`` and ``maximum`` are those of all elements, counted or not.
    """

    histogram: Histogram
    minimum: float
    maximum: float


@dataclass(frozen=True, slots=True, eq=False)
class CrossMomentsResult:
    """Moments of ``x`` and ``cross[g] = E[(x - mean_x)(y - mean_y)ᵀ]``.

    Attributes:
        count: Rows used.
        mean_x: [G, D].
        mean_y: [O]; group ``g`` owns the targets ``g * O / G`` to ``(g + 1) * O / G``.
        covariance: [G, D, D], divided by ``count``.
        cross: [G, D, O / G], divided by ``count``.
    """

    count: int
    mean_x: FloatArray
    mean_y: FloatArray
    covariance: FloatArray
    cross: FloatArray


Request: TypeAlias = (
    RangeRequest
    | MovingRangeRequest
    | TailRequest
    | MeanRequest
    | MomentsRequest
    | CrossMomentsRequest
    | HistogramRequest
)
Result: TypeAlias = (
    RangeResult | TailResult | MeanResult | MomentsResult | CrossMomentsResult | HistogramResult
)


class Statistics(Mapping[Request, Result]):
    """Results by request; ``statistics[request]`` has the type that goes with the request.

    Args:
        results: One result per request, each of the type that goes with it.
        sample_count: Samples that were run.
    """

    def __init__(self, results: Mapping[Request, Result], sample_count: int) -> None:
        self._results = dict(results)
        self.sample_count = sample_count

    @overload
    def __getitem__(self, key: RangeRequest) -> RangeResult: ...
    @overload
    def __getitem__(self, key: MovingRangeRequest) -> RangeResult: ...
    @overload
    def __getitem__(self, key: TailRequest) -> TailResult: ...
    @overload
    def __getitem__(self, key: MeanRequest) -> MeanResult: ...
    @overload
    def __getitem__(self, key: MomentsRequest) -> MomentsResult: ...
    @overload
    def __getitem__(self, key: CrossMomentsRequest) -> CrossMomentsResult: ...
    @overload
    def __getitem__(self, key: HistogramRequest) -> HistogramResult: ...
    @overload
    def __getitem__(self, key: Request) -> Result: ...
    def __getitem__(self, key: Request) -> Result:
        return self._results[key]

    def __iter__(self) -> Iterator[Request]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def __repr__(self) -> str:
        return f"Statistics({len(self)} results over {self.sample_count} samples)"
