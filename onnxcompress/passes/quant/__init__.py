"""Integer quantization: convolutions and matrix products on 8-bit integers.

The way of a model: :mod:`.prepare` → :mod:`.placement` (which nodes, by :mod:`.search` with the
clock) → :mod:`.measure` (ranges, clipping errors, covariances) → :mod:`.parameters` (scales and
integer weights) → :mod:`.correction` (biases, and whether each node keeps its output) →
:mod:`.insertion` (Q/DQ nodes), with :mod:`.kernels` looking at what onnxruntime makes of it.
:mod:`.operators` is the one table of operators.

What cannot or should not have fixed ranges goes another way: :mod:`.dynamic` (alone, or on top of
the static result) → :mod:`.dynamic_search` (forms, by clock and fidelity, with :mod:`.judge`) →
:mod:`.dynamic_write`, with :mod:`.dynamic_rules` as the table of operators and
:mod:`.constant_chains` to find weights that exporters reorder.
"""

from onnxcompress.passes.quant.options import QuantOptions
from onnxcompress.passes.quant.quant_pass import QuantPass

__all__ = ["QuantOptions", "QuantPass"]
