"""What it costs to take a node off 8-bit integers: lost time, or lost bytes.

Lost time is estimated, in multiply-accumulates: those of the node, which integers do about twice as
fast, and ten per element that it reads and writes, for the way between float and integer. Lost
bytes are exact: three of four bytes of each weight come back in float, one of two in float16, none
with 16-bit activations. Where bytes are equal the estimated time decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxcompress.graph.cost import cost_of, probe_shapes
from onnxcompress.passes.quant.operators import data_inputs
from onnxcompress.passes.quant.placement import Network
from onnxcompress.passes.quant.precision import Precision

_MACS_PER_ELEMENT = 10.0
_TIE = 1e-9
"""Weight of the time where bytes count."""

_WIDE_SLOWDOWN = 3.0
"""On a CPU 16-bit integers cost the way to float and back on top of computing in float."""

_BYTES = {Precision.INT16: 0.0, Precision.FLOAT16: 1.0, Precision.FLOAT: 3.0}


class Costs:
    """Costs of lifting nodes of one model.

    Args:
        model: The float model.
        network: The same as placement sees it.
        feeds_shapes: Shapes of one run's inputs.
    """

    def __init__(
        self, model: ir.Model, network: Network, feeds_shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        found = cost_of(model, feeds_shapes)
        self.total_macs = found.macs
        self._macs = {n.node: n.macs or 0 for n in found.nodes}
        self._parameters = {n.node: n.parameters for n in found.nodes}
        shapes = probe_shapes(model, feeds_shapes)
        self._elements = {
            name: sum(
                math.prod(shapes.get(value, (1,)))
                for value in (*data_inputs(node), network.result(node))
            )
            for name, node in network.nodes.items()
            if node.op_type and name not in network.refusals and network.has_rule(name)
        }

    def macs(self, node: str) -> int:
        """Multiply-accumulates of a node for one run."""
        return self._macs.get(node, 0)

    def costs(
        self, node: str, precisions: Sequence[Precision], *, for_size: bool
    ) -> tuple[float, ...]:
        """Cost of each precision for a node, in the order given."""
        time = self.macs(node) + _MACS_PER_ELEMENT * self._elements.get(node, 0)
        made = []
        for precision in precisions:
            slow = time * (_WIDE_SLOWDOWN if precision is Precision.INT16 else 1.0)
            size = _BYTES[precision] * self._parameters.get(node, 0)
            made.append(size + _TIE * slow if for_size else slow + _TIE * size)
        return tuple(made)
