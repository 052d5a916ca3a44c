"""Low-rank factorization: one layer becomes two or three smaller ones."""

from onnxcompress.passes.svd.options import Objective, SvdOptions
from onnxcompress.passes.svd.svd_pass import SvdPass

__all__ = ["Objective", "SvdOptions", "SvdPass"]
