"""Hidden tensors: what lies between the layers that make a tensor and those that read it.

Activations may stand there, a Concat of several layers' outputs, and a MaxPool, in this order and
with further activations between; anything else ends the search.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxcompress.calibration.statistics import ConvUnfold
from onnxcompress.context import PassContext
from onnxcompress.numerics.clipping import Bounds
from onnxcompress.numerics.scalar_function import Composed, Floats, ScalarFunction
from onnxcompress.passes.prune.clipping import clip_of
from onnxcompress.passes.prune.consumers import Consumer
from onnxcompress.passes.prune.elementwise import Chain, chain_behind

_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True, slots=True)
class Branch:
    """A layer and the activations behind it.

    Attributes:
        layer: The layer.
        chains: The activations, the first to be applied first; some may be empty.
    """

    layer: Consumer
    chains: tuple[Chain, ...]

    def function(self, seen: Floats, ctx: PassContext) -> ScalarFunction | None:
        """All activations as one function; None if one of them does not run.

        Args:
            seen: Numbers that the layer answers.
            ctx: How to run.
        """
        functions: list[ScalarFunction] = []
        for chain in (c for c in self.chains if c.nodes):
            function = chain.function(seen, ctx)
            if function is None:
                return None
            functions.append(function)
            seen = function.value(seen)
        if not functions:
            return Bounds()
        return functions[0] if len(functions) == 1 else Composed(tuple(functions))


@dataclass(frozen=True, slots=True)
class Hidden:
    """A tensor that layers make, and others read.

    Attributes:
        branches: Those that make it, in the order of its channels.
        pool: How a MaxPool in front of those that read it does so; None where there is none.
        readers: Names of all nodes that read it.
    """

    branches: tuple[Branch, ...]
    pool: ConvUnfold | None
    readers: tuple[str, ...]

    @property
    def pooled(self) -> int:
        """Values that one is the largest of."""
        return 1 if self.pool is None else self.pool.taps


def hidden_behind(
    read: ir.Value, makers: Mapping[str, Consumer], own: Collection[str]
) -> Hidden | None:
    """What lies in front of a layer.

    Args:
        read: What the layer reads, perhaps through a mask.
        makers: Layers by the name of the value that they make.
        own: Names of the nodes of the model before it was masked; masks are others.

    Returns:
        None where something else lies between, or anything but layers reads it.
    """
    mask = read.producer()
    masked = mask is not None and mask.name not in own
    result = mask.inputs[1] if mask is not None and masked else read
    if result is None:
        return None
    readers, last = _readers(result, own), chain_behind(result, makers)
    if readers is None or last is None:
        return None
    chains, pool = [last], None
    node = last.root.producer()
    if node is not None and node.op_type == "MaxPool" and node.domain in _DOMAINS:
        pool, before = _pool(node), _alone(node.inputs[0], makers)
        if pool is None or before is None or not _rises(last):
            return None
        chains = [before, last]
    branches = _branches(chains, makers)
    return None if branches is None else Hidden(branches, pool, readers)


def _readers(result: ir.Value, own: Collection[str]) -> tuple[str, ...] | None:
    """Names of the nodes that read a value, or a mask of it; None if not all take it as data."""
    if result.is_graph_output():
        return None
    direct = list(result.uses())
    through = [u for d in direct if d.node.name not in own for u in d.node.outputs[0].uses()]
    uses = [d for d in direct if d.node.name in own] + through
    if any(use.idx != 0 for use in uses):
        return None
    return tuple(sorted(use.node.name or "" for use in uses))


def _alone(value: ir.Value | None, makers: Collection[str]) -> Chain | None:
    """The chain that ends at a value which exactly one node reads."""
    if value is None or value.is_graph_output() or len(list(value.uses())) != 1:
        return None
    return chain_behind(value, makers)


def _rises(chain: Chain) -> bool:
    """Whether a chain surely never falls: then the largest may be taken before it or after it."""
    return not chain.nodes or (len(chain.nodes) == 1 and clip_of(chain.nodes[0]) is not None)


def _branches(chains: Sequence[Chain], makers: Mapping[str, Consumer]) -> tuple[Branch, ...] | None:
    """The layers in front of the first of some chains, through one Concat or none."""
    root = chains[0].root
    layer = makers.get(root.name or "")
    if layer is not None:
        return (Branch(layer, tuple(chains)),)
    concat = root.producer()
    if concat is None or concat.op_type != "Concat" or concat.domain not in _DOMAINS:
        return None
    found = []
    for value in concat.inputs:
        chain = _alone(value, makers)
        layer = None if chain is None else makers.get(chain.root.name or "")
        if chain is None or layer is None or not _joins(concat, layer):
            return None
        found.append(Branch(layer, (chain, *chains)))
    return tuple(found)


def _joins(concat: ir.Node, layer: Consumer) -> bool:
    """Whether a Concat joins the outputs of a layer with others."""
    axis, shape = concat.attributes.get_int("axis", 0), concat.outputs[0].shape
    if axis < 0:
        return shape is not None and axis + len(shape) == layer.target_axis
    return axis == layer.target_axis


def _pool(node: ir.Node) -> ConvUnfold | None:
    """How a MaxPool reads; None if that depends on lengths, or somebody wants the places."""
    attributes = node.attributes
    kernel = tuple(attributes.get_ints("kernel_shape", ()))
    rank = len(kernel)
    padding = attributes.get_string("auto_pad", "NOTSET")
    places = len(node.outputs) > 1 and any(True for _ in node.outputs[1].uses())
    ceil = attributes.get_int("ceil_mode", 0) != 0
    if not rank or places or ceil:
        return None
    if padding not in {"NOTSET", "VALID"}:
        return None
    none = (0,) * (2 * rank)
    return ConvUnfold(
        kernel,
        tuple(attributes.get_ints("strides", ())) or (1,) * rank,
        tuple(attributes.get_ints("dilations", ())) or (1,) * rank,
        none if padding == "VALID" else tuple(attributes.get_ints("pads", ())) or none,
    )


def nodes_between(reads: Sequence[ir.Value | None], layers: Collection[ir.Node]) -> tuple[str, ...]:
    """Names of the nodes from some layers, them included, to what others read."""
    found: dict[ir.Node, None] = dict.fromkeys(layers)
    todo = list(reads)
    while todo:
        value = todo.pop()
        node = None if value is None else value.producer()
        if node is not None and node not in found:
            found[node] = None
            todo.extend(node.inputs)
    return tuple(node.name or "" for node in found)
