"""How single operators are rewritten when their definition changed between opset 7 and 21."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.constants import constant_of
from onnxcompress.graph.naming import Namer


class CannotUpgradeError(Exception):
    """A node that has no equivalent in the newer opset; the message is the reason."""


class Editor:
    """Adds constants and nodes next to the node being rewritten.

    Args:
        namer: Source of unused names.
    """

    def __init__(self, namer: Namer) -> None:
        self._namer = namer

    def add_input(
        self, node: ir.Node, index: int, role: str, array: npt.NDArray[np.generic]
    ) -> None:
        """Make input ``index`` of ``node`` the constant ``array``."""
        if len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        node.replace_input_with(index, self.constant(node, role, array))

    def constant(self, node: ir.Node, role: str, array: npt.NDArray[np.generic]) -> ir.Value:
        """Add an initializer to the graph that ``node`` is in."""
        name = self._namer.value(f"{node.name}/opset_{role}")
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            const_value=ir.tensor(array, name=name),
        )
        graph_of(node).register_initializer(value)
        return value

    def insert(
        self,
        node: ir.Node,
        op_type: str,
        inputs: list[ir.Value | None],
        attributes: Mapping[str, int] | None = None,
        *,
        after: bool = False,
    ) -> ir.Value:
        """Insert a node of one output before (or after) ``node`` and return the output."""
        role = op_type.lower()
        made = ir.node(
            op_type,
            inputs,
            attributes=attributes,
            name=self._namer.node(f"{node.name}/opset_{role}"),
        )
        made.outputs[0].name = self._namer.value(f"{node.name}/opset_{role}_output")
        graph = graph_of(node)
        if after:
            graph.insert_after(node, made)
        else:
            graph.insert_before(node, made)
        return made.outputs[0]


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph that owns a node."""
    if not isinstance(node.graph, ir.Graph):
        raise CannotUpgradeError("it is inside a function")
    return node.graph


def _ints(values: ir.Attr) -> npt.NDArray[np.int64]:
    return np.asarray(values.as_ints(), dtype=np.int64)


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _text(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_string()


def _float_type(node: ir.Node) -> np.dtype[np.generic]:
    """The element type of the first input, for constants that must match it."""
    value = node.inputs[0]
    dtype = None if value is None else value.dtype
    if dtype is None and node.outputs:
        dtype = node.outputs[0].dtype
    if dtype is None:
        raise CannotUpgradeError("the element type of its input is not known")
    return np.dtype(dtype.numpy())


def _axes_to_input(node: ir.Node, editor: Editor) -> None:
    """Squeeze, Unsqueeze, Reduce*: ``axes`` became input 1; none or empty still means all."""
    axes = node.attributes.pop("axes", None)
    if axes is not None and len(_ints(axes)):
        editor.add_input(node, 1, "axes", _ints(axes))


def _split_to_input(node: ir.Node, editor: Editor) -> None:
    """Split 13: ``split`` became input 1."""
    sizes = node.attributes.pop("split", None)
    if sizes is not None:
        editor.add_input(node, 1, "split", _ints(sizes))


def _split_count(node: ir.Node, editor: Editor) -> None:
    """Split 18: without sizes the number of outputs must be said."""
    del editor
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _clip_to_inputs(node: ir.Node, editor: Editor) -> None:
    """Clip 11: ``min`` and ``max`` became inputs 1 and 2."""
    for index, name in ((1, "min"), (2, "max")):
        bound = node.attributes.pop(name, None)
        if bound is not None:
            array = np.asarray(bound.as_float(), dtype=np.float32).astype(_float_type(node))
            editor.add_input(node, index, name, array)


def _dropout_outputs(node: ir.Node, editor: Editor) -> None:
    """Dropout 10: the mask became boolean."""
    del editor
    if len(node.outputs) > 1:
        if node.outputs[1].uses() or node.outputs[1].is_graph_output():
            raise CannotUpgradeError("its mask is used, whose type changed")
        node.resize_outputs(1)


def _dropout_to_input(node: ir.Node, editor: Editor) -> None:
    """Dropout 12: ``ratio`` became input 1 (it has no effect outside of training)."""
    ratio = node.attributes.pop("ratio", None)
    if ratio is not None:
        editor.add_input(node, 1, "ratio", np.asarray(ratio.as_float(), dtype=np.float32))


def _batch_norm_spatial(node: ir.Node, editor: Editor) -> None:
    """BatchNormalization 9: ``spatial=0`` (statistics per element) is gone."""
    del editor
    spatial = node.attributes.pop("spatial", None)
    if spatial is not None and spatial.as_int() != 1:
        raise CannotUpgradeError("it normalizes each element on its own (spatial=0)")


def _batch_norm_outputs(node: ir.Node, editor: Editor) -> None:
    """BatchNormalization 14: outputs 1 to 4 exist in training mode only."""
    del editor
    if any(o.uses() or o.is_graph_output() for o in node.outputs[1:]):
        raise CannotUpgradeError("its training outputs are used")
    if len(node.outputs) > 1:
        node.resize_outputs(1)


def _pad_to_inputs(node: ir.Node, editor: Editor) -> None:
    """Pad 11: ``pads`` and ``value`` became inputs 1 and 2."""
    pads, fill = node.attributes.pop("pads"), node.attributes.pop("value", None)
    editor.add_input(node, 1, "pads", _ints(pads))
    if fill is not None and fill.as_float() != 0.0:
        array = np.asarray(fill.as_float(), dtype=np.float32).astype(_float_type(node))
        editor.add_input(node, 2, "value", array)


def _slice_to_inputs(node: ir.Node, editor: Editor) -> None:
    """Slice 10: ``starts``, ``ends`` and ``axes`` became inputs 1 to 3."""
    for index, name in ((1, "starts"), (2, "ends"), (3, "axes")):
        values = node.attributes.pop(name, None)
        if values is not None:
            editor.add_input(node, index, name, _ints(values))


def _topk_to_input(node: ir.Node, editor: Editor) -> None:
    """TopK 10: ``k`` became input 1."""
    count = node.attributes.pop("k").as_int()
    editor.add_input(node, 1, "k", np.asarray([count], dtype=np.int64))


def _upsample_to_inputs(node: ir.Node, editor: Editor) -> None:
    """Upsample 9: ``scales`` became input 1."""
    scales = np.asarray(node.attributes.pop("scales").as_floats(), dtype=np.float32)
    editor.add_input(node, 1, "scales", scales)


def _to_resize(node: ir.Node, editor: Editor) -> None:
    """Resize 11, for Upsample 9 and Resize 10: X, scales -> X, roi, scales.

    The old operators are ``asymmetric`` with source index ``floor(i / scale)``; onnxruntime rounds
    up instead where it shrinks (scale < 1), and so do we, as users of such models saw this.
    """
    del editor
    scales_value = node.inputs[1]
    mode = _text(node, "mode", "nearest")
    node.op_type = "Resize"
    node.resize_inputs(3)
    node.replace_input_with(2, scales_value)
    node.replace_input_with(1, None)
    node.attributes["mode"] = ir.AttrString("mode", "nearest" if mode == "nearest" else "linear")
    node.attributes["coordinate_transformation_mode"] = ir.AttrString(
        "coordinate_transformation_mode", "asymmetric"
    )
    if mode != "nearest":
        return
    scales = constant_of(scales_value)
    if scales is None:
        raise CannotUpgradeError("its scales are computed while running")
    factors = scales.astype(np.float64)
    shrinks, grows = bool(np.any(factors < 1)), bool(np.any(factors > 1))
    if shrinks and grows:
        raise CannotUpgradeError(f"its scales {factors.tolist()} shrink one axis and grow another")
    node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "ceil" if shrinks else "floor")


def _resize_modes(node: ir.Node, editor: Editor) -> None:
    """Resize 13: one coordinate mode was removed."""
    del editor
    mode = _text(node, "coordinate_transformation_mode", "half_pixel")
    if mode == "tf_half_pixel_for_nn":
        raise CannotUpgradeError(f"its coordinate mode {mode} was removed")


def _softmax_axis(node: ir.Node, editor: Editor) -> None:
    """Softmax, LogSoftmax, Hardmax 13: from "all axes from ``axis`` on, flattened" to one axis.

    The same where the axes after ``axis`` have length 1; else Flatten, the operator over the last
    axis, and Reshape to the shape of the input.
    """
    value, output = node.inputs[0], node.outputs[0]
    if value is None:
        raise CannotUpgradeError("it has no input")
    axis = _integer(node, "axis", 1)
    shape = value.shape
    rank = None if shape is None else len(shape)
    if rank is not None:
        axis = axis + rank if axis < 0 else axis
    if shape is not None and rank is not None and all(d == 1 for d in shape[axis + 1 :]):
        node.attributes["axis"] = ir.AttrInt64("axis", -1 if axis == rank - 1 else axis)
        return
    if rank is None and axis == -1:
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
        return
    flat = editor.insert(node, "Flatten", [value], {"axis": axis})
    node.replace_input_with(0, flat)
    node.attributes["axis"] = ir.AttrInt64("axis", -1)
    _restore_shape(node, output, value, editor)


def _restore_shape(node: ir.Node, output: ir.Value, like: ir.Value, editor: Editor) -> None:
    """Append a Reshape of ``output`` to the shape of ``like``; it takes over the output's name."""
    if like.shape is not None and like.shape.is_static():
        target = editor.constant(node, "shape", np.asarray(like.shape.numpy(), dtype=np.int64))
    else:
        target = editor.insert(node, "Shape", [like])
    take_over(node, output, editor.insert(node, "Reshape", [output, target], after=True))


def take_over(node: ir.Node, old: ir.Value, new: ir.Value) -> None:
    """Give ``new`` the name, type, uses (but in its producer) and graph outputs of ``old``."""
    maker = new.producer()
    new.shape, new.type = old.shape, old.type
    for user, index in list(old.uses()):
        if user is not maker:
            user.replace_input_with(index, new)
    graph = graph_of(node)
    for index, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[index] = new
    old.name, new.name = new.name, old.name
    old.shape, old.type = None, None


def _scatter_elements(node: ir.Node, editor: Editor) -> None:
    """Scatter 11: renamed."""
    del editor
    node.op_type = "ScatterElements"


def _roi_align_mode(node: ir.Node, editor: Editor) -> None:
    """RoiAlign 16: the default became ``half_pixel``; it had always been ``output_half_pixel``."""
    del editor
    name = "coordinate_transformation_mode"
    node.attributes[name] = ir.AttrString(name, "output_half_pixel")


def _dft_axis(node: ir.Node, editor: Editor) -> None:
    """DFT 20: ``axis`` became input 2, with another default."""
    axis = _integer(node, "axis", 1)
    node.attributes.pop("axis", None)
    editor.add_input(node, 2, "axis", np.asarray(axis, dtype=np.int64))


def _grid_sample_mode(node: ir.Node, editor: Editor) -> None:
    """GridSample 20: modes were renamed."""
    del editor
    renamed = {"bilinear": "linear", "bicubic": "cubic"}
    mode = _text(node, "mode", "bilinear")
    node.attributes["mode"] = ir.AttrString("mode", renamed.get(mode, mode))


def _group_norm_channels(node: ir.Node, editor: Editor) -> None:
    """GroupNormalization 21: scale and bias became one per channel, not one per group."""
    value = node.inputs[0]
    channels = value.shape[1] if value is not None and value.shape is not None else None
    groups = _integer(node, "num_groups", 1)
    for index, role in ((1, "scale"), (2, "bias")):
        array = constant_of(node.inputs[index])
        if array is None or not isinstance(channels, int):
            raise CannotUpgradeError(
                "its scale and bias per group, or its channels, are not constant"
            )
        editor.add_input(node, index, role, np.repeat(array, channels // groups))


def _pool_ceil(node: ir.Node, editor: Editor) -> None:
    """AveragePool 19: padding counted in the last, partial window changed."""
    del editor
    if _integer(node, "ceil_mode", 0) and _integer(node, "count_include_pad", 0):
        raise CannotUpgradeError("it counts padding in partial windows, whose meaning changed")


def _scan_axes(node: ir.Node, editor: Editor) -> None:
    """Scan 9: the batch axis was removed."""
    del node, editor
    raise CannotUpgradeError("it scans with a batch axis, which was removed")


@dataclass(frozen=True, slots=True)
class Step:
    """One rewriting.

    Attributes:
        version: The opset in which the definition changed.
        rewrite: Turns a node of the version before into one of this version.
    """

    version: int
    rewrite: Callable[[ir.Node, Editor], None]


_REDUCE_18 = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")

ADAPTERS: Mapping[str, tuple[Step, ...]] = {
    "AveragePool": (Step(19, _pool_ceil),),
    "BatchNormalization": (Step(9, _batch_norm_spatial), Step(14, _batch_norm_outputs)),
    "Clip": (Step(11, _clip_to_inputs),),
    "DFT": (Step(20, _dft_axis),),
    "Dropout": (Step(10, _dropout_outputs), Step(12, _dropout_to_input)),
    "GridSample": (Step(20, _grid_sample_mode),),
    "GroupNormalization": (Step(21, _group_norm_channels),),
    "Hardmax": (Step(13, _softmax_axis),),
    "LogSoftmax": (Step(13, _softmax_axis),),
    "Pad": (Step(11, _pad_to_inputs),),
    "ReduceSum": (Step(13, _axes_to_input),),
    **{f"Reduce{name}": (Step(18, _axes_to_input),) for name in _REDUCE_18},
    "Resize": (Step(11, _to_resize), Step(13, _resize_modes)),
    "RoiAlign": (Step(16, _roi_align_mode),),
    "Scan": (Step(9, _scan_axes),),
    "Scatter": (Step(11, _scatter_elements),),
    "Slice": (Step(10, _slice_to_inputs),),
    "Softmax": (Step(13, _softmax_axis),),
    "Split": (Step(13, _split_to_input), Step(18, _split_count)),
    "Squeeze": (Step(13, _axes_to_input),),
    "TopK": (Step(10, _topk_to_input),),
    "Unsqueeze": (Step(13, _axes_to_input),),
    "Upsample": (Step(9, _upsample_to_inputs), Step(10, _to_resize)),
}
"""Operator to its steps, in the order of their versions."""
