"""Leave out of a file the types of intermediate values that everybody can infer.

Every runtime infers types and shapes when it loads a model; written beside the nodes they only make
the file larger (a fifteenth of a small quantized network). What inference does not find, such as
the outputs of custom operators, stays.
"""

from __future__ import annotations

import onnx

from onnxcompress._guards import graph_protos


def drop_inferable(proto: onnx.ModelProto, small: onnx.ModelProto) -> int:
    """Drop value_info that shape inference reproduces.

    Args:
        proto: The model to write; changed in place.
        small: The same model, with or without the data of large tensors; changed, too.

    Returns:
        How many entries were dropped.
    """
    for graph in graph_protos(small):
        _keep(graph, _given(graph))
    try:
        inferred = onnx.shape_inference.infer_shapes(small, data_prop=True)
    except onnx.shape_inference.InferenceError:
        return 0  # what is written may be what keeps it from contradictions
    dropped = 0
    for graph, twin in zip(graph_protos(proto), graph_protos(inferred), strict=True):
        known = {info.name: info.type for info in twin.value_info}
        kept = {i.name for i in graph.value_info if not _tells(known.get(i.name), i.type)}
        dropped += _keep(graph, kept | _given(graph))
    return dropped


def _given(graph: onnx.GraphProto) -> set[str]:
    """Outputs of operators that onnx does not know: only the file tells their types."""
    unknown = (node for node in graph.node if not onnx.defs.has(node.op_type, node.domain))
    return {name for node in unknown for name in node.output}


def _keep(graph: onnx.GraphProto, names: set[str]) -> int:
    """Drop the entries of all other values; returns how many."""
    kept = [info for info in graph.value_info if info.name in names]
    dropped = len(graph.value_info) - len(kept)
    if dropped:
        del graph.value_info[:]
        graph.value_info.extend(kept)
    return dropped


def _tells(inferred: onnx.TypeProto | None, stored: onnx.TypeProto) -> bool:
    """Whether ``inferred`` says all that ``stored`` says."""
    if inferred is None or inferred.WhichOneof("value") != stored.WhichOneof("value"):
        return False
    if not stored.HasField("tensor_type"):
        return bool(inferred == stored)
    found, wanted = inferred.tensor_type, stored.tensor_type
    if found.elem_type != wanted.elem_type:
        return False
    if not wanted.HasField("shape"):
        return True
    if not found.HasField("shape") or len(found.shape.dim) != len(wanted.shape.dim):
        return False
    return all(
        (not w.HasField("dim_value") or f.dim_value == w.dim_value)
        and (not w.dim_param or f.dim_param == w.dim_param)
        for f, w in zip(found.shape.dim, wanted.shape.dim, strict=True)
    )
