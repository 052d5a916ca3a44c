"""Remove units from a model, and the law that says what removing means.

**The law.** Removing units is equivalent to multiplying, at the data input of every contraction,
the positions of these units by zero (for RNNs also the columns of the recurrent weight, which read
the cells one step later), and so where a state leaves the model. :func:`mask` builds that model,
:func:`remove` the small one.

Cutting first takes out what groups that lose all of their units leave without use. Then every node
that touches a removed position mends its own attributes and shape constants (each gets private
ones), the positions are deleted from the initializers, and the recorded shapes are updated. The
shrink rules see masks from before the cut, so their order does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.errors import ModelError, UsageError
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.graph.cost import Shape
from onnxcompress.graph.coupling import Coupling, Units
from onnxcompress.graph.emptying import RefusedError, whole
from onnxcompress.graph.hollow import hollow
from onnxcompress.graph.macs import MacsModel
from onnxcompress.graph.naming import Namer
from onnxcompress.graph.ports import mask_ports, open_ports
from onnxcompress.graph.rules import Shrink, rule_of

__all__ = ["MacsModel", "mask", "remaining_macs", "remove"]

Masks = Mapping[str, tuple[npt.NDArray[np.bool_] | None, ...]]


def remaining_macs(
    model: ir.Model,
    coupling: Coupling,
    removed: Mapping[int, Units],
    feeds_shapes: Mapping[str, Shape] | None = None,
) -> int:
    """Multiply-accumulates of ``model`` if units were removed; :class:`MacsModel` for many calls.

    Args:
        model: The model that was analysed.
        coupling: Its coupling.
        removed: Group index to unit numbers.
        feeds_shapes: Shapes of graph inputs by name; otherwise dynamic axes count as 1.
    """
    return MacsModel(model, coupling, feeds_shapes).remaining(removed)


# --- the law -------------------------------------------------------------------------------


def mask(model: ir.Model, coupling: Coupling, removed: Mapping[int, Units]) -> ir.Model:
    """A copy of ``model`` that ignores units wherever they are summed over, at full size.

    Each masked input ``x`` becomes ``Where(kept, x, 0)``; a product with zero would turn the
    infinities of a removed channel into NaN.

    Args:
        model: The model that was analysed; it is not changed.
        coupling: Its coupling.
        removed: Group index to unit numbers.
    """
    copy = model_io.clone(model)
    nodes = {node.name: node for node in copy.graph.all_nodes()}
    places: dict[tuple[str, int, int], list[npt.NDArray[np.int64]]] = {}
    for index, units in removed.items():
        for sink in coupling.groups[index].sinks:
            gone = sink.positions[np.asarray(units, dtype=np.int64)].ravel()
            if gone.size:
                places.setdefault((sink.node, sink.data_input, sink.axis), []).append(gone)
    namer = Namer(copy)
    for (name, data_input, axis), parts in places.items():
        _insert_mask(copy, nodes[name], data_input, axis, np.concatenate(parts), coupling, namer)
    mask_ports(copy, coupling, _masks(coupling, removed))
    return copy


def _insert_mask(
    model: ir.Model,
    node: ir.Node,
    data_input: int,
    axis: int,
    gone: npt.NDArray[np.int64],
    coupling: Coupling,
    namer: Namer,
) -> None:
    value = node.inputs[data_input]
    graph = node.graph
    # All inputs of a contraction have one type; shape inference may have lost that of one.
    dtype = next((v.dtype for v in node.inputs if v is not None and v.dtype is not None), None)
    if value is None or dtype is None or not isinstance(graph, ir.Graph):
        raise ModelError(f"{node.op_type} '{node.name}': input {data_input} has no element type")
    axes = coupling.axes[_original(value)]
    units = axes[axis]
    if units is None:
        raise ModelError(
            f"{node.op_type} '{node.name}': axis {axis} of input {data_input} has no units"
        )
    shape = [1] * len(axes)
    shape[axis] = len(units)
    kept = np.ones(len(units), dtype=np.bool_)
    kept[gone] = False
    condition = set_initializer(
        model.graph, namer.value(f"{node.name}/mask_kept"), kept.reshape(shape)
    )
    zero = set_initializer(
        model.graph, namer.value(f"{node.name}/mask_zero"), np.zeros((), dtype=dtype.numpy())
    )
    where = ir.Node("", "Where", [condition, value, zero], name=namer.node(f"{node.name}/mask"))
    output = where.outputs[0]
    output.name = namer.value(f"{where.name}_output")
    output.type, output.shape = value.type, value.shape
    output.meta["mask_of"] = _original(value)
    graph.insert_before(node, where)
    node.replace_input_with(data_input, output)


def _original(value: ir.Value) -> str:
    """Name of the value that a chain of masks started from."""
    return str(value.meta.get("mask_of", value.name or ""))


# --- removal -------------------------------------------------------------------------------


def remove(model: ir.Model, coupling: Coupling, removed: Mapping[int, Units]) -> None:
    """Remove units in place; node names and the names of surviving values stay.

    Args:
        model: The model that was analysed. Weight values may have changed since, the graph not.
        coupling: Its coupling.
        removed: Group index to unit numbers.

    Raises:
        UsageError: If a group would lose its last unit and cannot do without.
        ModelError: If the model is not the one that was analysed.
    """
    emptied = whole(coupling, removed)
    if emptied:
        try:
            coupling = hollow(model, coupling, emptied)
        except RefusedError as error:
            group = coupling.groups[emptied[0]]
            raise UsageError(
                f"group {group.index} ('{group.name}') would lose all of its {group.size} units: "
                f"{error}",
                hint="At least one unit has to stay.",
            ) from error
    masks: Masks = _masks(coupling, removed)
    if not masks:
        return
    nodes = list(model.graph.all_nodes())
    masks = open_ports(model, coupling, masks)
    namer = Namer(model)
    for node in nodes:
        rule = rule_of(node)
        if rule is None or rule.shrink is None:
            continue
        if any(v is not None and v.name in masks for v in (*node.inputs, *node.outputs)):
            rule.shrink(Shrink(model, node, masks, namer))
    for graph in model.graphs():
        _cut_initializers(graph, masks)
    _resize_values(model, masks)
    _infer_again(model)


def _masks(coupling: Coupling, removed: Mapping[int, Units]) -> Masks:
    """Survivors on every axis that loses positions."""
    kept = coupling.kept(removed)
    known: dict[int, npt.NDArray[np.bool_] | None] = {}
    masks: dict[str, tuple[npt.NDArray[np.bool_] | None, ...]] = {}
    for name, axes in coupling.axes.items():
        found: list[npt.NDArray[np.bool_] | None] = []
        for units in axes:
            if units is not None and id(units) not in known:
                staying = (units < 0) | kept[units]
                known[id(units)] = None if staying.all() else staying
            found.append(None if units is None else known[id(units)])
        if any(m is not None for m in found):
            masks[name] = tuple(found)
    return masks


def _cut_initializers(graph: ir.Graph, masks: Masks) -> None:
    for name in list(graph.initializers):
        axes = masks.get(name)
        if axes is None:
            continue
        array = constant_of(graph.initializers[name])
        if array is None or array.ndim != len(axes):
            raise ModelError(f"initializer '{name}' is not the one that was analysed")
        dtype = graph.initializers[name].dtype
        for axis, kept in enumerate(axes):
            if kept is None:
                continue
            if len(kept) != array.shape[axis]:
                raise ModelError(
                    f"initializer '{name}' has {array.shape[axis]} entries on axis {axis} "
                    f"and had {len(kept)} when it was analysed"
                )
            array = np.compress(kept, array, axis=axis)
        set_initializer(graph, name, np.ascontiguousarray(array), dtype=dtype)


def _resize_values(model: ir.Model, masks: Masks) -> None:
    """Recorded shapes follow at once, for what shape inference will not find."""
    for node in model.graph.all_nodes():
        for output in node.outputs:
            axes = masks.get(output.name or "")
            if axes is None or output.shape is None or len(output.shape) != len(axes):
                continue
            output.shape = ir.Shape(
                [
                    d if kept is None else int(kept.sum())
                    for d, kept in zip(output.shape, axes, strict=True)
                ]
            )


def _infer_again(model: ir.Model) -> None:
    """Infer shapes; what inference loses (GroupNormalization, for one) keeps its record."""
    recorded = {o: (o.type, o.shape) for n in model.graph.all_nodes() for o in n.outputs}
    model_io.infer_shapes(model)
    for value, (kind, shape) in recorded.items():
        if value.type is None:
            value.type = kind
        if value.shape is None:
            value.shape = shape
