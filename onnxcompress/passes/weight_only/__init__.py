"""Weight-only quantization: weights in 8 or 4 bits, arithmetic in float."""

from onnxcompress.passes.weight_only.options import Format, Rounding, WeightOnlyOptions
from onnxcompress.passes.weight_only.weight_pass import WeightOnlyPass

__all__ = ["Format", "Rounding", "WeightOnlyOptions", "WeightOnlyPass"]
