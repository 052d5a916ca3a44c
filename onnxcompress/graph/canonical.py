"""Bring a graph into the form that the coupling analysis reads best, without changing its results.

- What depends only on static shapes becomes a constant: Reshape targets, paddings, slice bounds,
  masks, zero states.
- An If that takes the same branch on every run becomes that branch.
- Reshape and Expand targets are written as static number, ``0`` (copy) or at most one ``-1``,
  where that says the same as the computed target.
- A transposition that merges the batch with other axes leaves them apart.
- Squeeze names its axes, as an axis that shrinks to length one must not vanish.
- Zero initial states of recurrent layers are dropped: zero is the default.
- Vectors shared by several nodes (biases, scales) get a copy per node, so that equal values do not
  tie unrelated channels. Matrices stay shared: tied weights are meant.
- Values have unique names across subgraphs.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from onnxcompress.graph.branches import settle_branches
from onnxcompress.graph.constants import (
    Array,
    constant_of,
    constant_tensor,
    is_constant,
    set_initializer,
)
from onnxcompress.graph.naming import Namer
from onnxcompress.graph.probe import Dims, Shapes, probe
from onnxcompress.graph.rules.base import attribute_ints, input_value
from onnxcompress.graph.transposes import unmerge_transposes

_RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
# Operators that keep an all-zero tensor all-zero.
_ZERO_PATH = frozenset(
    {"Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split",
     "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)  # fmt: skip


def canonicalize(model: ir.Model) -> None:
    """Canonicalize ``model`` in place; results, inputs and outputs stay as they are.

    Args:
        model: A model after :func:`onnxcompress.model_io.normalize`.
    """
    _unique_values(model)
    shapes = settle_branches(model, probe(model))
    unmerge_transposes(model, shapes)
    namer = Namer(model)
    for node in list(model.graph.all_nodes()):
        if node.domain not in {"", "ai.onnx"}:
            continue
        if node.op_type in _RECURRENT:
            _drop_zero_states(node)
        elif node.op_type == "Squeeze":
            _name_squeezed_axes(model, node, shapes, namer)
        elif node.op_type in {"Reshape", "Expand"}:
            _write_target(model, node, shapes, namer)
    _fold(model, shapes, namer)
    _privatize_vectors(model, namer)
    common_passes.RemoveUnusedNodesPass()(model)


def _unique_values(model: ir.Model) -> None:
    """Rename values of subgraphs that share a name with another value."""
    namer = Namer(model)
    seen: set[str] = set()
    for graph in model.graphs():
        values = [*graph.inputs, *graph.initializers.values()]
        values += [output for node in graph for output in node.outputs]
        for value in dict.fromkeys(values):
            if not value.name:
                continue
            if value.name in seen:
                value.name = namer.value(value.name)
            seen.add(value.name)


def _fold(model: ir.Model, shapes: Shapes, namer: Namer) -> None:
    """Replace computed constants by initializers."""
    outputs = {output for graph in model.graphs() for output in graph.outputs}
    for node in list(model.graph.all_nodes()):
        for output in node.outputs:
            array = shapes.constants.get(output)
            if array is None or output in outputs or not output.uses():
                continue
            name = namer.value(f"{output.name}/canonical_constant")
            constant = set_initializer(model.graph, name, np.array(array))
            output.replace_all_uses_with(constant)
            _feed_ranges(model, constant, array, namer)


def _feed_ranges(model: ir.Model, constant: ir.Value, array: Array, namer: Namer) -> None:
    """Range takes a computed ``[1]`` for a number, but no constant one."""
    for use in list(constant.uses()) if array.shape == (1,) else ():
        if use.node.op_type == "Range":
            name = namer.value(f"{constant.name}_scalar")
            scalar = set_initializer(model.graph, name, array.reshape(()))
            use.node.replace_input_with(use.idx, scalar)


def _write_target(model: ir.Model, node: ir.Node, shapes: Shapes, namer: Namer) -> None:
    """Write the target of a Reshape or Expand as a constant, if one says the same on every run."""
    target = input_value(node, 1)
    if target is None or is_constant(target):
        return
    before, after = shapes.of(node.inputs[0]), shapes.of(node.outputs[0])
    pairs = [
        (p.get(node.inputs[0]) if node.inputs[0] is not None else None, p.get(node.outputs[0]))
        for p in shapes.probes
    ]
    if before is None or after is None or any(a is None or b is None for a, b in pairs):
        return
    entries = (
        _reshape_target(after, pairs) if node.op_type == "Reshape" else _expand_target(after, pairs)
    )
    if entries is None:
        return
    # A 0 written here means "copy", whatever it meant in the target it replaces.
    node.attributes.pop("allowzero", None)
    name = namer.value(f"{node.name}/canonical_shape")
    node.replace_input_with(
        1, set_initializer(model.graph, name, np.array(entries, dtype=np.int64))
    )


def _reshape_target(after: Dims, pairs: list[tuple[Dims | None, Dims | None]]) -> list[int] | None:
    """Static lengths as numbers, lengths copied from the same axis as 0, one other as -1."""
    entries: list[int] = []
    for axis, length in enumerate(after):
        if length is not None and length != 0:
            entries.append(length)
        elif all(
            x is not None and y is not None and axis < len(x) and y[axis] is not None
            and x[axis] == y[axis]
            for x, y in pairs
        ):  # fmt: skip
            entries.append(0)
        elif all(y is not None and y[axis] is not None for _, y in pairs):
            entries.append(-1)
        else:
            return None
    return entries if entries.count(-1) <= 1 else None


def _expand_target(after: Dims, pairs: list[tuple[Dims | None, Dims | None]]) -> list[int] | None:
    """Static lengths as numbers, 1 where the input has the length already."""
    entries: list[int] = []
    for position in range(-len(after), 0):
        length = after[position]
        if all(
            x is not None and y is not None and len(x) >= -position
            and x[position] is not None and x[position] == y[position]
            for x, y in pairs
        ):  # fmt: skip
            entries.append(1)
        elif length is not None:
            entries.append(length)
        else:
            return None
    return entries


def _name_squeezed_axes(model: ir.Model, node: ir.Node, shapes: Shapes, namer: Namer) -> None:
    if attribute_ints(node, "axes") is not None or input_value(node, 1) is not None:
        return
    before, after = shapes.of(node.inputs[0]), shapes.of(node.outputs[0])
    if before is None or after is None:
        return
    axes = [axis for axis, length in enumerate(before) if length == 1]
    if len(before) - len(axes) != len(after):
        return
    if model.opset_imports.get("", 1) < 13:
        node.attributes["axes"] = ir.AttrInt64s("axes", axes)
        return
    node.resize_inputs(2)
    name = namer.value(f"{node.name}/canonical_axes")
    node.replace_input_with(1, set_initializer(model.graph, name, np.array(axes, dtype=np.int64)))


def _drop_zero_states(node: ir.Node) -> None:
    """An initial state that is zero on every run is the default."""
    for index in (5, 6):
        if index < len(node.inputs) and _is_zero(node.inputs[index]):
            node.replace_input_with(index, None)


def _is_zero(value: ir.Value | None) -> bool:
    if value is None:
        return False
    array = constant_of(value)
    if array is not None:
        return bool(not np.any(array))
    node = value.producer()
    if node is None or node.domain not in {"", "ai.onnx"}:
        return False
    if node.op_type == "ConstantOfShape":
        fill = node.attributes.get("value")
        return fill is None or not np.any(fill.as_tensor().numpy())
    if node.op_type == "Concat":
        return all(_is_zero(v) for v in node.inputs)
    return node.op_type in _ZERO_PATH and _is_zero(node.inputs[0])


def _privatize_vectors(model: ir.Model, namer: Namer) -> None:
    """Give every further user of a shared float vector its own copy."""
    for graph in list(model.graphs()):
        for value in list(graph.initializers.values()):
            tensor = constant_tensor(value)
            if tensor is None or not _is_float_vector(tensor):
                continue
            for node in list(value.consumers())[1:]:
                copy = set_initializer(
                    graph,
                    namer.value(f"{value.name}/canonical_copy"),
                    tensor.numpy(),
                    dtype=tensor.dtype,
                )
                for index, used in enumerate(node.inputs):
                    if used is value:
                        node.replace_input_with(index, copy)


def _is_float_vector(tensor: ir.TensorProtocol) -> bool:
    """More than one element, all on one axis."""
    return tensor.dtype.is_floating_point() and sum(int(d) > 1 for d in tensor.shape.numpy()) == 1
