"""Load and save models; the one door between files and the graph.

The graph is an :class:`onnx_ir.Model`: weights in external files stay on disk, memory mapped, from
loading to saving. ``_guards`` makes up for what onnx_ir does not check (docs/adr/0001-onnx-ir.md).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]

from onnxcompress import _guards
from onnxcompress._atomic import replacing
from onnxcompress._files import FileSizes, external_files, file_sizes, sha256
from onnxcompress._normalize import (
    check,
    infer_shapes,
    inline,
    ir_version_for,
    name_nodes,
    normalize,
)
from onnxcompress._serialize import (
    ONE_FILE_BYTES,
    external_paths,
    initializers,
    root_cause,
    tensor_bytes,
    to_proto,
    to_small_proto,
    write_tensors,
)
from onnxcompress._value_info import drop_inferable
from onnxcompress.errors import ModelError, OutputError
from onnxcompress.graph.naming import shorten
from onnxcompress.opset import OLDEST
from onnxcompress.runtime import MAX_IR_VERSION, reads_opset

__all__ = [
    "FileSizes",
    "check",
    "clone",
    "external_files",
    "file_sizes",
    "infer_shapes",
    "inline",
    "load",
    "name_nodes",
    "normalize",
    "save",
    "sha256",
]

_MESSAGE_BYTES = 2**31 - 1


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Load a model; external data stays on disk, memory mapped.

    Sparse initializers become dense. Every node gets a unique name that is not empty, in subgraphs
    too. Nodes are put into an order in which they can run. Operators of custom domains are kept.

    Args:
        path: A file in ONNX's binary format, whatever its extension.

    Raises:
        ModelError: If the file is missing, is not ONNX, is damaged, is too new or too old for the
            installed onnxruntime, is not a valid graph, carries training information, or keeps
            data outside of its folder.
    """
    path = Path(path)
    proto = _read(path)
    try:
        _check_versions(proto)
        if not proto.graph.output:
            raise ModelError("the graph has no outputs", hint="Export the model again.")
        _guards.refuse_training(proto)
        _guards.check_tensors(proto, path)
        _guards.densify(proto)
        _guards.free_negative_dimensions(proto)
        _guards.check_wiring(proto.graph)
        return _to_ir(proto, Path(os.path.realpath(path)).parent)
    except ModelError as error:
        raise ModelError(f"{path}: {error.message}", hint=error.hint) from error


def _read(path: Path) -> onnx.ModelProto:
    if path.is_dir():
        raise ModelError(f"'{path}' is a folder, not a model file", hint=_models_in(path))
    try:
        if path.exists() and not path.is_file():  # a pipe is read only once, a device never ends
            raise ModelError(f"'{path}' is not a regular file", hint="Save the model to a file.")
        size = path.stat().st_size
        if size > _MESSAGE_BYTES:
            raise ModelError(
                f"'{path}' has {size} bytes; an ONNX file ends at {_MESSAGE_BYTES} bytes",
                hint="Save larger models with external data (onnx.save, save_as_external_data).",
            )
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ModelError(f"there is no file '{path}'") from error
    except OSError as error:
        raise ModelError(f"cannot read '{path}': {error.strerror or error}") from error
    if not data:
        raise ModelError(f"'{path}' is empty", hint="It was not fully written; export it again.")
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise _not_onnx(path, data) from error
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise _not_onnx(path, data)
    return proto


def _not_onnx(path: Path, data: bytes) -> ModelError:
    other = _guards.what_it_is(data[:64])
    if other:
        return ModelError(
            f"'{path}' is {other}, not an ONNX model", hint="Export the model to ONNX first."
        )
    return ModelError(
        f"'{path}' is not an ONNX model, or is truncated ({len(data)} bytes)",
        hint="Compare its size with the original, or export it again.",
    )


def _models_in(folder: Path) -> str:
    names = sorted(p.name for p in folder.glob("*.onnx"))
    return f"It holds {', '.join(names[:5])}." if names else "It holds no .onnx file."


def _check_versions(proto: onnx.ModelProto) -> None:
    runtime = f"onnxruntime {onnxruntime.__version__}"
    if proto.ir_version > MAX_IR_VERSION:
        raise ModelError(
            f"its IR version is {proto.ir_version} and {runtime} reads up to {MAX_IR_VERSION}",
            hint="Export with a lower ir_version (a field of the model), or update onnxruntime.",
        )
    if proto.ir_version < 3:
        raise ModelError(
            f"its IR version is {proto.ir_version}; versions before 3 say no operator set",
            hint="Export the model again with a newer exporter.",
        )
    versions = {_domain(o.domain): o.version for o in proto.opset_import}
    if not versions:
        raise ModelError("it imports no operator set; the file may be truncated")
    if "" in versions and versions[""] < OLDEST:
        raise ModelError(
            f"its opset is {versions['']}; {runtime} promises nothing below {OLDEST}",
            hint="Raise it with onnx.version_converter.convert_version, or export it again.",
        )
    for domain in ("", "ai.onnx.ml"):
        version = versions.get(domain)
        if version is not None and not reads_opset(version, domain):
            raise ModelError(
                f"its opset is {domain or 'ai.onnx'} {version}, which is too new for {runtime}",
                hint="Export with an older opset, or update onnxruntime.",
            )


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _to_ir(proto: onnx.ModelProto, folder: Path) -> ir.Model:
    try:
        model = ir.from_proto(proto)
    except (ir.serde.SerdeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"the graph cannot be read: {root_cause(error)}") from error
    _set_base_dir(model, folder)
    if "ai.onnx" in model.opset_imports:
        model.opset_imports[""] = model.opset_imports.pop("ai.onnx")
    model.graph.sort()
    name_nodes(model)
    check(model)
    return model


def _set_base_dir(model: ir.Model, folder: Path) -> None:
    ir.external_data.set_base_dir(model.graph, str(folder))
    for function in model.functions.values():
        ir.external_data.set_base_dir(function.graph, str(folder))


def clone(model: ir.Model) -> ir.Model:
    """Copy the graph; tensors are shared between the copies."""
    return model.clone()


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    external_data: bool | None = None,
    metadata: Mapping[str, str] | None = None,
    keep_names: Collection[str] | None = None,
) -> None:
    """Write a model, atomically: the old file or the whole new one, whatever happens.

    Types of intermediate values are written only where shape inference does not find them.

    Args:
        model: The model; it is not changed, and files that its weights are mapped from are not
            touched.
        path: Where to. External data goes to ``path`` + ``.data`` (another name if the model's own
            weights are mapped from that file).
        external_data: Put weights into a file of their own; None does so above 1.9 GB.
        metadata: Entries to add to the model's metadata_props.
        keep_names: Names of nodes and values to keep; others inside the model become short
            (:func:`onnxcompress.graph.naming.shorten`). None keeps all.

    Raises:
        OutputError: If it cannot be written there, or does not fit into one file.
    """
    target = _checked_target(Path(path), model)
    total = tensor_bytes(model, external=True)
    external = total > ONE_FILE_BYTES if external_data is None else external_data
    copy = clone(model)
    copy.ir_version = ir_version_for(model)
    copy.metadata_props.update(metadata or {})
    if keep_names is not None:
        shorten(copy, keep_names)
    try:
        if external:
            data = _data_target(target, model)
            with replacing([data, target]) as (data_part, part):
                write_tensors(copy, data_part, location=data.name, base_dir=target.parent)
                _write_message(copy, part)
        else:
            _embed(copy)
            with replacing([target]) as (part,):
                _write_message(copy, part)
    except OSError as error:
        raise OutputError(
            f"cannot write '{target}': {error.strerror or error}", hint=_write_hint(error)
        ) from error


def _write_message(model: ir.Model, path: Path) -> None:
    try:
        proto = to_proto(model)
        if any(graph.value_info for graph in _guards.graph_protos(proto)):
            drop_inferable(proto, to_small_proto(model))
        data = proto.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise OutputError(
            f"the model does not fit into one file, which ends at {_MESSAGE_BYTES} bytes",
            hint="Write it with external data.",
        ) from error
    path.write_bytes(data)


def _embed(model: ir.Model) -> None:
    """Turn external tensors into ones that are written into the message (give a clone)."""
    for value in initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.Tensor(
                tensor.numpy(), dtype=tensor.dtype, name=tensor.name, doc_string=tensor.doc_string
            )


def _checked_target(path: Path, model: ir.Model) -> Path:
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise OutputError(
            f"cannot write '{path}': there is no folder '{target.parent}'", hint="Create it first."
        )
    if target.is_dir():
        raise OutputError(f"cannot write '{path}': it is a folder", hint="Name a file in it.")
    if target.exists() and not target.is_file():
        raise OutputError(f"cannot write '{path}': it is not a regular file")
    if target in external_paths(model):
        raise OutputError(
            f"cannot write '{path}': the model's own weights are read from it",
            hint="Choose another name.",
        )
    needed = tensor_bytes(model, external=True)
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise OutputError(
            f"cannot write '{path}': it needs {needed} bytes and {free} are free there",
            hint="Free space, or write to another disk.",
        )
    return target


def _data_target(target: Path, model: ir.Model) -> Path:
    sources = external_paths(model)
    names = (f"{target.name}{infix}.data" for infix in ("", *(f".{n}" for n in range(1, 100))))
    return next(path for name in names if (path := target.with_name(name)) not in sources)


def _write_hint(error: OSError) -> str | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "The disk is full or a limit is reached; nothing was left behind."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Check the permissions of the folder, or write elsewhere."
    return None
