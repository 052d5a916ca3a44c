"""The distillation pass."""

from onnxcompress.passes.distill.distill_pass import DistillOptions, DistillPass

__all__ = ["DistillOptions", "DistillPass"]
