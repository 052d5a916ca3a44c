"""Make trained ONNX models smaller and faster without retraining, and say honestly what it cost.

The public API is this module: :func:`compress`, :func:`verify`, :func:`inspect`, :func:`benchmark`,
:func:`load`, :func:`save`, :class:`CompressionResult` and the errors. Names are imported on first
use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxcompress.api import benchmark, verify
    from onnxcompress.errors import OnnxCompressError
    from onnxcompress.inspection import inspect
    from onnxcompress.model_io import load, save
    from onnxcompress.pipeline import compress
    from onnxcompress.result import CompressionResult
    from onnxcompress.verification.gates import Gates
    from onnxcompress.verification.side_by_side import Verification

__version__ = "0.1.0"

__all__ = [
    "CompressionResult",
    "Gates",
    "OnnxCompressError",
    "Verification",
    "__version__",
    "benchmark",
    "compress",
    "inspect",
    "load",
    "save",
    "verify",
]

_HOMES = {
    "CompressionResult": "onnxcompress.result",
    "Gates": "onnxcompress.verification.gates",
    "OnnxCompressError": "onnxcompress.errors",
    "Verification": "onnxcompress.verification.side_by_side",
    "benchmark": "onnxcompress.api",
    "compress": "onnxcompress.pipeline",
    "inspect": "onnxcompress.inspection",
    "load": "onnxcompress.model_io",
    "save": "onnxcompress.model_io",
    "verify": "onnxcompress.api",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use: a pass imports a submodule, not the whole tool."""
    if name not in _HOMES:
        raise AttributeError(f"module 'onnxcompress' has no attribute '{name}'")
    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
