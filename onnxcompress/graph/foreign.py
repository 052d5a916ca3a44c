"""Output shapes of onnxruntime's own operators, for which onnx has no shape inference."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir

Dims = tuple[int | None, ...]

# The first output is like the first input, and so are these further ones.
_LIKE_INPUT: dict[str, tuple[int, ...]] = {
    "BiasAdd": (0,),
    "BiasGelu": (0,),
    "BiasSoftmax": (0,),
    "FastGelu": (0,),
    "Gelu": (0,),
    "GroupNorm": (0,),
    "QuickGelu": (0,),
    "RotaryEmbedding": (0,),
    "SimplifiedLayerNormalization": (0,),
    "SkipGroupNorm": (0, 1),
    "SkipLayerNormalization": (0, 3),
    "SkipSimplifiedLayerNormalization": (0, 3),
    "Trilu": (0,),
}

# Fused operators that are a standard one with more attributes and inputs.
_STANDARD_FORM: dict[str, tuple[str, int, frozenset[str]]] = {
    "FusedConv": (
        "Conv",
        3,
        frozenset({"auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"}),
    ),
    "FusedGemm": ("Gemm", 3, frozenset({"alpha", "beta", "transA", "transB"})),
}


def standard_form(proto: onnx.NodeProto) -> onnx.NodeProto | None:
    """A node of the default domain with the same output shape; None if there is none.

    Args:
        proto: A node of onnxruntime's domain.
    """
    found = _STANDARD_FORM.get(proto.op_type)
    if found is None or proto.domain != "com.microsoft":
        return None
    op_type, inputs, names = found
    plain = onnx.NodeProto(op_type=op_type, name=proto.name)
    plain.input.extend(proto.input[:inputs])
    plain.output.extend(proto.output)
    plain.attribute.extend(a for a in proto.attribute if a.name in names)
    return plain


def output_shapes(node: ir.Node, inputs: Sequence[Dims | None]) -> list[Dims | None] | None:
    """Shapes of the outputs; None where they are not known.

    Args:
        node: A node without shape inference of its own.
        inputs: Shapes of its inputs, None for absent and unknown ones.
    """
    first = inputs[0] if inputs else None
    own = node.domain == "com.microsoft" or node.op_type == "SimplifiedLayerNormalization"
    if first is None or not own:
        return None
    like = _LIKE_INPUT.get(node.op_type)
    if like is not None:
        return [first if i in like else None for i in range(len(node.outputs))]
    if node.op_type in {"FusedMatMul", "TransposeMatMul"}:
        return [_product(node, first, inputs[1])]
    if node.op_type in _ATTENTION:
        width, heads = _attention_width(node, inputs)
        if len(first) != 3 or width is None:
            return None
        cache = (first[0], heads, None, None)
        if node.op_type == "Attention":
            cache = (2, first[0], heads, None, None)  # type: ignore[assignment]
        caches = [cache] * (len(node.outputs) - 1)
        return [(first[0], first[1], width), *caches[:2]]
    return None


_ATTENTION = frozenset({"Attention", "GroupQueryAttention", "MultiHeadAttention"})


def _product(node: ir.Node, a: Dims, b: Dims | None) -> Dims | None:
    if b is None or len(a) < 2 or len(b) < 2:
        return None
    if node.attributes.get_int("transBatchA", 0) or node.attributes.get_int("transBatchB", 0):
        return None
    rows = a[-1] if node.attributes.get_int("transA", 0) else a[-2]
    columns = b[-2] if node.attributes.get_int("transB", 0) else b[-1]
    batch: list[int | None] = []
    rank = max(len(a), len(b)) - 2
    for place in range(-rank, 0):
        ends = [s[:-2][place] for s in (a, b) if len(s) - 2 >= -place]
        wide = [d for d in ends if d != 1]
        batch.append(wide[0] if wide else 1)
    return (*batch, rows, columns)


def _attention_width(node: ir.Node, inputs: Sequence[Dims | None]) -> tuple[int | None, int | None]:
    """Width of the output and number of heads in the cache."""
    heads = node.attributes.get_int("num_heads", 0)
    first = inputs[0] or ()
    if node.op_type == "Attention":
        weight = inputs[1]
        if weight is None or weight[1] is None:
            return None, heads
        sizes = node.attributes.get_ints("qkv_hidden_sizes")
        return (sizes[2] if sizes else weight[1] // 3), heads
    if node.op_type == "GroupQueryAttention":
        keys = node.attributes.get_int("kv_num_heads", 0)
        packed = len(inputs) < 2 or inputs[1] is None
        if not first or first[-1] is None or not heads:
            return None, keys
        return (first[-1] // (heads + 2 * keys) * heads if packed else first[-1]), keys
    value = inputs[2] if len(inputs) > 2 else None
    if value is None:
        return None, heads
    if len(value) == 4:
        return (None if None in value[1::2] else (value[1] or 0) * (value[3] or 0)), heads
    return value[-1], heads
