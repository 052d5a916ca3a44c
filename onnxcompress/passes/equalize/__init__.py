"""Equalize the ranges of weights across layers, without changing what the model computes."""

from onnxcompress.passes.equalize.balance import equalize
from onnxcompress.passes.equalize.equalize_pass import EqualizeOptions, EqualizePass

__all__ = ["EqualizeOptions", "EqualizePass", "equalize"]
