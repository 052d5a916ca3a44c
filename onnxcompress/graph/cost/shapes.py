"""Static shapes of all values of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxscript.optimizer import fold_constants

from onnxcompress.graph.constants import constant_of, stored_tensor
from onnxcompress.graph.cost.common import Shape
from onnxcompress.graph.cost.standard import use_standard_forms

# Constants up to this many elements can be shapes, axes or paddings.
_SHAPE_ELEMENTS = 1024


def probe_shapes(
    model: ir.Model, feeds_shapes: Mapping[str, Shape] | None = None
) -> dict[ir.Value, Shape]:
    """Static shapes of all values, inferred on a copy whose inputs have fixed shapes.

    Where plain inference stops at shape arithmetic, the copy's constants are folded and inference
    runs again. What is still unknown is taken from the shape stored in ``model``, dynamic axes as
    1. Inference sees no large initializers, so that models above 2 GB work.

    Args:
        model: The model; it is not changed.
        feeds_shapes: Shapes of graph inputs by name; otherwise their dynamic axes are 1.

    Returns:
        Value of ``model`` to shape; values of unknown rank are absent.
    """
    probe = model.clone()
    for value in probe.graph.inputs:
        if value.name in probe.graph.initializers:
            continue
        given = (feeds_shapes or {}).get(value.name or "")
        if given is None and value.shape is not None:
            # Some exporters write a dynamic axis as -1.
            given = tuple(d if isinstance(d, int) and d >= 0 else 1 for d in value.shape)
        if given is not None:
            value.shape = ir.Shape(given)
    for node in probe.graph.all_nodes():
        for output in node.outputs:
            output.shape = None
    use_standard_forms(probe)
    inferred = _infer(probe)
    if any(v.shape is None or not v.shape.is_static() for v in inferred.values()):
        fold_constants(probe, onnx_shape_inference=True, should_fold=_folds_shape_arithmetic)
        inferred = {**inferred, **_infer(probe)}
    shapes: dict[ir.Value, Shape] = {}
    for value in _values(model):
        tensor = stored_tensor(value)
        found = inferred.get(value.name or "")
        if tensor is not None:
            known: ir.Shape | None = ir.Shape(tensor.shape.numpy())
        else:
            known = value.shape if found is None or found.shape is None else found.shape
        if known is not None:
            shapes[value] = tuple(_axis(known, value.shape, i) for i in range(len(known)))
    return shapes


def _folds_shape_arithmetic(node: ir.Node) -> bool | None:
    """Fold small ConstantOfShape nodes too, as paddings are built from them; None: as usual."""
    if node.op_type != "ConstantOfShape":
        return None
    lengths = constant_of(node.inputs[0])
    return lengths is not None and math.prod(lengths.tolist()) <= _SHAPE_ELEMENTS


def _infer(probe: ir.Model) -> dict[str, ir.Value]:
    """Infer shapes in place; returns the values by name, which is unique in a normalized model."""
    common_passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(probe)
    return {value.name: value for value in _values(probe) if value.name}


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """All values of the model and its subgraphs."""
    for graph in model.graphs():
        yield from graph.inputs
        yield from (v for v in graph.initializers.values() if not v.is_graph_input())
        for node in graph:
            yield from node.outputs


def _axis(known: ir.Shape, stored: ir.Shape | None, index: int) -> int:
    """Length of one axis: as inferred, else as stored in the model, else 1."""
    for shape in (known, stored):
        if shape is not None and len(shape) == len(known):
            length = shape[index]
            if isinstance(length, int) and length >= 0:
                return length
    return 1
