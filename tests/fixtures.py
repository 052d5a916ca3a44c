"""Small models that cover the topologies and operators of real ones, for tests over all of them.

``FIXTURES`` is the literal list; ``@pytest.mark.parametrize("fixture", RUNNABLE, ids=str)`` runs a
test over every model that onnxruntime can run. Weights are seeded by the fixture's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from tests.builder import Array, ModelBuilder


@dataclass(frozen=True, slots=True)
class Fixture:
    """One model and how to feed it.

    Attributes:
        name: What tests call it.
        build: Makes the model anew; every call gives the same one.
        axes: Lengths of dynamic axes in :meth:`feeds` (2 where not given).
        integers: Upper bound (exclusive) of the values of integer inputs.
        runs: Whether onnxruntime can run it.
    """

    name: str
    build: Callable[[], ir.Model]
    axes: Mapping[str, int] = field(default_factory=dict)
    integers: int = 10
    runs: bool = True

    def __str__(self) -> str:
        return self.name

    def feeds(
        self, model: ir.Model | None = None, *, batch: int = 2, seed: int = 0
    ) -> dict[str, Array]:
        """Seeded inputs: normal floats, integers within bounds, booleans.

        Args:
            model: The model to feed, if it is at hand; it is built otherwise.
            batch: Length of dynamic axes that ``axes`` does not name.
            seed: Seed of the values.
        """
        rng = np.random.default_rng(seed)
        feeds: dict[str, Array] = {}
        graph = (model or self.build()).graph
        for value in graph.inputs:
            if value.name in graph.initializers or value.name is None:
                continue
            assert value.shape is not None
            assert value.dtype is not None
            shape = [
                d if isinstance(d, int) else self.axes.get(d.value or "", batch)
                for d in value.shape
            ]
            dtype = value.dtype.numpy()
            if dtype.kind in "iu":
                feeds[value.name] = np.asarray(rng.integers(0, self.integers, shape), dtype)
            elif dtype.kind == "b":
                feeds[value.name] = np.asarray(rng.random(shape) < 0.5)
            else:
                feeds[value.name] = np.asarray(rng.standard_normal(shape), dtype)
        return feeds


# --- convolutional networks
# --------------------------------------------------------------------------


def conv_chain() -> ir.Model:
    b = ModelBuilder("conv_chain")
    x = b.input("x", ["batch", 3, 16, 16])
    y = b.op("Relu", b.conv(x, 3, 8))
    y = b.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    y = b.op("Relu", b.conv(y, 8, 12))
    y = b.op("AveragePool", y, kernel_shape=[2, 2], strides=[2, 2])
    b.output(b.gemm(b.op("Flatten", y), 12 * 16, 10))
    return b.build()


def _residual(b: ModelBuilder, x: str, channels: int, width: int, stride: int) -> str:
    y = b.batch_norm(b.conv(x, channels, width, stride=stride, bias=False), width)
    y = b.batch_norm(b.conv(b.op("Relu", y), width, width, bias=False), width)
    if stride != 1 or channels != width:
        x = b.batch_norm(b.conv(x, channels, width, 1, stride=stride, bias=False), width)
    return b.op("Relu", b.op("Add", y, x))


def residual_bn() -> ir.Model:
    b = ModelBuilder("residual_bn")
    x = b.input("x", ["batch", 3, 12, 12])
    y = b.op("Relu", b.batch_norm(b.conv(x, 3, 8, bias=False), 8))
    y = _residual(b, y, 8, 8, 1)
    y = _residual(b, y, 8, 16, 2)
    y = b.op("Flatten", b.op("GlobalAveragePool", y))
    b.output(b.gemm(y, 16, 10))
    return b.build()


def depthwise_separable() -> ir.Model:
    b = ModelBuilder("depthwise_separable")
    x = b.input("x", ["batch", 3, 12, 12])
    low, high = b.constant(0.0), b.constant(6.0)
    y = b.op("Clip", b.conv(x, 3, 8, stride=2), low, high)
    for channels, width in ((8, 16), (16, 16)):
        y = b.op("Clip", b.conv(y, channels, channels, groups=channels), low, high)
        y = b.op("Clip", b.conv(y, channels, width, 1), low, high)
    y = b.op("Squeeze", b.op("GlobalAveragePool", y), b.constant([2, 3]))
    b.output(b.op("Softmax", b.gemm(y, 16, 10), axis=-1))
    return b.build()


def inception_concat() -> ir.Model:
    b = ModelBuilder("inception_concat")
    x = b.input("x", ["batch", 3, 10, 10])
    stem = b.op("Relu", b.conv(x, 3, 8))
    one = b.op("Relu", b.conv(stem, 8, 4, 1))
    three = b.op("Relu", b.conv(b.op("Relu", b.conv(stem, 8, 6, 1)), 6, 8))
    pooled = b.op("MaxPool", stem, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    pooled = b.op("Relu", b.conv(pooled, 8, 4, 1))
    joined = b.op("Concat", one, three, pooled, axis=1)
    y = b.op("GlobalAveragePool", b.conv(b.op("Dropout", joined), 16, 10, 1))
    b.output(b.op("Reshape", y, b.constant([-1, 10])))
    return b.build()


def squeeze_excite() -> ir.Model:
    b = ModelBuilder("squeeze_excite")
    x = b.input("x", ["batch", 3, 10, 10])
    y = b.op("HardSwish", b.conv(x, 3, 16))
    gate = b.op("Relu", b.conv(b.op("GlobalAveragePool", y), 16, 4, 1))
    gate = b.op("HardSigmoid", b.conv(gate, 4, 16, 1), alpha=1 / 6)
    y = b.conv(b.op("Mul", y, gate), 16, 8, 1)
    b.output(b.op("ReduceMean", y, axes=[2, 3], keepdims=0))
    return b.build()


def grouped_shuffle() -> ir.Model:
    b = ModelBuilder("grouped_shuffle")
    x = b.input("x", ["batch", 4, 8, 8])
    y = b.op("Relu", b.conv(x, 4, 8, 1))
    y = b.op("Relu", b.conv(y, 8, 8, groups=2))
    y = b.op("Reshape", y, b.constant([0, 2, 4, 8, 8]))
    y = b.op("Transpose", y, perm=[0, 2, 1, 3, 4])
    y = b.op("Reshape", y, b.constant([0, 8, 8, 8]))
    y = b.op("Relu", b.conv(y, 8, 12, groups=4))
    b.output(b.gemm(b.op("Flatten", b.op("GlobalMaxPool", y)), 12, 5))
    return b.build()


def unet() -> ir.Model:
    b = ModelBuilder("unet")
    x = b.input("x", ["batch", 1, "height", "width"])
    top = b.op("Relu", b.batch_norm(b.conv(x, 1, 8), 8))
    down = b.op("MaxPool", top, kernel_shape=[2, 2], strides=[2, 2])
    down = b.op("LeakyRelu", b.conv(down, 8, 16), alpha=0.1)
    up = b.op(
        "ConvTranspose",
        down,
        b.weight(16, 8, 2, 2, fan_in=16),
        b.weight(8, fan_in=16),
        kernel_shape=[2, 2],
        strides=[2, 2],
    )
    up = b.op("Relu", b.batch_norm(up, 8))
    y = b.op("Relu", b.conv(b.op("Concat", up, top, axis=1), 16, 8))
    b.output(b.op("Sigmoid", b.conv(y, 8, 2, 1)))
    return b.build()


def conv_1d_3d() -> ir.Model:
    b = ModelBuilder("conv_1d_3d")
    x = b.input("x", ["batch", 4, 20])
    z = b.input("z", ["batch", 2, 4, 4, 4])
    y = b.op("Tanh", b.batch_norm(b.conv(x, 4, 6, rank=1), 6))
    y = b.op("ReduceMax", b.conv(y, 6, 5, 1, rank=1), axes=[2], keepdims=0)
    w = b.op("Elu", b.batch_norm(b.conv(z, 2, 4, rank=3), 4))
    w = b.op("ReduceMean", b.conv(w, 4, 5, 1, rank=3), axes=[2, 3, 4], keepdims=0)
    b.output(b.op("Add", y, w))
    return b.build()


def conv_activations() -> ir.Model:
    b = ModelBuilder("conv_activations")
    x = b.input("x", ["batch", 3, 8, 8])
    y = b.op("PRelu", b.conv(x, 3, 8), b.weight(8, 1, 1, low=0.1))
    y = b.op("Selu", b.conv(y, 8, 8))
    y = b.conv(y, 8, 8)
    y = b.op("Mul", y, b.op("Sigmoid", y))
    y = b.op("Softplus", b.conv(y, 8, 8))
    y = b.op("ThresholdedRelu", b.conv(y, 8, 8), alpha=0.2)
    y = b.op("LRN", y, size=3)
    b.output(b.op("LogSoftmax", b.op("ReduceMean", y, axes=[2, 3], keepdims=0), axis=1))
    return b.build()


def super_resolution() -> ir.Model:
    b = ModelBuilder("super_resolution")
    x = b.input("x", [1, 1, 8, 8])
    y = b.op("Relu", b.conv(x, 1, 8, 5))
    y = b.op("DepthToSpace", b.conv(y, 8, 16), blocksize=2, mode="CRD")
    wide = b.op("Resize", b.conv(y, 4, 4), "", b.constant([1.0, 1.0, 1.5, 1.5]), mode="linear")
    b.output(b.conv(b.op("SpaceToDepth", wide, blocksize=2), 16, 1))
    return b.build()


def pad_slice_shortcut() -> ir.Model:
    """The parameter-free shortcut of CIFAR ResNets: strided Slice and Pad of the channels."""
    b = ModelBuilder("pad_slice_shortcut")
    x = b.input("x", ["batch", 3, 8, 8])
    y = b.op("Relu", b.conv(x, 3, 6))
    starts, ends = b.constant([0, 0]), b.constant([8, 8])
    cut = b.op("Slice", y, starts, ends, b.constant([2, 3]), b.constant([2, 2]))
    half = b.op("ConstantOfShape", b.constant([2]), value=_int_tensor(0))
    pads = b.op("Concat", b.constant([0, 2]), half, b.constant([0, 2]), half, axis=0)
    padded = b.op("Pad", cut, pads, b.constant(0.0))
    deep = b.conv(b.op("Relu", b.conv(y, 6, 10, stride=2)), 10, 10)
    y = b.op("Relu", b.op("Add", deep, padded))
    b.output(b.gemm(b.op("Flatten", b.op("GlobalAveragePool", y)), 10, 4))
    return b.build()


def nhwc_transposes() -> ir.Model:
    """As tf2onnx writes Keras models: NHWC at the boundary, normalization as Mul and Add."""
    b = ModelBuilder("nhwc_transposes")
    x = b.input("x", ["batch", 8, 8, 3])
    y = b.op("Transpose", x, perm=[0, 3, 1, 2])
    y = b.conv(y, 3, 8, bias=False)
    y = b.op("Mul", y, b.weight(1, 8, 1, 1, low=0.5))
    y = b.op("Relu", b.op("Add", y, b.weight(1, 8, 1, 1)))
    y = b.op("Transpose", y, perm=[0, 2, 3, 1])
    y = b.op("Relu", b.op("Add", y, b.weight(8, fan_in=4)))
    y = b.op("Transpose", y, perm=[0, 3, 1, 2])
    y = b.op("Pad", y, b.constant([0, 0, 0, 0, 0, 0, 1, 1]), b.constant(0.0))
    y = b.op("Transpose", b.conv(y, 8, 6, stride=2, pad=0), perm=[0, 2, 3, 1])
    b.output(b.linear(b.op("ReduceMean", y, axes=[1, 2], keepdims=0), 6, 4))
    return b.build()


def norm_forms() -> ir.Model:
    """Normalization in every place where it can and where it cannot be folded."""
    b = ModelBuilder("norm_forms")
    x = b.input("x", ["batch", 3, 8, 8])
    y = b.conv(b.batch_norm(x, 3), 3, 8, pad=0)  # before a convolution without padding
    y = b.batch_norm(b.op("Relu", y), 8)  # before a convolution with padding
    shared = b.conv(y, 8, 8, bias=False)
    left = b.batch_norm(shared, 8)  # its convolution has two consumers
    y = b.op("Relu", b.op("Add", left, shared))
    y = b.op("Sub", b.conv(y, 8, 8), b.weight(8, 1, 1))
    y = b.op("Div", y, b.weight(8, 1, 1, low=0.5))
    y = b.op("Flatten", b.op("GlobalAveragePool", y))
    y = b.op("Relu", b.batch_norm(b.gemm(y, 8, 12), 12))
    y = b.op("Mul", b.linear(y, 12, 10), b.weight(10, low=0.5))
    y = b.op("Relu", b.op("Add", y, b.weight(10)))
    b.output(b.op("Mul", b.op("MatMul", y, b.weight(10, 4)), b.constant(0.5)))
    return b.build()


def group_instance_norm() -> ir.Model:
    b = ModelBuilder("group_instance_norm")
    x = b.input("x", ["batch", 3, 8, 8])
    y = b.conv(x, 3, 8)
    y = b.op("InstanceNormalization", y, b.weight(8, low=0.5), b.weight(8))
    y = b.conv(b.op("Relu", y), 8, 8)
    grouped = b.op("Reshape", y, b.constant([0, 4, -1]))
    grouped = b.op("InstanceNormalization", grouped, b.constant([1.0] * 4), b.constant([0.0] * 4))
    y = b.op("Reshape", grouped, b.constant([-1, 8, 8, 8]))
    y = b.op("Add", b.op("Mul", y, b.weight(8, 1, 1)), b.weight(8, 1, 1))
    b.output(b.op("GlobalAveragePool", b.conv(b.op("Relu", y), 8, 4)))
    return b.build()


# --- dense, recurrent and attention
# ------------------------------------------------------------------


def mlp_gemm() -> ir.Model:
    b = ModelBuilder("mlp_gemm")
    x = b.input("x", ["batch", 16])
    y = b.op("Relu", b.gemm(x, 16, 24))
    weight, bias = b.weight(24, 12, fan_in=24), b.weight(12)
    y = b.op("Sigmoid", b.op("Gemm", y, weight, bias, alpha=0.5, beta=2.0))
    b.output(b.gemm(y, 12, 3))
    return b.build()


def mlp_matmul() -> ir.Model:
    b = ModelBuilder("mlp_matmul")
    x = b.input("x", ["batch", 16])
    y = x
    for inputs, outputs in ((16, 24), (24, 16)):
        y = b.linear(y, inputs, outputs)
        y = b.op("Mul", y, b.weight(outputs, low=0.5))
        y = b.op("Relu", b.op("Add", y, b.weight(outputs)))
    b.output(b.linear(y, 16, 4))
    return b.build()


def glu_split() -> ir.Model:
    b = ModelBuilder("glu_split")
    x = b.input("x", ["batch", 6, 12])
    value, gate = b.ops("Split", b.linear(x, 12, 32), b.constant([16, 16]), outputs=2, axis=-1)
    y = b.op("Mul", value, b.op("Sigmoid", gate))
    b.output(b.op("Add", b.linear(y, 16, 12), x))
    return b.build()


def einsum() -> ir.Model:
    b = ModelBuilder("einsum")
    x = b.input("x", ["batch", 5, 8])
    y = b.op("Einsum", x, b.weight(8, 2, 6, fan_in=8), equation="bsd,dhk->bhsk")
    scores = b.op("Einsum", y, y, equation="bhsk,bhtk->bhst")
    mixed = b.op("Einsum", b.op("Softmax", scores, axis=-1), y, equation="bhst,bhtk->bshk")
    b.output(b.op("Einsum", mixed, b.weight(2, 6, 8, fan_in=12), equation="...hk,hkd->...d"))
    return b.build()


def _attention(b: ModelBuilder, x: str, width: int, heads: int, split: str) -> str:
    def project(perm: list[int]) -> str:
        y = b.op("Reshape", b.linear(x, width, width), split)
        return b.op("Transpose", y, perm=perm)

    query, key, value = project([0, 2, 1, 3]), project([0, 2, 3, 1]), project([0, 2, 1, 3])
    scores = b.op("Mul", b.op("MatMul", query, key), b.constant((width / heads) ** -0.5))
    mixed = b.op("MatMul", b.op("Softmax", scores, axis=-1), value)
    mixed = b.op("Reshape", b.op("Transpose", mixed, perm=[0, 2, 1, 3]), b.constant([0, 0, width]))
    return b.linear(mixed, width, width)


def _gelu(b: ModelBuilder, x: str) -> str:
    inner = b.op("Erf", b.op("Div", x, b.constant(2**0.5)))
    return b.op("Mul", b.op("Mul", x, b.op("Add", inner, b.constant(1.0))), b.constant(0.5))


def mini_transformer() -> ir.Model:
    """Pre-norm, LayerNormalization as one operator, static Reshape targets."""
    b = ModelBuilder("mini_transformer")
    x = b.input("x", ["batch", 6, 16])
    for _ in range(2):
        y = b.op("LayerNormalization", x, b.weight(16, low=0.5), b.weight(16), axis=-1)
        x = b.op("Add", x, _attention(b, y, 16, 4, b.constant([0, 0, 4, 4])))
        y = b.op("LayerNormalization", x, b.weight(16, low=0.5), b.weight(16), axis=-1)
        x = b.op("Add", x, b.linear(_gelu(b, b.linear(y, 16, 32)), 32, 16))
    b.output(b.gemm(b.op("ReduceMean", x, axes=[1], keepdims=0), 16, 4))
    return b.build()


def _layer_norm(b: ModelBuilder, x: str, width: int) -> str:
    centred = b.op("Sub", x, b.op("ReduceMean", x, axes=[-1]))
    variance = b.op("ReduceMean", b.op("Pow", centred, b.constant(2.0)), axes=[-1])
    root = b.op("Sqrt", b.op("Add", variance, b.constant(1e-5)))
    scaled = b.op("Mul", b.op("Div", centred, root), b.weight(width, low=0.5))
    return b.op("Add", scaled, b.weight(width))


def primitive_transformer() -> ir.Model:
    """Post-norm with dynamic length; LayerNorm as primitives, Reshape targets computed by Shape."""
    b = ModelBuilder("primitive_transformer", opset=13)
    x = b.input("x", ["batch", "length", 16])
    shape = b.op("Shape", x)
    parts = [
        b.op("Unsqueeze", b.op("Gather", shape, b.constant(i), axis=0), b.constant([0]))
        for i in (0, 1)
    ]
    split = b.op("Concat", *parts, b.constant([4]), b.constant([4]), axis=0)
    x = _layer_norm(b, b.op("Add", x, _attention(b, x, 16, 4, split)), 16)
    y = b.linear(_gelu(b, b.linear(x, 16, 32)), 32, 16)
    b.output(_layer_norm(b, b.op("Add", x, y), 16))
    return b.build()


def embedding() -> ir.Model:
    b = ModelBuilder("embedding")
    ids = b.input("ids", ["batch", "length"], np.int64)
    mask = b.input("mask", ["batch", "length"], np.int64)
    y = b.op("Gather", b.weight(20, 12, fan_in=1), ids)
    weight = b.op("Unsqueeze", b.op("Cast", mask, to=1), b.constant([-1]))
    total = b.op("ReduceSum", b.op("Mul", y, weight), b.constant([1]), keepdims=0)
    count = b.op("Max", b.op("ReduceSum", weight, b.constant([1]), keepdims=0), b.constant(1.0))
    y = b.op("Tanh", b.linear(b.op("Div", total, count), 12, 8))
    b.output(b.linear(y, 8, 3))
    return b.build()


def tied_weights() -> ir.Model:
    """One embedding table for input and output, one MatMul weight used twice."""
    b = ModelBuilder("tied_weights")
    ids = b.input("ids", ["batch", 5], np.int64)
    table = b.weight(20, 8, fan_in=2, name="table")
    weight = b.weight(8, 8, name="shared")
    y = b.op("Relu", b.op("MatMul", b.op("Gather", table, ids), weight))
    y = b.op("Relu", b.op("MatMul", y, weight))
    b.output(b.op("MatMul", y, b.op("Transpose", table, perm=[1, 0])))
    return b.build()


def lstm() -> ir.Model:
    b = ModelBuilder("lstm")
    x = b.input("x", ["batch", 5, 6])
    steps = b.op("Transpose", x, perm=[1, 0, 2])
    both, _, _ = b.ops(
        "LSTM", steps, b.weight(2, 32, 6, fan_in=6), b.weight(2, 32, 8, fan_in=8), b.weight(2, 64),
        outputs=3, hidden_size=8, direction="bidirectional",
    )  # fmt: skip
    y = b.op("Reshape", b.op("Transpose", both, perm=[0, 2, 1, 3]), b.constant([0, 0, -1]))
    _, last, _ = b.ops(
        "LSTM", y, b.weight(1, 24, 16, fan_in=16), b.weight(1, 24, 6, fan_in=6), b.weight(1, 48),
        outputs=3, hidden_size=6,
    )  # fmt: skip
    b.output(b.gemm(b.op("Squeeze", last, b.constant([0])), 6, 3))
    return b.build()


def gru_rnn() -> ir.Model:
    b = ModelBuilder("gru_rnn")
    x = b.input("x", [5, "batch", 6])
    y, _ = b.ops(
        "GRU", x, b.weight(1, 24, 6, fan_in=6), b.weight(1, 24, 8, fan_in=8), b.weight(1, 48),
        outputs=2, hidden_size=8, linear_before_reset=1,
    )  # fmt: skip
    y = b.op("Squeeze", y, b.constant([1]))
    _, last = b.ops(
        "RNN", y, b.weight(1, 6, 8, fan_in=8), b.weight(1, 6, 6, fan_in=6), b.weight(1, 12),
        outputs=2, hidden_size=6,
    )  # fmt: skip
    b.output(b.gemm(b.op("Squeeze", last, b.constant([0])), 6, 3))
    return b.build()


def stateful_gru() -> ir.Model:
    """State in, state out, as streaming audio models have it."""
    b = ModelBuilder("stateful_gru")
    x = b.input("x", [1, 1, 6])
    state = b.input("state", [1, 1, 8])
    y, last = b.ops(
        "GRU", x, b.weight(1, 24, 6, fan_in=6), b.weight(1, 24, 8, fan_in=8), b.weight(1, 48), "",
        state, outputs=2, hidden_size=8,
    )  # fmt: skip
    b.output(b.op("Sigmoid", b.linear(b.op("Squeeze", y, b.constant([1])), 8, 6)))
    b.output(last)
    return b.build()


# --- control flow, foreign operators, element types, old formats
# -------------------------------------


def if_model() -> ir.Model:
    b = ModelBuilder("if_model")
    x = b.input("x", ["batch", 8])
    wide = b.input("wide", [], np.bool_)
    y = b.op("Relu", b.linear(x, 8, 12))
    branches = {}
    for name in ("then_branch", "else_branch"):
        inner = ModelBuilder(f"if_model_{name}")
        inner.share_names(b)
        z = inner.op("Tanh", inner.linear(y, 12, 12))
        if name == "then_branch":
            out = inner.linear(z, 12, 8)
        else:
            out = inner.op("MatMul", z, inner.weight(12, 8))
        branches[name] = b.subgraph(name, out, inner)
    b.output(b.op("Add", b.op("If", wide, **branches), x))
    return b.build()


def loop_model() -> ir.Model:
    """A Scan over time whose body is a linear recurrence."""
    b = ModelBuilder("loop_model")
    x = b.input("x", [5, 8])
    body = ModelBuilder("loop_model_body")
    body.share_names(b)
    old, step = body.input("old", [6]), body.input("step", [8])
    new = body.op("Tanh", body.op("Add", body.op("MatMul", step, body.weight(8, 6)), old))
    copy = body.op("Identity", new)
    body.output(new, [6])
    body.output(copy, [6])
    graph = body.proto().graph
    start = b.constant(np.zeros(6, np.float32))
    _, steps = b.ops("Scan", start, x, outputs=2, body=graph, num_scan_inputs=1)
    b.output(b.linear(steps, 6, 3))
    return b.build()


def custom_op() -> ir.Model:
    """An operator that onnxruntime does not know, between two convolutions."""
    b = ModelBuilder("custom_op", domains={"test.custom": 1})
    x = b.input("x", ["batch", 3, 8, 8])
    y = b.op("Mystery", b.op("Relu", b.conv(x, 3, 8)), domain="test.custom", strength=2)
    b.output(b.conv(y, 8, 4), ["batch", 4, 8, 8])
    return b.build()


def half_precision() -> ir.Model:
    b = ModelBuilder("half_precision", dtype=np.float16)
    x = b.input("x", ["batch", 3, 8, 8])
    y = b.op("Relu", b.batch_norm(b.conv(x, 3, 8), 8))
    y = b.op("Flatten", b.op("GlobalAveragePool", b.conv(y, 8, 8)))
    b.output(b.linear(y, 8, 4))
    return b.build()


def double_precision() -> ir.Model:
    b = ModelBuilder("double_precision", dtype=np.float64)
    x = b.input("x", ["batch", 12])
    b.output(b.linear(b.op("Relu", b.linear(x, 12, 8)), 8, 4))
    return b.build()


def quantized_qdq() -> ir.Model:
    """Already quantized: uint8 activations, int8 weight per channel, int32 bias."""
    b = ModelBuilder("quantized_qdq")
    x = b.input("x", ["batch", 3, 8, 8])

    def sandwich(value: str, scale: float, zero_point: int) -> str:
        pair = b.constant(scale), b.constant(np.array(zero_point, np.uint8))
        return b.op("DequantizeLinear", b.op("QuantizeLinear", value, *pair), *pair)

    data = b.rng.integers(-127, 128, (6, 3, 3, 3)).astype(np.int8)
    scales = b.rng.uniform(0.001, 0.003, 6).astype(np.float32)
    weight = b.op("DequantizeLinear", b.constant(data), b.constant(scales), axis=0)
    bias_data = b.rng.integers(-500, 500, 6).astype(np.int32)
    bias = b.op(
        "DequantizeLinear", b.constant(bias_data), b.constant(scales * np.float32(0.02)), axis=0
    )
    y = b.op("Conv", sandwich(x, 0.02, 128), weight, bias, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    y = sandwich(b.op("Relu", y), 0.01, 0)
    b.output(b.op("GlobalAveragePool", y))
    return b.build()


def opset7() -> ir.Model:
    """IR version 3: initializers are graph inputs too; Dropout and Upsample of 2017."""
    b = ModelBuilder("opset7", opset=7, ir_version=3)
    x = b.input("x", [1, 3, 8, 8])
    y = b.op("Relu", b.batch_norm(b.conv(x, 3, 8), 8))
    y = b.op("Upsample", y, scales=[1.0, 1.0, 2.0, 2.0], mode="nearest")
    y = b.op("AveragePool", b.op("Dropout", y, ratio=0.5), kernel_shape=[16, 16])
    y = b.op("Reshape", y, b.constant([1, 8]))
    b.output(b.op("Softmax", b.gemm(y, 8, 4), axis=1))
    b.initializers_as_inputs()
    return b.build()


def opset9() -> ir.Model:
    b = ModelBuilder("opset9", opset=9, ir_version=4)
    x = b.input("x", ["batch", 3, 8, 8])
    y = b.op("Clip", b.conv(x, 3, 8), min=0.0, max=6.0)
    y = b.op("Pad", y, pads=[0, 0, 1, 1, 0, 0, 1, 1], value=0.0)
    y = b.op("Slice", b.conv(y, 8, 8, pad=0), axes=[2, 3], starts=[0, 0], ends=[6, 6])
    y = b.op("ReduceMean", y, axes=[2, 3], keepdims=0)
    b.output(b.gemm(y, 8, 4))
    return b.build()


def opset11() -> ir.Model:
    b = ModelBuilder("opset11", opset=11, ir_version=6)
    x = b.input("x", ["batch", 3, 8, 8])
    y = b.op("Clip", b.conv(x, 3, 8), b.constant(0.0), b.constant(6.0))
    left, right = b.ops("Split", y, outputs=2, axis=1, split=[4, 4])
    y = b.op("Concat", right, left, axis=1)
    y = b.op("Squeeze", b.op("GlobalAveragePool", b.conv(y, 8, 8)), axes=[3])
    y = b.op("ReduceSum", b.op("Unsqueeze", y, axes=[3]), axes=[2, 3], keepdims=0)
    b.output(b.gemm(y, 8, 4))
    return b.build()


def export_leftovers() -> ir.Model:
    """What exporters leave behind: Constant, Identity, Dropout, duplicates, dead parts."""
    b = ModelBuilder("export_leftovers")
    x = b.input("x", ["batch", 3, 8, 8])
    weight = b.rng.normal(0, 0.2, (8, 3, 3, 3)).astype(np.float32)
    constant = b.op("Constant", value=_tensor(weight))
    one = b.op("Conv", b.op("Identity", x), constant, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    two = b.op("Conv", x, b.constant(weight), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    again = b.op("Conv", x, constant, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    y = b.op("Add", b.op("Add", b.op("Relu", one), two), again)
    b.op("Sigmoid", y)
    b.weight(7, 7, name="unused")
    shape = b.op("Shape", y)
    batch = b.op("Unsqueeze", b.op("Gather", shape, b.constant(0), axis=0), b.constant([0]))
    flat = b.op("Reshape", b.op("Dropout", y), b.op("Concat", batch, b.constant([-1]), axis=0))
    b.output(b.op("Identity", b.gemm(flat, 8 * 64, 4)))
    return b.build()


def two_outputs() -> ir.Model:
    """Two heads, and an output that other nodes read."""
    b = ModelBuilder("two_outputs")
    x = b.input("x", ["batch", 3, 8, 8])
    features = b.op("Relu", b.conv(x, 3, 8))
    b.output(features)
    pooled = b.op("Flatten", b.op("GlobalAveragePool", b.conv(features, 8, 8)))
    b.output(b.gemm(pooled, 8, 4))
    b.output(b.op("ArgMax", b.gemm(pooled, 8, 6), axis=1, keepdims=0), ["batch"], np.int64)
    return b.build()


def _tensor(array: Array) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(array)


def _int_tensor(value: int) -> onnx.TensorProto:
    return _tensor(np.array([value], np.int64))


FIXTURES: tuple[Fixture, ...] = (
    Fixture("conv_chain", conv_chain),
    Fixture("residual_bn", residual_bn),
    Fixture("depthwise_separable", depthwise_separable),
    Fixture("inception_concat", inception_concat),
    Fixture("squeeze_excite", squeeze_excite),
    Fixture("grouped_shuffle", grouped_shuffle),
    Fixture("unet", unet, axes={"height": 8, "width": 12}),
    Fixture("conv_1d_3d", conv_1d_3d),
    Fixture("conv_activations", conv_activations),
    Fixture("super_resolution", super_resolution),
    Fixture("pad_slice_shortcut", pad_slice_shortcut),
    Fixture("nhwc_transposes", nhwc_transposes),
    Fixture("norm_forms", norm_forms),
    Fixture("group_instance_norm", group_instance_norm),
    Fixture("mlp_gemm", mlp_gemm),
    Fixture("mlp_matmul", mlp_matmul),
    Fixture("glu_split", glu_split),
    Fixture("einsum", einsum),
    Fixture("mini_transformer", mini_transformer),
    Fixture("primitive_transformer", primitive_transformer, axes={"length": 5}),
    Fixture("embedding", embedding, axes={"length": 5}),
    Fixture("tied_weights", tied_weights, integers=20),
    Fixture("lstm", lstm),
    Fixture("gru_rnn", gru_rnn),
    Fixture("stateful_gru", stateful_gru),
    Fixture("if_model", if_model),
    Fixture("loop_model", loop_model),
    Fixture("custom_op", custom_op, runs=False),
    Fixture("half_precision", half_precision),
    Fixture("double_precision", double_precision),
    Fixture("quantized_qdq", quantized_qdq),
    Fixture("opset7", opset7),
    Fixture("opset9", opset9),
    Fixture("opset11", opset11),
    Fixture("export_leftovers", export_leftovers),
    Fixture("two_outputs", two_outputs),
)

RUNNABLE: tuple[Fixture, ...] = tuple(f for f in FIXTURES if f.runs)


def fixture(name: str) -> Fixture:
    """The fixture of this name."""
    return next(f for f in FIXTURES if f.name == name)
