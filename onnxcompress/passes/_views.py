"""Let nodes that only look at a tensor with other axes of length one read it directly.

Exporters write the state of a recurrent layer as ``[1, 1, C] -> Squeeze -> [1, C] -> Unsqueeze ->
[1, 1, C]``, and put a Transpose around a sequence of one step. No element moves: in row-major order
element ``(i_1, ..., i_n)`` lies at ``sum_k i_k prod_{l>k} d_l``, and an axis with ``d_k = 1`` has
``i_k = 0`` and a factor of one, so axes of length one may come, go and change places. Two tensors
whose *other* axes are the same in the same order hold the same elements in the same places. Such
nodes are called views here: Squeeze and Unsqueeze, and Transpose, Reshape and Flatten where they do
no more. A view of a view is a view of the first tensor: one Squeeze, Unsqueeze or Reshape, or
nothing at all where the shapes are equal.

Views compute nothing, but each costs a runtime as much as any small operator: in DTLN, 20 of 35
nodes around two LSTM layers are views.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcompress.graph.constants import set_initializer
from onnxcompress.graph.naming import Namer
from onnxcompress.graph.probe import Dims, Shapes, probe
from onnxcompress.graph.rules.base import attribute_ints, constant_ints

VIEWS = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that may be views."""

_STANDARD = frozenset({"", "ai.onnx"})
_AXES_AS_INPUT = 13
_TARGET_AS_INPUT = 5


def merge_views(model: ir.Model) -> int:
    """Let every view read what no view makes, in place; views that nothing reads any more stay.

    Args:
        model: A normalized model.

    Returns:
        How many nodes were changed. None has become more, and a node that is left without an effect
        is an Identity.
    """
    opset = model.opset_imports.get("", 0)
    candidates = [node for node in model.graph.all_nodes() if _may_merge(node)]
    if not candidates or opset < _TARGET_AS_INPUT:
        return 0
    shapes, namer = probe(model), Namer(model)
    changed = 0
    for node in candidates:
        source = _source(node, shapes)
        if source is not None and _rewrite(model, node, source, shapes, namer):
            changed += 1
    return changed


def _is_candidate(node: ir.Node | None) -> bool:
    return node is not None and node.op_type in VIEWS and node.domain in _STANDARD


def _may_merge(node: ir.Node) -> bool:
    """Whether a node may be a view of a view, or one without any effect."""
    if not _is_candidate(node) or node.inputs[0] is None:
        return False
    return node.op_type in {"Reshape", "Transpose"} or _is_candidate(node.inputs[0].producer())


def _source(node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """What the first of the views that end in ``node`` reads; None if ``node`` is no view."""
    found: ir.Value | None = None
    current: ir.Node | None = node
    while current is not None and current.graph is node.graph and _is_view(current, shapes):
        found = current.inputs[0]
        current = None if found is None else found.producer()
    return found


def _is_view(node: ir.Node, shapes: Shapes) -> bool:
    """Whether a node keeps all axes but those of length one, in their order."""
    if not _is_candidate(node):
        return False
    before, after = shapes.of(node.inputs[0]), shapes.of(node.outputs[0])
    if before is None or after is None or _others(before) != _others(after):
        return False
    if node.op_type == "Transpose":
        perm = attribute_ints(node, "perm") or tuple(reversed(range(len(before))))
        kept = [axis for axis in perm if before[axis] != 1]
        return kept == sorted(kept)
    if node.op_type == "Squeeze":  # without axes it depends on the lengths at run time
        return constant_ints(node, "axes", 1) is not None
    # Several dynamic axes could change places, or lengths be dealt out anew.
    return node.op_type == "Unsqueeze" or before.count(None) < 2


def _others(dims: Dims) -> Dims:
    """The axes that need not be of length one."""
    return tuple(length for length in dims if length != 1)


def _rewrite(
    model: ir.Model, node: ir.Node, source: ir.Value, shapes: Shapes, namer: Namer
) -> bool:
    """Let a view read ``source``, a view or more before it; False if it has to stay as it is."""
    before, after = shapes.of(source), shapes.of(node.outputs[0])
    if before is None or after is None:
        return False
    if before == after:
        _become(node, "Identity", source)
        return True
    if node.inputs[0] is source:
        return False

    def integers(role: str, values: list[int]) -> ir.Value:
        name = namer.value(f"{node.name}/simplify_{role}")
        return set_initializer(model.graph, name, np.array(values, np.int64))

    removed, added = _missing(before, after), _missing(after, before)
    if removed is not None or added is not None:
        op_type = "Unsqueeze" if removed is None else "Squeeze"
        axes = removed or added or []
        if model.opset_imports.get("", 0) < _AXES_AS_INPUT:
            _become(node, op_type, source)
            node.attributes["axes"] = ir.AttrInt64s("axes", axes)
        else:
            _become(node, op_type, source, integers("axes", axes))
        return True
    target = _target(before, after)
    if target is None:
        return False
    _become(node, "Reshape", source, integers("shape", target))
    return True


def _missing(longer: Dims, shorter: Dims) -> list[int] | None:
    """Axes of length one without which ``longer`` is ``shorter``; None if there are no such."""
    axes, place = [], 0
    for axis, length in enumerate(longer):
        if place < len(shorter) and shorter[place] == length:
            place += 1
        elif length == 1:
            axes.append(axis)
        else:
            return None
    return axes if place == len(shorter) else None


def _target(before: Dims, after: Dims) -> list[int] | None:
    """The target of a Reshape: 0 for a dynamic axis in its old place, -1 for one in another."""
    target = []
    for axis, length in enumerate(after):
        if length is not None:
            target.append(length)
        elif axis < len(before) and before[: axis + 1].count(None) == after[: axis + 1].count(None):
            target.append(0 if before[axis] is None else -1)
        else:
            target.append(-1)
    return target if target.count(-1) < 2 and after.count(0) == 0 else None


def _become(node: ir.Node, op_type: str, *inputs: ir.Value) -> None:
    """Turn a node into another one with the same output."""
    node.op_type = op_type
    node.attributes.clear()
    node.resize_inputs(len(inputs))
    for place, value in enumerate(inputs):
        node.replace_input_with(place, value)
