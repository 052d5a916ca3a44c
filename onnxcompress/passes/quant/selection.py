"""Which nodes may be quantized at all: by the table of operators, by name, by what the model is."""

from __future__ import annotations

import fnmatch

import onnx_ir as ir

from onnxcompress.errors import UsageError
from onnxcompress.passes.base import Skip
from onnxcompress.passes.quant.operators import RULES, Kind
from onnxcompress.passes.quant.options import QuantOptions
from onnxcompress.passes.quant.placement import Network

_MIN_OPSET = 13
"""QuantizeLinear and DequantizeLinear take one scale per channel from this operator set on."""

_NO_RULE = {
    "Attention": "there is no integer kernel for it",
    "Einsum": "there is no integer kernel for it",
    "GRU": "there is no integer kernel for it",
    "LSTM": "it has a dynamic integer kernel only, which this mode does not use",
    "RNN": "there is no integer kernel for it",
}


class Selection:
    """What the options and the model let be quantized.

    Args:
        options: How to quantize.
    """

    def __init__(self, options: QuantOptions) -> None:
        self._options = options

    def select(self, model: ir.Model, network: Network) -> tuple[frozenset[str], dict[str, Skip]]:
        """Nodes that may be quantized, and a reason for each other node that might have been."""
        self.check_patterns(model)
        skips: dict[str, Skip] = {}
        allowed: set[str] = set()
        opset = model.opset_imports.get("", 0)
        for node in model.graph.all_nodes():
            name = node.name or ""
            rule = RULES.get(node.op_type) if node.domain in {"", "ai.onnx"} else None
            if rule is None:
                if node.op_type in _NO_RULE and node.domain in {"", "ai.onnx"}:
                    skips[name] = Skip(name, node.op_type, _NO_RULE[node.op_type])
                continue
            if rule.kind not in {Kind.WEIGHTED, Kind.JOINING} or _computes_shapes(node):
                continue
            reason = self.excluded(node)
            if node.graph is not model.graph:
                reason = "it is inside a branch or a loop body"
            elif opset < _MIN_OPSET:
                reason = f"the model's operator set is {opset}; scales per channel need 13"
            elif reason is None:
                reason = network.refusals.get(name)
            if reason is None:
                allowed.add(name)
            else:
                skips[name] = Skip(name, node.op_type, reason)
        return frozenset(allowed), skips

    def excluded(self, node: ir.Node) -> str | None:
        """Why the options leave ``node`` alone; None where they do not."""
        options, name = self._options, node.name or ""
        if options.op_types and node.op_type not in options.op_types:
            return f"op_types names only {', '.join(options.op_types)}"
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in options.exclude):
            return "excluded by name"
        if options.include and not any(fnmatch.fnmatchcase(name, p) for p in options.include):
            return "not among the names to include"
        return None

    def check_patterns(self, model: ir.Model) -> None:
        """See that every pattern and operator named matches a node.

        Raises:
            UsageError: If one matches none.
        """
        names = [node.name or "" for node in model.graph.all_nodes()]
        for role, patterns in (
            ("include", self._options.include),
            ("exclude", self._options.exclude),
        ):
            for pattern in patterns:
                if not fnmatch.filter(names, pattern):
                    raise UsageError(
                        f"quant.{role}: no node is named like '{pattern}'",
                        hint="See the node names with: onnxcompress inspect MODEL.",
                    )
        operators = {node.op_type for node in model.graph.all_nodes()}
        for op_type in self._options.op_types:
            if op_type not in operators:
                raise UsageError(
                    f"quant.op_types: the model has no operator '{op_type}'",
                    hint=f"It has: {', '.join(sorted(operators))}.",
                )


def _computes_shapes(node: ir.Node) -> bool:
    """Whether ``node`` handles integers, as the arithmetic of shapes and indices does."""
    dtype = node.outputs[0].dtype
    return dtype is not None and not dtype.is_floating_point()
