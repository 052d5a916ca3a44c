"""Two models in one graph, fed by the same inputs."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.calibration.statistics import REFERENCE_PREFIX
from onnxcompress.errors import ModelError
from onnxcompress.graph.naming import Namer


def top_level(graph: ir.Graph) -> dict[str, ir.Value]:
    """The values of a graph by name, without those of its subgraphs."""
    values = [*graph.inputs, *graph.initializers.values()]
    values += [output for node in graph for output in node.outputs]
    return {value.name: value for value in values if value.name}


def join(model: ir.Model, reference: ir.Model) -> dict[str, ir.Value]:
    """Move a copy of ``reference`` into ``model``, fed by the same inputs, nodes interleaved.

    Equal parts (same tensors, same operators) are computed once, since onnxruntime merges common
    subexpressions.

    Returns:
        The reference's values by name, prefixed with ``reference/``.

    Raises:
        ModelError: If inputs or operator sets differ.
    """
    reference = model_io.clone(reference)
    _check_joinable(model, reference)
    namer = Namer(model)
    values = {f"{REFERENCE_PREFIX}{name}": v for name, v in top_level(reference.graph).items()}
    inputs = {value.name: value for value in model.graph.inputs}
    shared = _replace_shared(model.graph, reference.graph, inputs)
    for name, value in shared.items():
        values[f"{REFERENCE_PREFIX}{name}"] = value
    for graph in reference.graphs():
        for value in list(top_level(graph).values()):
            value.name = namer.value(f"{REFERENCE_PREFIX}{value.name}")
        for node in graph:
            node.name = namer.node(f"{REFERENCE_PREFIX}{node.name or node.op_type}")
    for value in list(reference.graph.initializers.values()):
        reference.graph.initializers.pop(value.name or "")
        model.graph.register_initializer(value)
    reference.graph.outputs.clear()
    for identifier, function in reference.functions.items():
        model.functions.setdefault(identifier, function)
    for domain, version in reference.opset_imports.items():
        model.opset_imports.setdefault(domain, version)
    _interleave(model.graph, reference.graph)
    return values


def _check_joinable(model: ir.Model, reference: ir.Model) -> None:
    for domain, version in reference.opset_imports.items():
        if model.opset_imports.get(domain, version) != version:
            raise ModelError(
                f"the reference model has operator set {version} of '{domain or 'ai.onnx'}', the "
                f"model {model.opset_imports[domain]}",
                hint="Normalize both models to one operator set.",
            )
    names = {value.name for value in model.graph.inputs}
    missing = [v.name for v in reference.graph.inputs if v.name not in names]
    if missing:
        raise ModelError(f"the reference model has inputs that the model lacks: {missing}")


def _replace_shared(
    graph: ir.Graph, reference: ir.Graph, inputs: Mapping[str | None, ir.Value]
) -> dict[str, ir.Value]:
    """Let the reference use the model's inputs and those initializers that are the same tensor."""
    shared: dict[str, ir.Value] = {}
    for value in list(reference.inputs):
        shared[value.name or ""] = inputs[value.name]
        ir.convenience.replace_all_uses_with(value, inputs[value.name], replace_graph_outputs=True)
    reference.inputs.clear()
    for name, value in list(reference.initializers.items()):
        own = graph.initializers.get(name)
        if own is not None and own.const_value is value.const_value is not None:
            shared[name] = own
            ir.convenience.replace_all_uses_with(value, own, replace_graph_outputs=True)
            reference.initializers.pop(name)
    return shared


def _interleave(graph: ir.Graph, other: ir.Graph) -> None:
    """Merge the nodes in proportion, so that corresponding layers run close together."""
    own, moved = list(graph), list(other)
    other.remove(moved)
    graph.remove(own)
    keyed = [(i / max(1, len(own)), 0, i, node) for i, node in enumerate(own)]
    keyed += [(i / max(1, len(moved)), 1, i, node) for i, node in enumerate(moved)]
    graph.extend(node for *_, node in sorted(keyed, key=lambda k: k[:3]))
