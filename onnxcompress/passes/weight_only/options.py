"""Options of the weight-only quantization pass."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from onnxcompress.errors import UsageError
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

    bits: int = option(8, "bits per weight: 8 or 4", minimum=4, maximum=8)
    block_size: int | None = option(
        None,
        "weights that share a scale; 0: one scale per output channel. Default: 0 for 8 bits "
        "(128 for matmul_nbits), 32 for 4 bits",
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

    def validate(self, owner: str) -> None:
        """Check bounds, and that the block fits the format.

        Raises:
            UsageError: If a value is out of its bounds or options contradict each other.
        """
        # super() without arguments does not work in a dataclass with slots: the class is made
        # twice.
        PassOptions.validate(self, owner)
        if self.bits not in (4, 8):
            raise UsageError(f"option {owner}.bits={self.bits} must be 4 or 8")
        if self.format is Format.MATMUL_NBITS and self.block not in _KERNEL_BLOCKS:
            raise UsageError(
                f"option {owner}.block_size={self.block} does not go with "
                f"{owner}.format=matmul_nbits",
                hint=f"Its kernels take blocks of {', '.join(map(str, _KERNEL_BLOCKS))}.",
            )
