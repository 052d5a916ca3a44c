"""A quantized model as its parts: placement, grids, integer weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxcompress.numerics.affine import Affine
from onnxcompress.passes.quant.correction import Correction
from onnxcompress.passes.quant.options import RangeMethod
from onnxcompress.passes.quant.parameters import Layer
from onnxcompress.passes.quant.placement import Plan

_CLEARLY_DB = 10.0
"""Outputs better than the least SQNR by this need no look at single nodes."""


@dataclass(frozen=True, slots=True)
class Built:
    """A quantized model and what it was made from.

    Attributes:
        plan: The placement.
        affines: The grid of every point.
        layers: The integer weight of every weighted node.
        correction: What the comparison with the float network showed.
        method: How the ranges were chosen.
        halves: Float nodes whose weights are stored in float16.
    """

    plan: Plan
    affines: Mapping[str, Affine]
    layers: Mapping[str, Layer]
    correction: Correction
    method: RangeMethod
    halves: frozenset[str] = frozenset()

    def worst_output(self) -> float:
        """SQNR in dB of the output that is farthest from float, on the calibration samples."""
        return min(self.correction.output_sqnr_db.values(), default=np.inf)

    def clearly_keeps(self, least: float) -> bool:
        """Whether the outputs are so much better than ``least`` dB that no node can be at fault."""
        return bool(self.correction.output_sqnr_db) and self.worst_output() >= least + _CLEARLY_DB
