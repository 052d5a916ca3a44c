"""Where a tensor may be multiplied per channel without changing what the model computes."""

from onnxcompress.graph.scaling.absorb import Absorb, Region, apply_factors
from onnxcompress.graph.scaling.region import find_region

__all__ = ["Absorb", "Region", "apply_factors", "find_region"]
