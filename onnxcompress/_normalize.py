"""Bring a model into the one form that passes work on; infer its shapes; check it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from onnxcompress._guards import graph_protos
from onnxcompress._serialize import initializers, root_cause, to_small_proto
from onnxcompress.errors import ModelError
from onnxcompress.opset import upgrade
from onnxcompress.runtime import MAX_IR_VERSION, open_session, unknown_operators


def normalize(model: ir.Model, *, min_opset: int = 13) -> tuple[str, ...]:
    """Bring a model into the form that passes work on, in place.

    Functions are inlined, constants become initializers (in subgraphs: of the subgraph),
    initializers are taken out of the graph inputs, the opset is raised to ``min_opset`` if it is
    lower, shapes are inferred and nodes named. A newer opset is given up, with a note, if a node
    has no equivalent in it or if onnxruntime, at its default optimization level, refuses it.

    Args:
        model: A loaded model. Its nodes and values may be replaced.
        min_opset: The least ai.onnx opset wanted, up to 21.

    Returns:
        Remarks for the report, one sentence each.

    Raises:
        ModelError: If functions cannot be inlined or the graph's shapes contradict each other.
    """
    notes: list[str] = []
    inline(model)
    common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    overridable = [v.name for v in model.graph.inputs if v.name in model.graph.initializers]
    if overridable:
        common_passes.RemoveInitializersFromInputsPass()(model)
        notes.append(
            f"{len(overridable)} graph inputs with a default value became constants "
            f"({', '.join(str(name) for name in overridable[:3])}"
            f"{', ...' if len(overridable) > 3 else ''})."
        )
    name_nodes(model)
    infer_shapes(model)
    notes.extend(_raise_opset(model, min_opset))
    model.ir_version = ir_version_for(model)
    return tuple(notes)


def inline(model: ir.Model) -> None:
    """Replace calls of the model's own functions by what is in them, in place.

    Raises:
        ModelError: If that is not possible.
    """
    if not model.functions:
        return
    try:
        common_passes.InlinePass()(model)
    except (ir.passes.PassError, ir.passes.PreconditionError, ValueError) as error:
        raise ModelError(
            f"the model's functions cannot be inlined: {root_cause(error)}",
            hint="Inline them with onnx.inliner.inline_local_functions first.",
        ) from error


def _raise_opset(model: ir.Model, wanted: int) -> Iterator[str]:
    present = model.opset_imports.get("")
    if present is None or present >= wanted:
        return
    raised = model.clone()
    raised.ir_version = max(raised.ir_version, 4)
    try:
        upgrade(raised, wanted)
        infer_shapes(raised)
        if not unknown_operators(raised):
            open_session(raised)
    except ModelError as error:
        yield f"The opset stays at {present} instead of {wanted}: {error.message}."
        return
    name_nodes(raised)
    model.graph = raised.graph
    yield f"The opset was raised from {present} to {wanted}."


def infer_shapes(model: ir.Model) -> None:
    """Drop the types and shapes of intermediate values and infer them anew.

    The outputs of operators that onnx does not know keep what they have. No weights of a kilobyte
    or more are copied, so the size of the model does not matter.

    Raises:
        ModelError: If shapes contradict each other.
    """
    for value in initializers(model):
        if value.const_value is not None:
            value.shape = ir.Shape(value.const_value.shape.numpy())
            value.type = ir.TensorType(value.const_value.dtype)
    boundary = {id(v) for v in model.graph.outputs}
    for node in model.graph.all_nodes():
        if not onnx.defs.has(node.op_type, node.domain):
            continue
        for output in node.outputs:
            if id(output) not in boundary:
                output.shape, output.type = None, None
    try:
        inferred = onnx.shape_inference.infer_shapes(to_small_proto(model), data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise ModelError(f"its shapes contradict each other: {error}") from error
    _merge_types(model.graph, inferred.graph)


def _merge_types(graph: ir.Graph, inferred: onnx.GraphProto) -> None:
    types = {info.name: info.type for info in (*inferred.value_info, *inferred.output)}
    outputs = {id(v) for v in graph.outputs}
    for node, proto in zip(graph, inferred.node, strict=True):
        for output in node.outputs:
            known = types.get(output.name or "")
            if known is None or (id(output) in outputs and output.shape is not None):
                continue
            output.type = ir.serde.deserialize_type_proto_for_type(known)
            output.shape = _shape(ir.serde.deserialize_type_proto_for_shape(known))
        for attribute in proto.attribute:
            own = node.attributes.get(attribute.name)
            if own is not None and own.type == ir.AttributeType.GRAPH:
                _merge_types(own.as_graph(), attribute.g)
            elif own is not None and own.type == ir.AttributeType.GRAPHS:
                for body, body_proto in zip(own.as_graphs(), attribute.graphs, strict=True):
                    _merge_types(body, body_proto)


def _shape(shape: ir.Shape | None) -> ir.Shape | None:
    """Without the names that inference makes up for dimensions it does not know."""
    if shape is None:
        return None
    return ir.Shape(
        [None if not isinstance(d, int) and str(d.value).startswith("unk__") else d for d in shape]
    )


def check(model: ir.Model) -> None:
    """Check that a model is valid ONNX; its size does not matter, weights are left out.

    Raises:
        ModelError: With the checker's finding.
    """
    proto = to_small_proto(model)
    proto.ir_version = ir_version_for(model)
    for info in (*proto.graph.input, *proto.graph.output):
        if info.type.HasField("tensor_type"):
            # The checker wants a shape, which onnxruntime does not: an unknown rank has none.
            info.type.tensor_type.shape.SetInParent()
    for graph in graph_protos(proto):
        for tensor in graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                _empty(tensor)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        finding = " ".join(str(error).split())
        raise ModelError(
            f"it is not valid ONNX: {finding}", hint="Export it again with a newer exporter."
        ) from error


def _empty(tensor: onnx.TensorProto) -> None:
    """Make a tensor valid without its data; the checker does not look at initializer shapes."""
    name, kind = tensor.name, tensor.data_type
    tensor.Clear()
    tensor.name, tensor.data_type, tensor.raw_data = name, kind, b""
    tensor.dims.append(0)


def ir_version_for(model: ir.Model) -> int:
    """The model's IR version, raised to what its opsets need and lowered to what can be read."""
    imports = [onnx.helper.make_opsetid(d, v) for d, v in model.opset_imports.items()]
    needed: int = onnx.helper.find_min_ir_version_for(imports, ignore_unknown=True)
    return min(max(model.ir_version, needed, 4), MAX_IR_VERSION)


def name_nodes(model: ir.Model) -> None:
    """Give every node, in subgraphs too, a unique name that is not empty."""
    used: set[str] = set()
    unnamed: list[ir.Node] = []
    for node in model.graph.all_nodes():
        if node.name and node.name not in used:
            used.add(node.name)
        else:
            unnamed.append(node)
    counts: dict[str, int] = {}
    for node in unnamed:
        base = node.name or node.op_type
        number = counts.get(base, 1 if node.name else 0)
        while (wanted := f"{base}_{number}") in used:
            number += 1
        counts[base] = number + 1
        node.name = wanted
        used.add(wanted)
