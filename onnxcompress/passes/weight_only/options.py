"""Options of the weight-only quantization pass."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from onnxcompress.errors import UsageError
from onnxcompress.passes._packing import digits_per_byte
from onnxcompress.passes.base import PassOptions, option


class Format(enum.Enum):
    """How quantized weights are written."""

    AUTO = "auto"
    MATMUL_NBITS = "matmul_nbits"
    DEQUANTIZE = "dequantize"
    FOLDABLE = "foldable"


class Rounding(enum.Enum):
    """How weights are rounded to codes."""

    NEAREST = "nearest"
    GPTQ = "gptq"


_KERNEL_BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightOnlyOptions(PassOptions):
    """Options of :class:`onnxcompress.passes.weight_only.WeightOnlyPass`."""

    bits: int = option(
        8,
        "bits per weight: 8, 4, 2 (ternary: -s, 0, s, five to a byte) or 1 (binary: -s, s)",
        minimum=1,
        maximum=8,
    )
    block_size: int | None = option(
        None,
        "weights that share a scale; 0: one scale per output channel. Default: 0 for 8 bits "
        "(128 for matmul_nbits) and below 4, 32 for 4 bits",
        minimum=0,
    )
    symmetric: bool = option(
        True, "fix the zero point in the middle; false: one per block, finer and a little larger"
    )
    format: Format = option(
        Format.AUTO,
        "matmul_nbits: onnxruntime's MatMulNBits, GatherBlockQuantized where they fit; foldable: "
        "Mul(Cast(codes), scale), which onnxruntime computes once at load; dequantize: standard "
        "DequantizeLinear; auto: matmul_nbits with blocks, foldable without",
    )
    rounding: Rounding = option(
        Rounding.NEAREST,
        "nearest, or gptq: error feedback for the inputs seen in calibration (MatMul, Gemm, Conv)",
    )
    accuracy_level: int = option(
        4,
        "arithmetic of MatMulNBits: 4 rounds activations to 8 bits per block, which is fastest; "
        "1 keeps them in float32",
        minimum=0,
        maximum=4,
    )
    embeddings: bool = option(True, "also quantize the tables that Gather reads")
    min_elements: int = option(1024, "leave smaller tensors in float", minimum=1)
    include: tuple[str, ...] = option(
        (), "treat only weights whose name, or whose node's name, matches a pattern (* ? [..])"
    )
    exclude: tuple[str, ...] = option(
        (), "leave weights in float whose name, or whose node's name, matches a pattern"
    )

    @property
    def block(self) -> int:
        """The block length wanted; 0 for one scale per output channel."""
        if self.block_size is not None:
            return self.block_size
        if self.bits == 4:
            return 32
        return 128 if self.format is Format.MATMUL_NBITS else 0

    @property
    def levels(self) -> int | None:
        """Values of a binary or ternary weight; None for codes of 4 and 8 bits."""
        return {1: 2, 2: 3}.get(self.bits)

    @property
    def words(self) -> str:
        """How the codes are stored, for the report."""
        return {1: "as one bit", 2: "as -1, 0, 1 in 1.6 bits"}.get(
            self.bits, f"in {self.bits} bits"
        )

    @property
    def warning(self) -> str:
        """What to expect of two or three values."""
        name = "Binary" if self.levels == 2 else "Ternary"
        remedy = ", and try rounding=gptq with calibration data"
        return (
            f"{name} weights keep the outputs of few models that were not trained for them: look "
            f"at the verification{'' if self.rounding is Rounding.GPTQ else remedy}."
        )

    def stored_code_bytes(self, codes: int) -> int:
        """Bytes that ``codes`` codes take."""
        if self.levels is not None:
            return -(-codes // digits_per_byte(self.levels))
        return codes * self.bits // 8

    def validate(self, owner: str) -> None:
        """Check bounds, and that the block fits the format.

        Raises:
            UsageError: If a value is out of its bounds or options contradict each other.
        """
        # super() without arguments does not work in a dataclass with slots: the class is made
        # twice.
        PassOptions.validate(self, owner)
        if self.bits not in (1, 2, 4, 8):
            raise UsageError(f"option {owner}.bits={self.bits} must be 8, 4, 2 or 1")
        if self.levels is not None and self.format in (Format.MATMUL_NBITS, Format.DEQUANTIZE):
            raise UsageError(
                f"option {owner}.bits={self.bits} does not go with "
                f"{owner}.format={self.format.value}",
                hint=f"Use {owner}.format=foldable.",
            )
        if self.levels is not None and not self.symmetric:
            raise UsageError(
                f"option {owner}.bits={self.bits} has no zero point: {owner}.symmetric=false does "
                "not go with it"
            )
        if self.format is Format.MATMUL_NBITS and self.block not in _KERNEL_BLOCKS:
            raise UsageError(
                f"option {owner}.block_size={self.block} does not go with "
                f"{owner}.format=matmul_nbits",
                hint=f"Its kernels take blocks of {', '.join(map(str, _KERNEL_BLOCKS))}.",
            )
