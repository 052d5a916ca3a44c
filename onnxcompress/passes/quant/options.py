"""Options of the quantization pass."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from onnxcompress.errors import UsageError
from onnxcompress.passes.base import PassOptions, option
from onnxcompress.passes.quant.precision import AUTO, FALLBACKS


class RangeMethod(enum.Enum):
    """How the range of an activation is chosen."""

    AUTO = "auto"
    MINMAX = "minmax"
    MOVING_AVERAGE = "moving_average"
    PERCENTILE = "percentile"
    ENTROPY = "entropy"
    MSE = "mse"
    NORM = "norm"


class Rounding(enum.Enum):
    """How weights are rounded to integers."""

    NEAREST = "nearest"
    GPTQ = "gptq"
    ADAPTIVE = "adaptive"

    @property
    def words(self) -> str:
        """For a sentence in the report."""
        return {
            Rounding.NEAREST: "to nearest",
            Rounding.GPTQ: "with error feedback",
            Rounding.ADAPTIVE: "adaptively",
        }[self]


class BiasCorrection(enum.Enum):
    """Whether biases make up for the mean error of their layer."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class Objective(enum.Enum):
    """What decides which nodes become integer."""

    LATENCY = "latency"
    SIZE = "size"


class Activations(enum.Enum):
    """Width of the integers that values between nodes become."""

    INT8 = "int8"
    INT16 = "int16"


class Mode(enum.Enum):
    """When the range of an activation is fixed."""

    AUTO = "auto"
    STATIC = "static"
    DYNAMIC = "dynamic"


class Scales(enum.Enum):
    """Which scales are allowed."""

    ANY = "any"
    POWER_OF_TWO = "power_of_two"


class Equalize(enum.Enum):
    """Whether ranges of weights may be balanced across layers before quantization."""

    AUTO = "auto"
    OFF = "off"


class Format(enum.Enum):
    """How integer nodes are written."""

    QDQ = "qdq"
    QOPERATOR = "qoperator"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantOptions(PassOptions):
    """Options of :class:`onnxcompress.passes.quant.QuantPass`."""

    mode: Mode = option(
        Mode.AUTO,
        "static: ranges of activations from calibration; dynamic: ranges taken while the model "
        "runs, no data needed; auto: static, and dynamic where that is better (LSTM, branches)",
    )
    objective: Objective = option(
        Objective.LATENCY,
        "latency: what the clock says is slower in int8 stays float; size: all that can be is int8",
    )
    ranges: RangeMethod = option(
        RangeMethod.AUTO,
        "how activation ranges are chosen: minmax, moving_average (of each sample's extremes), "
        "percentile, entropy (least Kullback-Leibler divergence), mse (least squared error), norm "
        "(least mean of |error|^2.4), or auto (norm or minmax, whichever keeps the outputs "
        "nearer to float)",
    )
    percentile: float = option(
        99.99,
        "share of the values inside the range, in percent (ranges=percentile)",
        minimum=50.1,
        maximum=99.9999,
    )
    weights: Rounding = option(
        Rounding.GPTQ,
        "how weights are rounded: nearest, gptq (error feedback), or adaptive (gptq, then single "
        "weights changed until the output of the layer gains no more)",
    )
    bias_correction: BiasCorrection = option(
        BiasCorrection.AUTO,
        "let biases make up for the mean error of their layer: on, off, auto (convolutions)",
    )
    per_channel: bool = option(True, "one weight scale per output channel rather than per tensor")
    smooth: str = option(
        "auto",
        "move outliers of activations into weights before MatMul and Gemm: auto (where the outputs "
        "gain), off, or the exponent alpha from 0 to 1",
    )
    equalize: Equalize = option(
        Equalize.AUTO,
        "let channels of activations share their ranges, and balance very different channels of "
        "weights (auto: where less noise is predicted, or the outputs gain clearly), or off",
    )
    embeddings: bool = option(True, "also quantize the tables that Gather looks up, per row")
    scales: Scales = option(
        Scales.ANY, "any, or power_of_two: fixed point, for hardware that multiplies by shifting"
    )
    include: tuple[str, ...] = option(
        (), "quantize only nodes whose name matches one of these patterns (* ? [..])"
    )
    exclude: tuple[str, ...] = option((), "leave nodes in float whose name matches a pattern")
    op_types: tuple[str, ...] = option((), "quantize only these operators, e.g. Conv,Gemm")
    activations: Activations = option(
        Activations.INT8, "int8, or int16: 16-bit values between nodes, 8-bit weights"
    )
    min_sqnr_db: float = option(
        10.0, "least SQNR in dB of each node's own output, and of the outputs", minimum=-100.0
    )
    fallback: tuple[str, ...] = option(
        (AUTO,),
        "what nodes are lifted to until the limits hold, of int16, float16, float; auto: what is "
        "cheap for target and objective",
    )
    sensitivity: bool = option(
        False, "measure what each node costs the outputs even where no limit asks for it"
    )
    sensitivity_nodes: int = option(
        64, "most nodes whose cost for the outputs is measured", minimum=1
    )
    search_seconds: float = option(
        5.0,
        "most processor time for all searches by the clock together (objective=latency); 0 "
        "takes the defaults",
        minimum=0.0,
    )
    cache: bool = option(
        True, "take a placement found before for the same model and machine, and keep new ones"
    )
    format: Format = option(
        Format.QDQ,
        "qdq: QuantizeLinear and DequantizeLinear around float operators; qoperator: operators on "
        "integers (QLinearConv, QGemm, ...) where there are such",
    )

    def validate(self, owner: str) -> None:
        """Check bounds, and that patterns are not empty words.

        Raises:
            UsageError: If a value is out of its bounds.
        """
        # super() without arguments does not work in a dataclass with slots: the class is made
        # twice.
        PassOptions.validate(self, owner)
        if self.smooth not in {"auto", "off"} and self.smoothing_alpha() is None:
            raise UsageError(
                f"option {owner}.smooth wants auto, off or a number from 0 to 1, "
                f"not '{self.smooth}'"
            )
        for name in self.op_types:
            if not name.isidentifier():
                raise UsageError(f"option {owner}.op_types names no operator: '{name}'")
        known = [precision.value for precision in FALLBACKS]
        if self.fallback != (AUTO,) and not (self.fallback and set(self.fallback) <= set(known)):
            raise UsageError(
                f"option {owner}.fallback is '{','.join(self.fallback)}'",
                hint=f"Use {AUTO}, or some of {', '.join(known)}.",
            )

    def smoothing_alpha(self) -> float | None:
        """The exponent given for smoothing; None for auto and off."""
        try:
            alpha = float(self.smooth)
        except ValueError:
            return None
        return alpha if 0.0 <= alpha <= 1.0 else None
