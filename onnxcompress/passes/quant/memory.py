"""Placements that the clock found before, for the same model on the same kind of machine.

The time of a placement depends on operators, shapes and machine, not on the values of weights, and
what it does to accuracy little: a network that is trained anew takes the same placement. So an
entry's key is a digest of the graph (operators, attributes, connections, shapes, types and the
values of small constants such as shapes), the sample's shapes, the nodes that may run on integers,
the target and the processor's features, the versions of onnxruntime and of this package, and the
options that bear on the search.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Mapping

import onnx_ir as ir
import onnxruntime as ort

from onnxcompress.cache import read_entry, write_entry
from onnxcompress.passes.quant.options import QuantOptions
from onnxcompress.passes.quant.search import Candidate, Found
from onnxcompress.runtime import Array
from onnxcompress.targets import Target, cpu_features

_KIND = "placements"
_FORM = 4
"""Raised when what is stored, or how placements are searched, changes."""

_SMALL_BYTES = 1024


def placement_key(
    model: ir.Model,
    allowed: frozenset[str],
    feeds: Mapping[str, Array],
    target: Target,
    options: QuantOptions,
) -> str:
    """Digest of everything that the fastest placement depends on.

    Args:
        model: The prepared float model.
        allowed: Nodes that may run on integers.
        feeds: The sample to be timed.
        target: The hardware profile.
        options: Options of the pass.
    """
    digest = hashlib.sha256()

    def add(*parts: object) -> None:
        digest.update(("\x1f".join(map(str, parts)) + "\x1e").encode())

    add(_FORM, ort.__version__, dataclasses.astuple(target), options.per_channel)
    add(options.search_seconds, platform.machine(), *sorted(cpu_features()))
    add(*(f"{name} {array.dtype} {array.shape}" for name, array in sorted(feeds.items())))
    add(*sorted(allowed))
    add(*sorted(model.opset_imports.items()))
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.outputs):
            add(value.name, value.dtype, value.shape)
        for name, value in sorted(graph.initializers.items()):
            tensor = value.const_value
            add(name, value.dtype, value.shape)
            stored = tensor is not None and tensor.dtype != ir.DataType.STRING
            if tensor is not None and stored and tensor.nbytes <= _SMALL_BYTES:
                digest.update(tensor.tobytes())
        for node in graph:
            add(node.domain, node.op_type, node.name, *(_said(a) for a in node.attributes.values()))
            add(*(v.name if v is not None else "" for v in (*node.inputs, *node.outputs)))
    return digest.hexdigest()


def _said(attribute: ir.Attr) -> str:
    plain = {
        ir.AttributeType.INT,
        ir.AttributeType.INTS,
        ir.AttributeType.FLOAT,
        ir.AttributeType.FLOATS,
        ir.AttributeType.STRING,
        ir.AttributeType.STRINGS,
    }
    value = attribute.value if attribute.type in plain else ""
    return f"{attribute.name}={attribute.type}:{value}"


def recall(key: str) -> Found | None:
    """What a search found under ``key``; None when nothing is known or it makes no sense."""
    entry = read_entry(_KIND, key)
    if entry is None:
        return None
    values = entry.get("placement")
    timed, seconds = entry.get("timed"), entry.get("seconds")
    fields = {field.name: type(field.default) for field in dataclasses.fields(Candidate)}
    if not isinstance(values, dict) or values.keys() != fields.keys():
        return None
    if not isinstance(timed, int) or not isinstance(seconds, int | float):
        return None
    for name, kind in fields.items():
        if type(values[name]) is not kind or (kind is int and values[name] < 0):
            return None
    return Found(Candidate(**values), timed, float(seconds))


def remember(key: str, found: Found) -> bool:
    """Store what a search found; whether that was possible."""
    entry = {
        "placement": dataclasses.asdict(found.candidate),
        "timed": found.timed,
        "seconds": round(found.seconds, 2),
    }
    return write_entry(_KIND, key, entry)
