"""Write the HardSigmoid that exporters spell out: Add, Clip and a factor.

A HardSigmoid with slope ``a`` and offset ``b`` is ``h(x) = max(0, min(1, a x + b))``. For ``c > 0``

    Clip(x + k, 0, c) = c max(0, min(1, (x + k) / c)) = c h(x),    a = 1 / c, b = k / c

so a Clip from 0 to c behind an Add of a number k, and before a division by c, is one HardSigmoid.
Multiplication commutes, so the division may also stand behind a product with something else:

    (y Clip(x + k, 0, c)) / c = y h(x)

With ``y = x``, ``k = 3`` and ``c = 6`` that is the hard-swish of MobileNetV3, in four operators
where two do. onnxruntime performs HardSigmoid in the Conv before it, or the whole of ``x h(x)``,
which keeps a chain of convolutions in its blocked layout; the spelt-out form parts the chain, and
the tensor is copied to plain layout and back for each activation.

Only what ends as the pattern says is rewritten: a Clip that others read, too, or a factor that is
not ``1 / c`` to the rounding of a float, stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxcompress.graph.constants import constant_of, scalar_of

_STANDARD = frozenset({"", "ai.onnx"})
_CLOSE = 1e-6
"""How far c times the factor may be from 1: about ten roundings of a float32."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A spelt-out HardSigmoid.

    Attributes:
        x: What it is applied to.
        offset: The number k that is added before the Clip.
        clip: The Clip.
        top: Its upper bound c.
        product: The Mul with something else between Clip and division; None if there is none.
        division: The Div by c or Mul by 1 / c.
    """

    x: ir.Value
    offset: float
    clip: ir.Node
    top: float
    product: ir.Node | None
    division: ir.Node


def write_hard_sigmoids(model: ir.Model) -> int:
    """Rewrite every spelt-out HardSigmoid of float32, in place; what nothing reads any more stays.

    Args:
        model: The model, with at least opset 6.

    Returns:
        How many were rewritten.
    """
    written = 0
    for node in list(model.graph.all_nodes()):
        found = _find(node)
        if found is not None:
            _write(found)
            written += 1
    return written


def _find(clip: ir.Node) -> _Found | None:
    """The HardSigmoid around a Clip."""
    top = _top(clip)
    if top is None or clip.inputs[0] is None or clip.outputs[0].dtype != ir.DataType.FLOAT:
        return None
    shift = clip.inputs[0].producer()
    if shift is None:
        return None
    shifted = _shifted(shift)
    reader = _only_reader(clip)
    if shifted is None or reader is None:
        return None
    x, offset = shifted
    if _divides(reader, clip.outputs[0], top):
        return _Found(x, offset, clip, top, None, reader)
    if reader.op_type != "Mul" or reader.domain not in _STANDARD:
        return None
    division = _only_reader(reader)
    if division is None or not _divides(division, reader.outputs[0], top):
        return None
    return _Found(x, offset, clip, top, reader, division)


def _top(node: ir.Node) -> float | None:
    """The upper bound of a Clip that begins at 0."""
    if node.op_type != "Clip" or node.domain not in _STANDARD:
        return None
    bounds: list[float | None] = []
    for place, name in enumerate(("min", "max"), start=1):
        if name in node.attributes:
            bounds.append(float(node.attributes[name].as_float()))
        else:
            bounds.append(scalar_of(node.inputs[place]) if place < len(node.inputs) else None)
    low, high = bounds
    return high if low == 0.0 and high is not None and 0.0 < high < float("inf") else None


def _shifted(node: ir.Node) -> tuple[ir.Value, float] | None:
    """The value and the number that an Add adds."""
    if node.op_type != "Add" or node.domain not in _STANDARD:
        return None
    for place in (0, 1):
        x, number = node.inputs[1 - place], _number(node.inputs[place], node.inputs[1 - place])
        if x is not None and number is not None:
            return x, number
    return None


def _number(constant: ir.Value | None, other: ir.Value | None) -> float | None:
    """A constant of one element that gives no axis to what it is combined with."""
    array = constant_of(constant)
    if array is None or array.size != 1 or other is None:
        return None
    rank = None if other.shape is None else len(other.shape)
    fits = array.ndim == 0 or (rank is not None and array.ndim <= rank)
    return scalar_of(constant) if fits else None


def _only_reader(node: ir.Node) -> ir.Node | None:
    """The one node that reads a node's output once, in the same graph."""
    output = node.outputs[0]
    uses = list(output.uses())
    if output.is_graph_output() or len(uses) != 1 or uses[0].node.graph is not node.graph:
        return None
    return uses[0].node


def _divides(node: ir.Node, value: ir.Value, by: float) -> bool:
    """Whether a node divides ``value`` by a number."""
    if node.op_type not in {"Div", "Mul"} or node.domain not in _STANDARD:
        return False
    if node.op_type == "Div":
        number = _number(node.inputs[1], value) if node.inputs[0] is value else None
        return number is not None and abs(number / by - 1.0) < _CLOSE
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    number = _number(other, value)
    return number is not None and abs(number * by - 1.0) < _CLOSE


def _write(found: _Found) -> None:
    """Put the HardSigmoid in the place of the Clip, and take the division out."""
    clip, division = found.clip, found.division
    clip.op_type = "HardSigmoid"
    clip.attributes.clear()
    clip.attributes["alpha"] = ir.AttrFloat32("alpha", 1.0 / found.top)
    clip.attributes["beta"] = ir.AttrFloat32("beta", found.offset / found.top)
    clip.resize_inputs(1)
    clip.replace_input_with(0, found.x)
    # What divided passes on: an Identity, which the caller knows how to take out.
    source = (found.product or clip).outputs[0]
    division.op_type = "Identity"
    division.attributes.clear()
    division.resize_inputs(1)
    division.replace_input_with(0, source)
