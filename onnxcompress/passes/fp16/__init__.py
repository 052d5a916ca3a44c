"""The half precision pass."""

from onnxcompress.passes.fp16.convert import LIMIT
from onnxcompress.passes.fp16.fp16_pass import Fp16Options, Fp16Pass, Mode
from onnxcompress.passes.fp16.halves import as_half

__all__ = ["LIMIT", "Fp16Options", "Fp16Pass", "Mode", "as_half"]
