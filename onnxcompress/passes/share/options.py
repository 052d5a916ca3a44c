"""Options of the share pass."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from onnxcompress.errors import UsageError
from onnxcompress.passes.base import PassOptions, option


class Merge(enum.Enum):
    """Which duplicates are stored once."""

    NONE = "none"
    EXACT = "exact"
    SCALED = "scaled"


class Codebook(enum.Enum):
    """What a code stands for."""

    NONE = "none"
    SCALAR = "scalar"
    VECTOR = "vector"


class Assign(enum.Enum):
    """How codes are chosen."""

    NEAREST = "nearest"
    FEEDBACK = "feedback"


class Packing(enum.Enum):
    """How codes are stored."""

    BITS = "bits"
    BYTES = "bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareOptions(PassOptions):
    """Options of :class:`onnxcompress.passes.share.SharePass`."""

    bits: int = option(
        4,
        "bits per code, on average over the model's weights: 2 to 8 for 4 to 256 values in a "
        "codebook",
        minimum=2,
        maximum=8,
    )
    mixed: bool = option(
        True,
        "give weights whose errors hurt the model's outputs most more bits, and others one bit "
        "less; false: all have the same (codebook=scalar with assign=feedback)",
    )
    margin: float = option(
        0.15,
        "bytes that codes may take beyond those of 'bits', as a fraction, while the outputs are "
        "expected to have less than 50 dB (with mixed=true and packing=bits)",
        minimum=0.0,
        maximum=1.0,
    )
    merge: Merge = option(
        Merge.SCALED,
        "store duplicates once: exact (equal, reshaped, transposed), scaled (also multiples, equal "
        "to rounding), none",
    )
    filters: float | None = option(
        None,
        "merge filters (channels, neurons) whose constants differ by this relative distance at "
        "most, and add up the weights that read them; 0: equal ones only; none: do not",
        minimum=0.0,
        maximum=1.0,
    )
    codebook: Codebook = option(
        Codebook.SCALAR,
        "scalar: one code per weight; vector: one code for 'vector' neighbouring weights; none: "
        "only merge duplicates",
    )
    vector: int = option(2, "weights per code of codebook=vector", minimum=2, maximum=16)
    group: int = option(
        0, "output channels that share a codebook; 0: one codebook per tensor", minimum=0
    )
    scales: bool = option(True, "let every output channel have a scale where that helps")
    assign: Assign = option(
        Assign.FEEDBACK,
        "feedback: choose codes so that the outputs of the layer on calibration data change least; "
        "nearest: the nearest value, without data",
    )
    bias: bool = option(
        True, "refit biases: they take up the mean error of each layer (with assign=feedback)"
    )
    steps: int = option(
        24,
        "fit layers in this many steps, each to make up for what those before it lost (layers with "
        "a bias, with bias=true); 1: all at once",
        minimum=1,
    )
    packing: Packing = option(
        Packing.BITS,
        "bits: codes packed into bytes; bytes: one byte per code, loads faster (bits are then "
        "those that it takes in an archive)",
    )
    halves: bool = option(
        True,
        "store biases, factors and small weights in half precision where the bytes are worth more "
        "than what that loses",
    )
    min_elements: int = option(512, "leave smaller tensors as they are", minimum=1)
    include: tuple[str, ...] = option(
        (), "treat only weights whose name, or whose node's name, matches a pattern (* ? [..])"
    )
    exclude: tuple[str, ...] = option(
        (), "leave weights whose name, or whose node's name, matches a pattern"
    )

    def validate(self, owner: str) -> None:
        """Check bounds, and that there is something to do.

        Raises:
            UsageError: If a value is out of its bounds or options contradict each other.
        """
        PassOptions.validate(self, owner)
        if self.merge is Merge.NONE and self.codebook is Codebook.NONE and self.filters is None:
            raise UsageError(
                f"{owner}.merge=none and {owner}.codebook=none leave nothing to do",
                hint=f"Drop the pass '{owner}' or one of the options.",
            )
