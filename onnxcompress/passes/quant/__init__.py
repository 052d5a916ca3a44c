"""Integer quantization: convolutions and matrix products on 8-bit integers.

The way of a model: :mod:`.prepare` → :mod:`.placement` (which nodes, by :mod:`.search` with the
clock) → :mod:`.measure` (ranges, clipping errors, covariances) → :mod:`.parameters` (scales and
integer weights) → :mod:`.correction` (biases, and whether each node keeps its output) →
:mod:`.insertion` (Q/DQ nodes), with :mod:`.kernels` looking at what onnxruntime makes of it.
:mod:`.operators` is the one table of operators.
"""

from onnxcompress.passes.quant.options import QuantOptions
from onnxcompress.passes.quant.quant_pass import QuantPass

__all__ = ["QuantOptions", "QuantPass"]
