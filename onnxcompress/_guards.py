"""What a model file must pass before onnx_ir sees it.

onnx_ir 1.1 drops sparse initializers and training information without a word, and checks neither
the size of tensors nor the wiring of the graph. All of it is looked at here, on the protobuf
message.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnxcompress._serialize import dedupe_metadata
from onnxcompress.errors import ModelError

_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"version https://git-lfs", "a Git LFS pointer (run: git lfs pull)"),
    (0, b"PK\x03\x04", "a zip archive, such as a PyTorch .pt, a Keras .keras or an .npz file"),
    (0, b"\x80\x02", "a Python pickle, such as an old PyTorch file"),
    (0, b"\x89HDF", "an HDF5 file, such as a Keras .h5 model"),
    (0, b"\x1f\x8b", "gzip-compressed (unpack it first)"),
    (0, b"<", "an HTML or XML document, such as an error page saved as a model"),
    (0, b"{", "a JSON document"),
    (0, b"\x93NUMPY", "a numpy array"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (4, b"ORTM", "an onnxruntime .ort model (use the .onnx model that it was made from)"),
)


def what_it_is(head: bytes) -> str | None:
    """Name the format of a file that is not ONNX from its first bytes; None when unknown."""
    return next((name for at, magic, name in _MAGIC if head[at:].startswith(magic)), None)


def graph_protos(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The graph and every subgraph; those inside functions too."""
    yield from _graphs_of(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _subgraphs(node)


def _graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        yield from _subgraphs(node)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield from _graphs_of(attribute.g)
        for graph in attribute.graphs:
            yield from _graphs_of(graph)


def tensor_protos(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every dense tensor: initializers and attributes, in subgraphs and functions too."""
    for graph in graph_protos(model):
        yield from graph.initializer
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in graph_protos(model):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def refuse_training(model: onnx.ModelProto) -> None:
    """Refuse training information.

    Raises:
        ModelError: If the model carries a training graph.
    """
    if model.training_info:
        raise ModelError(
            "the model carries training information (training_info), which would be lost",
            hint="Export it for inference.",
        )


def densify(model: onnx.ModelProto) -> int:
    """Turn sparse initializers and sparse constants into dense ones, in place.

    Returns:
        How many there were.

    Raises:
        ModelError: If the indices of a sparse tensor do not fit its shape.
    """
    count = 0
    for graph in graph_protos(model):
        for sparse in graph.sparse_initializer:
            graph.initializer.append(_dense(sparse))
            count += 1
        del graph.sparse_initializer[:]
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.name == "sparse_value" and attribute.HasField("sparse_tensor"):
                dense = _dense(attribute.sparse_tensor)
                attribute.CopyFrom(onnx.helper.make_attribute("value", dense))
                count += 1
    return count


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    """``indices`` is [n] of linear positions or [n, rank] of coordinates; ``values`` is [n]."""
    shape = tuple(sparse.dims)
    name = sparse.values.name
    try:
        values: npt.NDArray[np.generic] = onnx.numpy_helper.to_array(sparse.values)
        indices = onnx.numpy_helper.to_array(sparse.indices).astype(np.int64)
        linear = indices if indices.ndim < 2 else np.ravel_multi_index(tuple(indices.T), shape)
        if np.any(linear < 0):
            raise IndexError("an index is negative")
        flat = np.zeros(math.prod(shape), dtype=values.dtype)
        flat[linear] = values
    except (ValueError, IndexError, TypeError, MemoryError) as error:
        raise ModelError(
            f"sparse tensor '{name}' of shape {list(shape)} cannot be read: {error}"
        ) from error
    dense: onnx.TensorProto = onnx.numpy_helper.from_array(flat.reshape(shape), name)
    return dense


def free_negative_dimensions(model: onnx.ModelProto) -> None:
    """Make dimensions of a negative length dynamic, which is what exporters mean by -1, in place.

    Shape inference takes them for lengths, and wrong shapes follow that onnxruntime refuses.
    """
    for graph in graph_protos(model):
        for info in (*graph.input, *graph.output, *graph.value_info):
            for dimension in info.type.tensor_type.shape.dim:
                if dimension.HasField("dim_value") and dimension.dim_value < 0:
                    dimension.ClearField("dim_value")


def check_tensors(model: onnx.ModelProto, path: Path) -> None:
    """Check the size of all tensors and where external ones lie; dedupe their metadata.

    Args:
        model: The message.
        path: The model's file; links among the locations are resolved in ``model``.

    Raises:
        ModelError: If a tensor's data is missing, too short, or outside of the model's folder.
    """
    for tensor in tensor_protos(model):
        dedupe_metadata(tensor)
        label = f"tensor '{tensor.name}' {_describe(tensor)}"
        needed = _byte_size(tensor, label)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(tensor, path, label, needed)
        elif tensor.HasField("raw_data") and needed is not None and len(tensor.raw_data) != needed:
            raise ModelError(
                f"{label} needs {needed} bytes and has {len(tensor.raw_data)}",
                hint="The file is damaged; export the model again.",
            )


def _describe(tensor: onnx.TensorProto) -> str:
    names = onnx.TensorProto.DataType
    known = tensor.data_type in names.values()
    kind = names.Name(tensor.data_type).lower() if known else f"type {tensor.data_type}"
    return f"{kind}{list(tensor.dims)}"


def _byte_size(tensor: onnx.TensorProto, label: str) -> int | None:
    """Bytes of raw data; None for strings."""
    if tensor.data_type == onnx.TensorProto.STRING:
        return None
    if any(d < 0 for d in tensor.dims):
        raise ModelError(f"{label} has a negative dimension")
    try:
        bits: int = ir.DataType(tensor.data_type).bitwidth
    except (ValueError, TypeError) as error:
        raise ModelError(f"{label} is of an element type that is not supported") from error
    return -(-int(math.prod(tensor.dims)) * bits // 8)


def _check_external(tensor: onnx.TensorProto, model: Path, label: str, needed: int | None) -> None:
    """Check one external tensor; point its location to the file behind any links."""
    fields = {entry.key: entry.value for entry in tensor.external_data}
    location = fields.get("location", "")
    folder = Path(os.path.realpath(model)).parent
    path = Path(os.path.realpath(model.parent / location)) if "\0" not in location else folder
    refusal = _why_refused(location, path, folder)
    if refusal and model.is_symlink() and (folder / location).is_file() and not path.exists():
        raise ModelError(
            f"{label} is stored in '{location}', which is not beside the link '{model}'",
            hint=f"Name the file that it leads to: {os.path.realpath(model)}",
        )
    if refusal:
        raise ModelError(
            f"{label} is stored in '{location}', {refusal}; it is not read, because a model from "
            "elsewhere could make any file of this machine part of a result",
            hint="Put the model and a copy of the data file (no link) into one folder.",
        )
    if not path.is_file():
        raise ModelError(
            f"the external data file '{model.parent / location}' of {label} is missing",
            hint="Put it beside the model; models over 2 GB are two files or more.",
        )
    if path.stat().st_nlink > 1:
        raise ModelError(
            f"the external data file '{path}' of {label} has several hard links, which onnx_ir "
            "refuses to read",
            hint="Replace it by a copy of its own (cp FILE COPY; mv COPY FILE).",
        )
    try:
        offset, length = int(fields.get("offset", "0")), int(fields.get("length", needed or 0))
    except ValueError as error:
        raise ModelError(f"{label} has an external offset or length that is no number") from error
    if offset < 0 or (needed is not None and length != needed):
        raise ModelError(f"{label} needs {needed} bytes, its reference says {length} at {offset}")
    if offset + length > path.stat().st_size:
        raise ModelError(
            f"the external data file '{path}' is too short: {label} ends at byte {offset + length} "
            f"and the file at {path.stat().st_size}",
            hint="The file is truncated or belongs to another model; copy it again.",
        )
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = str(path.relative_to(folder))


def _why_refused(location: str, path: Path, folder: Path) -> str | None:
    """Why a location is not read; None when it leads to a file inside of ``folder``.

    Args:
        location: As the model gives it.
        path: Where it leads, links resolved.
        folder: Of the model, links resolved. onnxruntime draws the line there, too.
    """
    if not location or "\0" in location:
        return "which is no file name"
    if Path(location).is_absolute() or "\\" in location:
        return "which is an absolute path or holds a backslash"
    if ".." in Path(location).parts:
        return "which leads out of the model's folder by '..'"
    if not path.is_relative_to(folder):
        return f"which leads to '{path}', out of the model's folder '{folder}', by a symbolic link"
    return None


def check_wiring(graph: onnx.GraphProto, outer: frozenset[str] = frozenset()) -> None:
    """Check that every value is defined once and that nodes do not wait for each other.

    Nodes may come in any order, as long as there is one in which they can run.

    Args:
        graph: The graph; its subgraphs are checked too.
        outer: Values of the graphs around it.

    Raises:
        ModelError: With the nodes and values concerned.
    """
    maker: dict[str, int] = {}
    given = _boundary_names(graph)
    for index, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name in maker or name in given:
                first = _label(graph.node[maker[name]]) if name in maker else "the graph's inputs"
                raise ModelError(
                    f"value '{name}' is defined twice, by {first} and by {_label(node)} "
                    "(a graph must be in single static assignment form)"
                )
            maker[name] = index
    visible = outer | given | maker.keys()
    waits_for: list[set[int]] = []
    for node in graph.node:
        for graph_of_node in _direct_subgraphs(node):
            check_wiring(graph_of_node, visible)
        read = set(filter(None, node.input)) | _captured(node)
        for name in filter(None, node.input):
            if name not in visible:
                raise ModelError(f"{_label(node)} reads the value '{name}', which nothing defines")
        waits_for.append({maker[name] for name in read if name in maker})
    for output in graph.output:
        if output.name not in visible:
            raise ModelError(f"graph output '{output.name}' is defined by nothing")
    _refuse_cycle(graph.node, waits_for)


def _boundary_names(graph: onnx.GraphProto) -> set[str]:
    names: set[str] = set()
    for kind, items in (("input", graph.input), ("initializer", graph.initializer)):
        own: set[str] = set()
        for item in items:
            if item.name in own:
                raise ModelError(f"the graph has two {kind}s named '{item.name}'")
            own.add(item.name)
        names |= own
    return names


def _label(node: onnx.NodeProto) -> str:
    return f"{node.op_type} node '{node.name or (node.output[0] if node.output else '')}'"


def _direct_subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _captured(node: onnx.NodeProto) -> set[str]:
    """Names that the subgraphs of a node read from outside."""
    names: set[str] = set()
    for graph in _direct_subgraphs(node):
        own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
        read: set[str] = {o.name for o in graph.output}
        for inner in graph.node:
            own.update(inner.output)
            read.update(inner.input)
            read |= _captured(inner)
        names |= read - own
    return names


def _refuse_cycle(nodes: Sequence[onnx.NodeProto], waits_for: list[set[int]]) -> None:
    """Kahn's algorithm; what it cannot order holds a cycle."""
    users: list[list[int]] = [[] for _ in nodes]
    missing = [len(needs) for needs in waits_for]
    for index, needs in enumerate(waits_for):
        for need in needs:
            users[need].append(index)
    ready = [index for index, count in enumerate(missing) if count == 0]
    done = 0
    while ready:
        done += 1
        for user in users[ready.pop()]:
            missing[user] -= 1
            if missing[user] == 0:
                ready.append(user)
    if done == len(nodes):
        return
    node = next(index for index, count in enumerate(missing) if count)
    path: list[int] = []
    while node not in path:
        path.append(node)
        node = next(need for need in waits_for[node] if missing[need])
    cycle = [*path[path.index(node) :], node]
    shown = " <- ".join(_label(nodes[index]) for index in cycle[:6])
    raise ModelError(f"the graph is cyclic: {shown}{' <- ...' if len(cycle) > 6 else ''}")
