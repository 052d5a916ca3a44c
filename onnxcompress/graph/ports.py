"""Open the ports of a state: full size outside, the surviving cells inside.

Where a state is read, ``Gather`` picks the survivors. Where it is written, ``Pad`` appends a zero
and ``Gather`` puts it into the places of the removed cells, so that the interface keeps its shapes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.errors import ModelError
from onnxcompress.graph.constants import set_initializer
from onnxcompress.graph.coupling import Coupling, Port
from onnxcompress.graph.naming import Namer

Kept = tuple[npt.NDArray[np.bool_] | None, ...]


def open_ports(model: ir.Model, coupling: Coupling, masks: Mapping[str, Kept]) -> dict[str, Kept]:
    """Insert the nodes of every port that loses cells, before anything is cut.

    Args:
        model: The model that was analysed.
        coupling: Its coupling.
        masks: Value name to the survivors on each axis.

    Returns:
        ``masks`` under the names that the shrinking values have now.
    """
    moved = dict(masks)
    values = _values(model) if coupling.ports else {}
    namer = Namer(model)
    for port in coupling.ports:
        kept = masks.get(port.value)
        if kept is None:
            continue
        value = values.get(port.value)
        if value is None:
            raise ModelError(f"'{port.value}' is not in the model that was analysed")
        if port.writes:
            moved.pop(port.value, None)
            name = _write(model, port, value, kept, namer)
        else:
            moved.pop(port.value, None)
            name = _read(model, port, value, kept, namer)
        moved[name] = kept
    return moved


def mask_ports(model: ir.Model, coupling: Coupling, masks: Mapping[str, Kept]) -> None:
    """The law for states: what is written of a removed cell is zero."""
    values = _values(model) if coupling.ports else {}
    namer = Namer(model)
    for port in coupling.ports:
        kept = masks.get(port.value)
        if kept is None or not port.writes:
            continue
        inner = values[port.value]
        if inner.dtype is None:
            raise ModelError(f"the state '{port.value}' has no element type")
        outer, source = _detached(model, port, inner, namer)
        zero = set_initializer(
            model.graph, namer.value(f"{outer}/mask_zero"), np.zeros((), inner.dtype.numpy())
        )
        for axis, mask in enumerate(kept):
            if mask is None:
                continue
            shape = [1] * len(kept)
            shape[axis] = len(mask)
            condition = set_initializer(
                model.graph, namer.value(f"{outer}/mask_kept"), mask.reshape(shape)
            )
            source = _node(source, "Where", [condition, source, zero], f"{outer}/mask", namer)
            source.type, source.shape = inner.type, inner.shape
        _attach(model, port, inner, source, outer)


def _values(model: ir.Model) -> dict[str, ir.Value]:
    values = {v.name or "": v for v in model.graph.inputs}
    for node in model.graph.all_nodes():
        values.update((o.name or "", o) for o in node.outputs)
    return values


def _node(
    value: ir.Value,
    op_type: str,
    inputs: list[ir.Value],
    name: str,
    namer: Namer,
    axis: int | None = None,
) -> ir.Value:
    """A node behind the one that makes ``value``; returns its output."""
    attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
    node = ir.Node("", op_type, inputs, attributes, name=namer.node(name))
    node.outputs[0].name = namer.value(f"{node.name}_output")
    node.outputs[0].type = value.type
    producer, graph = value.producer(), value.graph
    if not isinstance(graph, ir.Graph):
        raise ModelError(f"the state '{value.name}' belongs to no graph")
    if producer is not None:
        graph.insert_after(producer, node)
    elif len(graph):
        graph.insert_before(graph[0], node)
    else:
        graph.append(node)
    return node.outputs[0]


def _resized(value: ir.Value, axis: int, length: int) -> ir.Shape | None:
    if value.shape is None:
        return None
    return ir.Shape([length if i == axis else d for i, d in enumerate(value.shape)])


def _read(model: ir.Model, port: Port, value: ir.Value, kept: Kept, namer: Namer) -> str:
    """Pick the survivors for everybody inside."""
    users = [(u.node, u.idx) for u in value.uses() if u.node.name not in port.outside]
    inner = value
    for axis, mask in enumerate(kept):
        if mask is None:
            continue
        role = f"{value.name}/prune_read"
        indices = set_initializer(model.graph, namer.value(f"{role}_indices"), np.flatnonzero(mask))
        # Shapes are those from before the cut, like everybody's: they are resized together.
        before = inner
        inner = _node(inner, "Gather", [inner, indices], role, namer, axis)
        inner.shape = before.shape
    for node, index in users:
        node.replace_input_with(index, inner)
    return inner.name or ""


def _write(model: ir.Model, port: Port, inner: ir.Value, kept: Kept, namer: Namer) -> str:
    """Put zeros in the places of the others for everybody outside."""
    outer, source = _detached(model, port, inner, namer)
    full = inner.shape
    rank = len(kept)
    for axis, mask in enumerate(kept):
        if mask is None:
            continue
        survivors = int(mask.sum())
        pads = [0] * (2 * rank)
        pads[rank + axis] = 1
        role = f"{outer}/prune_write"
        if model.opset_imports.get("", 1) < 11:
            source = _node(source, "Pad", [source], f"{role}_pad", namer)
            node = source.producer()
            assert node is not None  # noqa: S101 - just made
            node.attributes["pads"] = ir.AttrInt64s("pads", pads)
        else:
            amounts = set_initializer(
                model.graph, namer.value(f"{role}_pads"), np.array(pads, np.int64)
            )
            source = _node(source, "Pad", [source, amounts], f"{role}_pad", namer)
        places = np.where(mask, np.cumsum(mask) - 1, survivors)
        indices = set_initializer(
            model.graph, namer.value(f"{role}_indices"), places.astype(np.int64)
        )
        source = _node(source, "Gather", [source, indices], role, namer, axis)
    source.shape = full
    _attach(model, port, inner, source, outer)
    return inner.name or ""


def _detached(model: ir.Model, port: Port, inner: ir.Value, namer: Namer) -> tuple[str, ir.Value]:
    """The name that the full-size state has to have; an output of the model gives its own away."""
    name = inner.name or ""
    if any(v is inner for v in model.graph.outputs):
        inner.name = namer.value(f"{name}/prune_cells")
    return name, inner


def _attach(model: ir.Model, port: Port, inner: ir.Value, outer: ir.Value, name: str) -> None:
    """Let the outside use ``outer`` in place of ``inner``."""
    for use in list(inner.uses()):
        if use.node.name in port.outside:
            use.node.replace_input_with(use.idx, outer)
    graph = inner.graph
    if graph is None:
        return
    for index, output in enumerate(graph.outputs):
        if output is inner:
            graph.outputs[index] = outer
            if graph is model.graph:
                outer.name = name
