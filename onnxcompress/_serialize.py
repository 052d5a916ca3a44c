"""From :class:`onnx_ir.Model` to protobuf, without copying weights that are on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from onnxcompress.errors import ModelError

IN_MEMORY_BYTES = 256 * 2**20
"""Tensors in memory above this total go to a session through a file, not through a message."""

ONE_FILE_BYTES = 1_900_000_000
"""Above this, weights go to a file of their own: a protobuf message ends at 2**31 - 1 bytes."""

SMALL_BYTES = 1024
"""Tensors below this stay inside the message when the others are written to a file."""

ALIGNMENT = 4096
"""Offsets of external tensors of a page or more are multiples of it, so that they can be mapped."""


def initializers(model: ir.Model) -> Iterator[ir.Value]:
    """Every initializer of the graph and of its subgraphs."""
    for graph in model.graphs():
        yield from graph.initializers.values()


def tensor_bytes(model: ir.Model, *, external: bool = False) -> int:
    """Total size of the initializers in bytes.

    Args:
        model: The model.
        external: Also count the tensors that are in external files.
    """
    total = 0
    for value in initializers(model):
        tensor = value.const_value
        if tensor is not None and (external or not isinstance(tensor, ir.ExternalTensor)):
            total += tensor.nbytes
    return total


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Serialize; external tensors stay references.

    Undoes what onnx_ir 1.1 does to tensors that came from protobuf: it writes their metadata twice,
    and types of initializers again, which the tensors tell.

    Raises:
        ModelError: If something in the model cannot be written, such as a name that is not UTF-8.
    """
    try:
        proto = ir.to_proto(model)
    except ir.serde.SerdeError as error:
        raise ModelError(f"the graph cannot be serialized: {root_cause(error)}") from error
    for graph in _graph_protos(proto.graph):
        for tensor in graph.initializer:
            dedupe_metadata(tensor)
        stored = {tensor.name for tensor in graph.initializer}
        others = [info for info in graph.value_info if info.name not in stored]
        if len(others) < len(graph.value_info):
            del graph.value_info[:]
            graph.value_info.extend(others)
    return proto


def to_small_proto(model: ir.Model) -> onnx.ModelProto:
    """Serialize with every initializer of a kilobyte or more as a reference to no file.

    For analyses that read shapes and small constants only; it works at any size of the model.
    """
    copy = model.clone()
    for value in initializers(copy):
        tensor = value.const_value
        if tensor is None or tensor.nbytes < SMALL_BYTES or tensor.dtype == ir.DataType.STRING:
            continue
        value.const_value = ir.ExternalTensor(
            "absent",
            0,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=value.name or "",
        )
    return to_proto(copy)


def root_cause(error: BaseException) -> BaseException:
    """The first exception of a chain; onnx_ir wraps errors once per level of the graph."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def dedupe_metadata(tensor: onnx.TensorProto) -> None:
    """Keep the last entry of every metadata key."""
    if len(tensor.metadata_props) < 2:
        return
    unique = {entry.key: entry.value for entry in tensor.metadata_props}
    del tensor.metadata_props[:]
    for key, value in unique.items():
        tensor.metadata_props.add(key=key, value=value)


def _graph_protos(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graph_protos(attribute.g)
            for inner in attribute.graphs:
                yield from _graph_protos(inner)


def external_paths(model: ir.Model) -> set[Path]:
    """The files that tensors are mapped from, links resolved."""
    return {
        Path(os.path.realpath(value.const_value.path))
        for value in initializers(model)
        if isinstance(value.const_value, ir.ExternalTensor)
    }


def write_tensors(
    model: ir.Model, path: Path, *, location: str, base_dir: Path, threshold: int = SMALL_BYTES
) -> None:
    """Write every initializer of at least ``threshold`` bytes to one file and refer to it.

    Changes ``model`` (give a clone): its initializers become external tensors.

    Args:
        model: The model whose tensors are replaced.
        path: The file to write, opened for writing in binary mode.
        location: Name of the file in the references.
        base_dir: Folder of the file in the references.
        threshold: Smaller tensors stay inside the model.
    """
    with path.open("r+b" if path.exists() else "wb") as file:
        offset = 0
        for value in initializers(model):
            tensor = value.const_value
            if tensor is None or tensor.nbytes < threshold or tensor.dtype == ir.DataType.STRING:
                continue
            if tensor.nbytes >= ALIGNMENT:
                offset = -(-offset // ALIGNMENT) * ALIGNMENT
            file.seek(offset)
            if isinstance(tensor, ir.ExternalTensor):
                tensor.tofile(file)  # From file to file inside the kernel, where it can.
            else:
                file.write(tensor.tobytes())
            value.const_value = ir.ExternalTensor(
                location,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                doc_string=tensor.doc_string,
                metadata_props=dict(tensor.metadata_props) or None,
                base_dir=base_dir,
            )
            offset += tensor.nbytes


def relocate_external(
    model: ir.Model, work_dir: Path | None
) -> tuple[onnx.ModelProto, Path | None]:
    """Serialize for a session: every external reference relative to one common folder.

    Args:
        model: The model; not changed.
        work_dir: Where to put tensors that are in memory; None leaves them in the message.

    Returns:
        The message and the folder its external references start from (None when it has none).
    """
    if work_dir is None and not any(
        isinstance(v.const_value, ir.ExternalTensor) for v in initializers(model)
    ):
        return to_proto(model), None
    copy = model.clone()
    if work_dir is not None:
        write_tensors_in_memory(copy, work_dir)
    external = [v for v in initializers(copy) if isinstance(v.const_value, ir.ExternalTensor)]
    if not external:
        return to_proto(copy), None
    folder = os.path.commonpath([path.parent for path in external_paths(copy)])
    for value in external:
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                os.path.relpath(os.path.realpath(tensor.path), folder),
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=folder,
            )
    return to_proto(copy), Path(folder)


def write_tensors_in_memory(model: ir.Model, folder: Path) -> None:
    """Move the tensors of ``model`` that are in memory to a file in ``folder`` (give a clone)."""
    path = folder / "tensors.bin"
    kept = {
        v: v.const_value
        for v in initializers(model)
        if isinstance(v.const_value, ir.ExternalTensor)
    }
    for value in kept:
        value.const_value = None
    write_tensors(model, path, location=path.name, base_dir=folder)
    for value, tensor in kept.items():
        value.const_value = tensor
