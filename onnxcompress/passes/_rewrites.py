"""The rewrites of the simplify pass: canonical form, folding, onnxscript's rules, clean-up.

The list of rules is our own. Those that fold BatchNormalization, factors and biases are left out:
the fold pass does it in float64 and says what it refused. So are those that only turn one operator
into another (Flatten to Reshape, Gemm to MatMul and Add), and those for x + 0 and x · 1: they take
a constant near to 0 for 0, and with it the 1e-12 that keeps a normalization from dividing by 0, and
without which onnxruntime no longer sees that it is one.
"""

from __future__ import annotations

import enum
import math

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

from onnxcompress import model_io
from onnxcompress.graph.canonical import canonicalize
from onnxcompress.graph.constants import constant_of, constant_tensor
from onnxcompress.passes._hard_sigmoid import write_hard_sigmoids
from onnxcompress.passes._slices import split_inputs
from onnxcompress.passes._subexpressions import drop_unused_constants, merge_equal_nodes
from onnxcompress.passes._views import merge_views

# A constant of up to this many elements may be a shape, an axis list or a padding.
_SHAPE_ELEMENTS = 64
# Equal constants up to this many elements are merged; to tie larger ones is another pass's choice.
_EQUAL_ELEMENTS = 65_536
_ROUNDS = 8

_RULES = (
    rules.dropout_inference_rule,
    rules.dropout_zero_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.no_op_static_scatter_nd_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.slice_split_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.fuse_pad_into_conv_rule,
    rules.fuse_pad_into_conv_integer_rule,
    rules.normalize_pad_format_conv_rule,
    rules.normalize_pad_format_conv_integer_rule,
    rules.successive_relu_rule,
    rules.successive_clip_rule,
    rules.successive_clip_relu_rule,
    rules.successive_relu_clip_rule,
    rules.min_min_rule,
    rules.max_max_rule,
    rules.min_max_rule,
    rules.max_min_rule,
    rules.remove_optional_bias_from_conv_rule,
    rules.remove_optional_bias_from_conv_transpose_rule,
    rules.remove_optional_bias_from_gemm_rule,
    rules.remove_optional_bias_from_qlinear_conv_rule,
)

# Operators that pass one operand on where the other is this number, and the places it may stand at.
_NEUTRAL = {"Add": (0, (0, 1)), "Sub": (0, (1,)), "Mul": (1, (0, 1)), "Div": (1, (1,))}

# Writes Reshape with `allowzero`, an attribute of opset 14.
_RULES_14 = (*_RULES, rules.materialize_reshape_shape_rule)


class RewriteError(Exception):
    """A rewrite failed; the message says how."""


class Level(enum.Enum):
    """How far to go, from everything to what cannot change a result."""

    FULL = "folding and rewriting"
    SHAPES = "folding of shape arithmetic"
    CLEAN = "removal of what is unused or double"


def rewrite(model: ir.Model, level: Level, *, max_folded_bytes: int) -> None:
    """Simplify in place, without any check of the result.

    Args:
        model: The model; give a copy.
        level: How far to go.
        max_folded_bytes: Constants above this size are neither folded nor made.

    Raises:
        RewriteError: If a rewrite fails; the model is then of no use.
    """
    try:
        if level is not Level.CLEAN:
            canonicalize(model)
            split_inputs(model)
        for _ in range(_ROUNDS):
            before = _signature(model)
            _remove_identities(model)
            if level is not Level.CLEAN:
                _fold(model, level, max_folded_bytes)
                merge_views(model)
            if level is Level.FULL:
                write_hard_sigmoids(model)
                opset = model.opset_imports.get("", 0)
                RewritePass(_RULES_14 if opset >= 14 else _RULES)(model)
            # Equal constants have to be one before equal nodes can be seen.
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            common.DeduplicateInitializersPass(size_limit=_EQUAL_ELEMENTS)(model)
            merge_equal_nodes(model)
            common.RemoveUnusedNodesPass()(model)
            drop_unused_constants(model)
            model_io.name_nodes(model)
            if _signature(model) == before:
                break
            model_io.infer_shapes(model)
        common.OutputFixPass()(model)
        common.NameFixPass()(model)
    except Exception as error:  # whatever a foreign optimizer raises, the original is at hand
        raise RewriteError(f"it failed with {type(error).__name__}: {error}") from error


def _passed_on(node: ir.Node) -> ir.Value | None:
    """The input that ``node`` passes on: of Identity, x + 0, x - 0, x · 1 and x / 1, exactly."""
    if node.domain:
        return None
    if node.op_type == "Identity":
        return node.inputs[0]
    number, places = _NEUTRAL.get(node.op_type, (0, ()))
    for place in places:
        data, constant = node.inputs[1 - place], constant_of(node.inputs[place])
        if data is None or constant is None or constant.size != 1 or constant != number:
            continue
        if constant.ndim == 0 or (data.shape is not None and len(data.shape) >= constant.ndim):
            return data  # otherwise the constant may add an axis
    return None


def _remove_identities(model: ir.Model) -> None:
    """Let users of what only passes its input on read that, where the graph's outputs allow it."""
    for graph in model.graphs():
        for node in list(graph):
            source, copy = _passed_on(node), node.outputs[0]
            if source is None:
                continue
            if copy.is_graph_output():
                # The value takes the output's place and name, if it is a value of this graph's own.
                producer = source.producer()
                if producer is None or producer.graph is not graph or source.is_graph_output():
                    continue
                name = copy.name
                copy.replace_all_uses_with(source, replace_graph_outputs=True)
                graph.remove(node, safe=True)
                source.name = name
            else:
                copy.replace_all_uses_with(source)
                graph.remove(node, safe=True)


def _signature(model: ir.Model) -> tuple[tuple[str | None, str], ...]:
    return tuple((node.name, node.op_type) for node in model.graph.all_nodes())


def _fold(model: ir.Model, level: Level, max_folded_bytes: int) -> None:
    limit = max_folded_bytes if level is Level.FULL else _SHAPE_ELEMENTS * 8

    def should_fold(node: ir.Node) -> bool | None:
        """No where it would copy a weight or enlarge the file; None: onnxscript's own rule."""
        if node.op_type == "ConstantOfShape":
            lengths = constant_of(node.inputs[0])
            return lengths is not None and math.prod(lengths.tolist()) <= _SHAPE_ELEMENTS
        for value in node.inputs:
            tensor = constant_tensor(value)
            if value is None or tensor is None or tensor.size <= _SHAPE_ELEMENTS:
                continue
            if tensor.nbytes > limit or len(value.uses()) > 1 or _widens(node, tensor):
                return False
        return None

    fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=limit,
        output_size_limit=limit // 4,
        should_fold=should_fold,
    )


def _widens(node: ir.Node, tensor: ir.TensorProtocol) -> bool:
    """Whether a Cast would store the constant in a wider type, undoing half precision."""
    if node.op_type != "Cast" or node.domain:
        return False
    return ir.DataType(node.attributes["to"].as_int()).bitwidth > tensor.dtype.bitwidth


def strip_metadata(graph: ir.Graph) -> None:
    """Remove what onnxsim and onnxscript note about their work in the graph's metadata."""
    stores = [graph.metadata_props]
    stores += [value.metadata_props for value in graph.initializers.values()]
    for node in graph.all_nodes():
        stores += [node.metadata_props, *(value.metadata_props for value in node.outputs)]
    for store in stores:
        for key in [k for k in store if k.startswith(("onnxsim", "pkg.onnxscript"))]:
            del store[key]
