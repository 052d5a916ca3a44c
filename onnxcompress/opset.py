"""Raise the operator set of a model, node by node, without leaving onnx_ir.

The converters of ``onnx`` and ``onnxscript`` do not fit: onnx's wants all weights in one message
and converts some operators wrongly without a word (docs/adr/0001-onnx-ir.md); onnxscript's begins
at opset 18. Here an operator whose definition changed between two versions is in one of two tables:
:data:`COMPATIBLE` (the old node means the same in the new version) or
:data:`~onnxcompress.opset_adapters.ADAPTERS` (a function rewrites the node). An operator that
changed and is in neither, or an adapter that meets a case with no equivalent, stops the conversion
with the reason.

Source: the version tables of the operator schemas in onnx/docs/Changelog.md.
"""

from __future__ import annotations

import functools

import onnx
import onnx_ir as ir

from onnxcompress.errors import ModelError
from onnxcompress.graph.naming import Namer
from onnxcompress.opset_adapters import ADAPTERS, CannotUpgradeError, Editor

OLDEST = 7
"""The oldest opset that can be raised; onnxruntime guarantees nothing below it."""

NEWEST = 21
"""The newest opset that can be reached (the first with blockwise and 4-bit quantization)."""

_COMPATIBLE_NAMES = """
Abs Add And ArgMax ArgMin Cast CastLike Ceil Compress Concat Constant ConstantOfShape Conv
ConvTranspose CumSum DepthToSpace DequantizeLinear Div Equal Erf Exp Expand Flatten Floor GRU
Gather GatherElements GatherND Gemm Greater GreaterOrEqual Identity If IsInf IsNaN LRN LSTM
LeakyRelu Less LessOrEqual Log Loop LpPool MatMul Max MaxPool MaxUnpool Mean
MeanVarianceNormalization Min Mod Mul Neg NegativeLogLikelihoodLoss NonMaxSuppression NonZero
OneHot OptionalGetElement OptionalHasElement PRelu Pow QLinearMatMul QuantizeLinear RNN
Reciprocal Relu Reshape ScatterElements ScatterND Shape Sigmoid Sign Size
SoftmaxCrossEntropyLoss SpaceToDepth Sqrt Sub Sum Tanh ThresholdedRelu Tile Transpose Where
"""

COMPATIBLE = frozenset(_COMPATIBLE_NAMES.split())
"""Operators that changed between opset 7 and 21 only by more types, or by optional parts whose
default is the old meaning."""


@functools.cache
def _since(op_type: str, opset: int) -> int | None:
    """When the definition of an operator valid at ``opset`` was made; None if there is none."""
    try:
        return int(onnx.defs.get_schema(op_type, opset).since_version)
    except onnx.defs.SchemaError:
        return None


def _deprecated(op_type: str, opset: int) -> bool:
    return _since(op_type, opset) is None or bool(onnx.defs.get_schema(op_type, opset).deprecated)


def upgrade(model: ir.Model, target: int) -> None:
    """Raise the ai.onnx opset of ``model`` to ``target``, in place, subgraphs included.

    On an error the model is left half converted: give a clone. Functions must have been inlined.

    Args:
        model: A model of opset 7 or newer, shapes inferred.
        target: From the present opset to 21.

    Raises:
        ModelError: If a node has no equivalent; it is named with the reason.
    """
    source = model.opset_imports.get("")
    if source is None or source >= target:
        return
    if source < OLDEST or target > NEWEST:
        raise ModelError(
            f"opset {source} cannot be raised to {target}: only {OLDEST} to {NEWEST} can"
        )
    editor = Editor(Namer(model))
    for node in list(model.graph.all_nodes()):
        if node.domain == "":
            _upgrade_node(node, source, target, editor)
        node.version = None
    model.opset_imports[""] = target


def _upgrade_node(node: ir.Node, source: int, target: int, editor: Editor) -> None:
    before, after = _since(node.op_type, source), _since(node.op_type, target)
    try:
        if before is None:
            raise CannotUpgradeError(f"there is no such operator in opset {source}")
        steps = [step for step in ADAPTERS.get(node.op_type, ()) if source < step.version <= target]
        if before != after and not steps and node.op_type not in COMPATIBLE | ADAPTERS.keys():
            raise CannotUpgradeError("its definition changed in a way that is not covered")
        for step in steps:
            step.rewrite(node, editor)
        if before != after and _deprecated(node.op_type, target):
            raise CannotUpgradeError("it was removed")
    except CannotUpgradeError as error:
        raise ModelError(
            f"{node.op_type} node '{node.name}' cannot be raised from opset {source} to {target}: "
            f"{error}",
            hint="Export the model again with a newer opset.",
        ) from error
