"""Take out of a graph what emptied groups leave without use.

Layers that lost all inputs become the constants that they answer
(:mod:`onnxcompress.graph.emptying`). A constant that is added is put into the bias it meets first
on the way up, as long as nothing else reads what lies between; a constant of zeros is not added at
all. The second of two Relu that then follow each other goes too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.answers import STANDARD, answer, evaluate
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.graph.coupling import Coupling, Units
from onnxcompress.graph.emptying import Emptied, Emptying
from onnxcompress.graph.naming import Namer

Array = npt.NDArray[np.generic]


def hollow(model: ir.Model, coupling: Coupling, groups: Iterable[int]) -> Coupling:
    """Take out, in place, all that nothing needs once ``groups`` are emptied.

    Args:
        model: The model that was analysed; nothing has been cut yet.
        coupling: Its coupling.
        groups: The groups that lose all units.

    Returns:
        The coupling, with entries for the constants that were added.

    Raises:
        RefusedError: If the groups cannot be emptied.
    """
    emptied = Emptying(model, coupling).of(groups)
    nodes = {n.name or "": n for n in model.graph}
    _shorten_concats(coupling, emptied, nodes.values(), frozenset(groups))
    arrays = constants_of(emptied, nodes.values())
    namer = Namer(model)
    axes = dict(coupling.axes)
    joins = [n for n in model.graph if n.name in emptied.joins]
    for value in [v for n in nodes.values() for v in n.outputs if v.name in arrays]:
        readers = [(u.node, u.idx) for u in value.uses() if u.node.name in emptied.joins]
        if not readers:
            continue
        array = arrays[value.name or ""]
        name = namer.value(f"{value.name}/prune_constant")
        constant = set_initializer(model.graph, name, array)
        known = coupling.axes.get(value.name or "")
        if known is not None:
            axes[name] = _axes(array, known)
        for node, index in readers:
            node.replace_input_with(index, constant)
    made = set(emptied.constants)
    gone = [n for n in nodes.values() if n.name in emptied.dead or n.outputs[0].name in made]
    for node in joins:
        gone.extend(_settled(coupling, node, frozenset(gone)))
    _remove(model.graph, gone)
    return dataclasses.replace(coupling, axes=axes)


def constants_of(emptied: Emptied, nodes: Iterable[ir.Node]) -> dict[str, Array]:
    """The constants by the name of their value, from today's biases.

    Args:
        emptied: What becomes of the graph.
        nodes: Its nodes, in topological order.
    """
    found: dict[str, Array] = {}
    wanted = set(emptied.constants)
    for node in nodes:
        name = node.outputs[0].name or ""
        if name not in wanted:
            continue
        if node.name in emptied.layers:
            answered = answer(node)
            assert answered is not None  # noqa: S101 - what has no answer is refused
            found[name] = answered[0]
            continue
        inputs = []
        for value in node.inputs:
            array = None if value is None else found.get(value.name or "", constant_of(value))
            if array is not None:
                inputs.append(array)
        found[name] = evaluate(node, inputs)
    return found


def absorber(
    coupling: Coupling, value: ir.Value, axis: int, length: int, dead: Collection[str]
) -> ir.Value | None:
    """The stored vector to which a constant can be added instead of to ``value``.

    Args:
        coupling: Of the model.
        value: What the constant, of one number per channel, is added to.
        axis: Axis of ``value`` that the channels are on.
        length: Number of channels.
        dead: Names of nodes that do not count as readers.
    """
    readers = [u for u in value.uses() if u.node.name not in dead]
    node = value.producer()
    if len(readers) != 1 or value.is_graph_output() or node is None or value.shape is None:
        return None
    if node.domain not in STANDARD:
        return None
    for vector in _vectors(node, axis, len(value.shape)):
        array = constant_of(vector)
        if array is None or not vector.is_initializer() or len(list(vector.uses())) != 1:
            continue
        if array.size == length and array.shape[-1 if array.ndim == 1 else axis] == length:
            return vector
    if node.op_type != "Add":
        return None
    for other in node.inputs:
        if other is not None and coupling.same_shape(other, value):
            found = absorber(coupling, other, axis, length, dead)
            if found is not None:
                return found
    return None


def _vectors(node: ir.Node, axis: int, rank: int) -> Iterator[ir.Value]:
    """What a node adds to its output along ``axis``."""
    third = node.inputs[2] if len(node.inputs) > 2 else None
    last = axis == rank - 1
    fits = {
        "Conv": axis == 1,
        "ConvTranspose": axis == 1,
        "Gemm": last and node.attributes.get_float("beta", 1.0) == 1.0,
        "LayerNormalization": last and node.attributes.get_int("axis", -1) in {-1, rank - 1},
    }
    if fits.get(node.op_type) and third is not None:
        yield third
    elif node.op_type == "Add":
        for value in node.inputs:
            shape = None if value is None else value.shape
            if value is None or shape is None:
                continue
            if (len(shape) == rank) or (len(shape) == 1 and last):
                yield value


def _axes(array: Array, axes: tuple[Units | None, ...]) -> tuple[Units | None, ...]:
    """The units of a constant: those of the value that it stands for, where it is as long."""
    return tuple(
        units if units is not None and array.shape[i] == len(units) else None
        for i, units in enumerate(axes)
    )


def _shorten_concats(
    coupling: Coupling, emptied: Emptied, nodes: Iterable[ir.Node], groups: frozenset[int]
) -> None:
    kept = coupling.kept({g: np.arange(coupling.groups[g].size) for g in groups})
    for node in nodes:
        if node.op_type != "Concat" or node.name in emptied.dead:
            continue
        stay = [
            v
            for v in node.inputs
            if v is None
            or not any(
                units is not None and not ((units < 0) | kept[units]).any()
                for units in coupling.axes.get(v.name or "", ())
            )
        ]
        if len(stay) < len(node.inputs):
            for index, value in enumerate(stay):
                node.replace_input_with(index, value)
            node.resize_inputs(len(stay))


def _settled(coupling: Coupling, node: ir.Node, gone: Collection[ir.Node]) -> list[ir.Node]:
    """The nodes that are needless once the constant of a join is put where it belongs."""
    output = node.outputs[0]
    if node.op_type != "Add" or output.is_graph_output():
        return []
    left, right = node.inputs
    constant, value = (right, left) if constant_of(right) is not None else (left, right)
    array = constant_of(constant)
    if array is None or value is None or not coupling.same_shape(value, output):
        return []
    if np.any(array) and not _absorbed(coupling, value, array, {n.name or "" for n in gone}):
        return []
    ir.convenience.replace_all_uses_with(output, value)
    needless = [node]
    above = value.producer()
    if above is not None and above.op_type == "Relu" and above.domain in STANDARD:
        for use in list(value.uses()):
            second = use.node
            if second.op_type != "Relu" or second.domain not in STANDARD or second in gone:
                continue
            if not second.outputs[0].is_graph_output():
                ir.convenience.replace_all_uses_with(second.outputs[0], value)
                needless.append(second)
    return needless


def _absorbed(coupling: Coupling, value: ir.Value, array: Array, dead: Collection[str]) -> bool:
    """Put a constant that is added to ``value`` into a vector that is added before."""
    long = [i for i, length in enumerate(array.shape) if length != 1]
    if len(long) != 1 or value.shape is None or array.ndim != len(value.shape):
        return False
    vector = absorber(coupling, value, long[0], array.size, dead)
    stored = constant_of(vector)
    if vector is None or stored is None or vector.graph is None or vector.name is None:
        return False
    total = stored + array.reshape(stored.shape).astype(stored.dtype)
    set_initializer(vector.graph, vector.name, total)
    return True


def _remove(graph: ir.Graph, gone: Iterable[ir.Node]) -> None:
    """Remove nodes, and the initializers that only they read."""
    nodes = list(dict.fromkeys(gone))
    read = {v for n in nodes for v in n.inputs if v is not None and v.is_initializer()}
    for node in nodes:
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
    graph.remove(nodes)
    for value in read:
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            name = value.name or ""
            if graph.initializers.get(name) is value:
                del graph.initializers[name]
