"""Where a compressed model is compared with the original while it learns from it.

Wherever a layer or a sum still has all of its channels, its output means what it meant in the
original, and can be told how far it is from it. Outputs of the model alone would say too little:
from a few hundred samples they teach a network to repeat a few hundred answers, while hundreds of
channels at thousands of places tell every layer what it should do.

Source: Romero et al. 2015, "FitNets: hints for thin deep nets" (equation 3: hints from hidden
layers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxcompress.graph.constants import is_constant
from onnxcompress.passes.distill.coordinates import LINEAR

Shapes = Mapping[ir.Value, Sequence[int | None]]

_TELLING = LINEAR | {"Add", "BatchNormalization", "LayerNormalization"}


def places_of(
    model: ir.Model, shapes: Shapes, original: ir.Model, expected: Shapes
) -> tuple[str, ...]:
    """Names of the values of ``model`` that should be as in the original.

    Args:
        model: The compressed model.
        shapes: Shapes of its values.
        original: The original.
        expected: Shapes of its values.
    """
    there = {
        v.name: v
        for node in original.graph
        for v in node.outputs
        if v.dtype in (None, ir.DataType.FLOAT)
    }
    outputs = set(model.graph.outputs)
    found = []
    for node in model.graph:
        for value in node.outputs:
            other = there.get(value.name)
            if other is None or value not in shapes or shapes[value] != expected.get(other):
                continue
            if value.dtype not in (None, ir.DataType.FLOAT):
                continue
            if value in outputs or (node.op_type in _TELLING and not _is_shifted(value)):
                found.append(value.name or "")
    return tuple(found)


def _is_shifted(value: ir.Value) -> bool:
    """Whether all that reads a value adds a constant to it: what comes out says as much."""
    uses = list(value.uses())
    return (
        len(uses) == 1
        and uses[0].node.op_type in {"Add", "BatchNormalization"}
        and any(is_constant(v) for v in uses[0].node.inputs if v is not value)
    )
