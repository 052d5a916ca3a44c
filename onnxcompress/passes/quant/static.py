"""What static quantization hands over to dynamic quantization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from onnxcompress.passes.base import PassReport

NOT_FASTER = "Integers make this model smaller but not faster here"
"""How the note of a static result that brings no speed begins."""


@dataclass(frozen=True, slots=True, eq=False)
class Static:
    """What static quantization made of a model.

    Attributes:
        report: Its report.
        nodes: The nodes that run on integers.
        draft: Makes the same model with some of these nodes in float, scales and weights of the
            others as they are.
        again: Quantizes a copy of the model, in place, with some of these nodes in float, the
            others where they are.
        left_in_float: Whether the last note of the report says that nothing could be done.
    """

    report: PassReport
    nodes: frozenset[str]
    draft: Callable[[frozenset[str]], ir.Model] | None = None
    again: StaticRun | None = None
    left_in_float: bool = False


StaticRun = Callable[[ir.Model, frozenset[str]], Static]
"""Quantizes a model in place, leaving the given nodes in float."""
