"""ONNX's own operator tests, rebuilt so that every axis of an operator may carry channels.

Float inputs become weights plus a scalar input, other inputs constants; every output is multiplied
by weights and summed over all axes. Whatever the operator lets through can then be removed, and the
law must hold.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests


def operator_cases(*, single: bool = True) -> Iterator[TestCase]:
    """Cases whose inputs and outputs are tensors.

    Args:
        single: Only those of a single node, not those that write a function out.
    """
    for case in load_model_tests(kind="node"):
        if case.model is None or not case.data_sets:
            continue
        if not single or len(case.model.graph.node) == 1:
            inputs, outputs = case.data_sets[0]
            if all(isinstance(a, np.ndarray) for a in (*inputs, *outputs)):
                yield case


def as_network(case: TestCase) -> ir.Model | None:
    """A model with one scalar input around the case's nodes; None where a type is not for numpy."""
    assert case.model is not None
    assert case.data_sets is not None
    inputs, outputs = case.data_sets[0]
    graph = case.model.graph
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    for info, array in zip(graph.input, inputs, strict=True):
        dtype = info.type.tensor_type.elem_type
        if dtype not in _NUMPY_TYPES:
            return None
        if dtype != onnx.TensorProto.FLOAT:
            weights.append(numpy_helper.from_array(array, info.name))
            continue
        weights.append(numpy_helper.from_array(array, f"{info.name}/weight"))
        nodes.append(helper.make_node("Add", [f"{info.name}/weight", "zero"], [info.name]))
    nodes.extend(graph.node)
    weights.extend(graph.initializer)
    results: list[str] = []
    for info, array in zip(graph.output, outputs, strict=True):
        if info.type.tensor_type.elem_type not in _NUMPY_TYPES or array.dtype.kind not in "biuf":
            return None
        name = info.name
        weight = rng.uniform(0.5, 1.5, array.shape).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"{name}/weight"))
        nodes += [
            helper.make_node("Cast", [name], [f"{name}/float"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}/float", f"{name}/weight"], [f"{name}/scaled"]),
            helper.make_node("ReduceSum", [f"{name}/scaled"], [f"{name}/sum"], keepdims=0),
        ]
        results.append(f"{name}/sum")
    scalar = helper.make_tensor_value_info("zero", onnx.TensorProto.FLOAT, [])
    infos = [helper.make_tensor_value_info(r, onnx.TensorProto.FLOAT, []) for r in results]
    model = helper.make_model(
        helper.make_graph(nodes, case.name, [scalar], infos, weights),
        opset_imports=case.model.opset_import,
        ir_version=10,
    )
    return ir.from_proto(model)


_NUMPY_TYPES = frozenset(
    {
        onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.INT32,
        onnx.TensorProto.BOOL, onnx.TensorProto.INT8, onnx.TensorProto.UINT8,
    }
)  # fmt: skip
