"""Read and write the constants of a graph as numpy arrays."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.errors import ModelError
from onnxcompress.graph.naming import fresh_name

Array = npt.NDArray[np.generic]


def constant_of(value: ir.Value | None) -> Array | None:
    """The array behind ``value`` if it is the same on every run, else None.

    An initializer that is also a graph input can be replaced by the caller, so it is no constant.
    The array may be a read-only view of a memory-mapped file: copy it before writing to it.

    Args:
        value: An initializer or the output of a ``Constant`` node; None (an absent input) gives
            None.
    """
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.numpy()


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """As :func:`constant_of`, without reading the data: for dtype, shape and size."""
    return None if value is None or value.is_graph_input() else stored_tensor(value)


def stored_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """The data that the model holds for ``value``, even if callers can replace it by an input."""
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain:
        return None
    attribute = node.attributes.get("value")
    if attribute is not None and not attribute.is_ref():
        return attribute.as_tensor()
    return ir.convenience.get_const_tensor(value)


def is_constant(value: ir.Value | None) -> bool:
    """Whether :func:`constant_of` gives an array; reads no data."""
    return constant_tensor(value) is not None


def scalar_of(value: ir.Value | None) -> float | None:
    """The number behind a constant of exactly one element (any rank), else None."""
    tensor = constant_tensor(value)
    if tensor is None or tensor.size != 1 or tensor.dtype == ir.DataType.STRING:
        return None
    return float(tensor.numpy().reshape(()).astype(np.float64))


def initializers(model: ir.Model) -> Iterator[tuple[str, ir.Value]]:
    """Names and values of all initializers, also in the branches of If and the bodies of loops.

    In a normalized model names are unique over all graphs.
    """
    for graph in model.graphs():
        yield from graph.initializers.items()


def initializer(model: ir.Model, name: str) -> ir.Value | None:
    """The initializer ``name`` of whichever graph has it."""
    for graph in model.graphs():
        if name in graph.initializers:
            return graph.initializers[name]
    return None


def set_initializer(
    graph: ir.Graph, name: str, array: Array, *, dtype: ir.DataType | None = None
) -> ir.Value:
    """Give the initializer ``name`` of ``graph`` new data; type and shape follow the array.

    Every use keeps the same :class:`onnx_ir.Value`. If there is no such initializer, it is made.

    Args:
        graph: The graph that owns the initializer.
        name: Its name.
        array: The new data.
        dtype: Element type, needed only where numpy cannot tell (4-bit types, unpacked).

    Returns:
        The initializer's value.

    Raises:
        ModelError: If ``name`` is taken by a value of ``graph`` that is no initializer.
    """
    data = np.asarray(array, order="C")
    tensor = ir.Tensor(data, dtype=dtype, name=name)
    value = graph.initializers.get(name)
    if value is not None:
        value.const_value = tensor
        value.type = ir.TensorType(tensor.dtype)
        value.shape = ir.Shape(tensor.shape)
        return value
    if any(v.name == name for v in graph.inputs) or any(
        output.name == name for node in graph for output in node.outputs
    ):
        raise ModelError(
            f"cannot add the initializer '{name}': the graph has another value of that name",
            hint="Take the name from onnxcompress.graph.naming.fresh_name.",
        )
    value = ir.Value(
        name=name,
        shape=ir.Shape(tensor.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def add_initializer(
    model: ir.Model, name: str, array: Array, *, dtype: ir.DataType | None = None
) -> ir.Value:
    """Add an initializer to the main graph, ``name`` with ``_1``, ``_2``, ... where it is taken.

    Args:
        model: The model to add to.
        name: The wanted name, ``<original>/<pass>_<role>``.
        array: Its data.
        dtype: Element type, needed only where numpy cannot tell (4-bit types, unpacked).
    """
    return set_initializer(model.graph, fresh_name(model, name), array, dtype=dtype)
