"""Which nodes of a plan really became integer kernels in onnxruntime.

A Q/DQ pair is only a description: where onnxruntime has no kernel for it, the pair stays and the
node runs in float between a DequantizeLinear and a QuantizeLinear, slower than before. So the graph
that is really executed is looked at.
"""

from __future__ import annotations

import re

import onnx_ir as ir

from onnxcompress.passes.quant.operators import Kind
from onnxcompress.passes.quant.placement import Network, Plan

_INTEGER_KERNELS = frozenset(
    {
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QGemm",
        "QLinearAdd",
        "QLinearAveragePool",
        "QLinearConcat",
        "QLinearConv",
        "QLinearGlobalAveragePool",
        "QLinearLeakyRelu",
        "QLinearMatMul",
        "QLinearMul",
    }
)

_SUFFIX = re.compile(r"(_token_\d+|_nhwc|_nchwc)+$")
"""What onnxruntime appends to the name of a node that it replaced by another layout's kernel."""


def unfused(network: Network, plan: Plan, executed: ir.Model) -> frozenset[str]:
    """Weighted and joining nodes of ``plan`` that have no integer kernel in the executed graph.

    Args:
        network: The float model.
        plan: What was written.
        executed: The graph onnxruntime executes (:func:`onnxcompress.runtime.optimized_graph`).
    """
    fused = {
        _SUFFIX.sub("", node.name or "")
        for node in executed.graph
        if node.op_type in _INTEGER_KERNELS
    }
    return frozenset(
        name
        for name in plan.nodes
        if network.rule(name).kind is not Kind.MOVING and name not in fused
    )


def integer_kernel_count(executed: ir.Model) -> int:
    """Integer kernels in the executed graph."""
    return sum(node.op_type in _INTEGER_KERNELS for node in executed.graph)
