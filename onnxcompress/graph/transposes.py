"""Take the batch out of a transposition that merges it with other axes.

PyTorch writes the transposed keys of an attention layer as ``[B, H, S, D] -> [B·H, S, D] ->
[B·H, D, S] -> [B, H, D, S]``. With a dynamic batch the heads are lost in ``B·H``; one Transpose of
four axes says the same.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxcompress.graph.probe import Dims, Shapes
from onnxcompress.graph.rules.base import attribute_ints

_STANDARD = frozenset({"", "ai.onnx"})


def unmerge_transposes(model: ir.Model, shapes: Shapes) -> None:
    """Rewrite Reshape, Transpose, Reshape as one Transpose, in place, where they are one.

    Args:
        model: A model.
        shapes: Its shapes.
    """
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Transpose" or node.domain not in _STANDARD:
            continue
        merging = None if node.inputs[0] is None else node.inputs[0].producer()
        users = list(node.outputs[0].uses())
        if merging is None or len(users) != 1 or node.outputs[0].is_graph_output():
            continue
        splitting = users[0].node
        if not (_reshapes(merging) and _reshapes(splitting) and users[0].idx == 0):
            continue
        if splitting.outputs[0].is_graph_output() or splitting.graph is not node.graph:
            continue
        perm = _whole_permutation(merging, node, splitting, shapes)
        if perm is None:
            continue
        node.replace_input_with(0, merging.inputs[0])
        node.attributes["perm"] = ir.AttrInt64s("perm", perm)
        old, new = splitting.outputs[0], node.outputs[0]
        new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new)


def _reshapes(node: ir.Node) -> bool:
    return node.op_type == "Reshape" and node.domain in _STANDARD


def _whole_permutation(
    merging: ir.Node, node: ir.Node, splitting: ir.Node, shapes: Shapes
) -> list[int] | None:
    """The permutation of all axes; None if the three nodes are not one transposition."""
    perm = attribute_ints(node, "perm")
    if perm is None or perm[0] != 0:
        return None
    found: set[int] = set()
    for probe in shapes.probes:
        x, y = (
            probe.get(v) if v is not None else None for v in (merging.inputs[0], node.inputs[0])
        )
        z = probe.get(splitting.outputs[0])
        lead = _merged(x, y)
        if lead is None or x is None or z is None or len(z) != len(x):
            return None
        expected = (*x[:lead], *(x[lead + p - 1] for p in perm[1:]))
        if expected != z:
            return None
        found.add(lead)
    if len(found) != 1:
        return None
    (lead,) = found
    return [*range(lead), *(lead + p - 1 for p in perm[1:])]


def _merged(x: Dims | None, y: Dims | None) -> int | None:
    """How many leading axes of ``x`` become the first of ``y``, all others staying."""
    if x is None or y is None or None in x or None in y or len(x) <= len(y):
        return None
    lead = len(x) - len(y) + 1
    return lead if x[lead:] == y[1:] else None
