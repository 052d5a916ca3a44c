"""Models that exercise one aspect of channel coupling each, beyond the shared fixtures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from hypothesis import strategies as st

from tests.builder import ModelBuilder
from tests.fixtures import Fixture


def _head(b: ModelBuilder, y: str, channels: int) -> ir.Model:
    """Global pooling, a linear layer, done."""
    flat = b.op("Flatten", b.op("GlobalAveragePool", y))
    b.output(b.gemm(flat, channels, 3))
    return b.build()


def _image(b: ModelBuilder, channels: int = 8) -> str:
    return b.op("Relu", b.conv(b.input("x", ["batch", 3, 8, 8]), 3, channels))


# --- attention -----------------------------------------------------------------------------


def _attend(b: ModelBuilder, q: str, k: str, v: str, out: Sequence[int]) -> str:
    """softmax(q kᵀ) v for ``[batch, heads, length, dims]``, merged to ``[batch, length, ...]``."""
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2]))
    mixed = b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
    merged = b.op("Transpose", mixed, perm=[0, 2, 1, 3])
    return b.op("Reshape", merged, b.constant(np.array(out, np.int64)))


def fused_qkv() -> ir.Model:
    """One projection for queries, keys and values, as ViT exports have it."""
    b = ModelBuilder("fused_qkv")
    x = b.input("x", ["batch", 5, 16])
    y = b.op("Reshape", b.linear(x, 16, 48), b.constant([0, 5, 3, 4, 4]))
    y = b.op("Transpose", y, perm=[2, 0, 3, 1, 4])
    q, k, v = (b.op("Gather", y, b.constant(np.array(i, np.int64)), axis=0) for i in range(3))
    y = b.op("Add", x, b.linear(_attend(b, q, k, v, (0, 5, 16)), 16, 16))
    b.output(b.op("ReduceMean", y, axes=[1], keepdims=0))
    return b.build()


def grouped_query() -> ir.Model:
    """Four query heads share two key-value heads; rotary positions tie halves of a head."""
    b = ModelBuilder("grouped_query")
    x = b.input("x", ["batch", 5, 16])

    def heads(count: int) -> str:
        y = b.op("Reshape", b.linear(x, 16, count * 4), b.constant([0, 5, count, 4]))
        return b.op("Transpose", y, perm=[0, 2, 1, 3])

    def rotate(y: str) -> str:
        low = b.op("Slice", y, b.constant([0]), b.constant([2]), b.constant([3]))
        high = b.op("Slice", y, b.constant([2]), b.constant([2**31]), b.constant([3]))
        turned = b.op("Concat", b.op("Neg", high), low, axis=3)
        return b.op("Add", b.op("Mul", y, b.weight(5, 4)), b.op("Mul", turned, b.weight(5, 4)))

    def repeat(y: str) -> str:
        y = b.op("Unsqueeze", y, b.constant([2]))
        y = b.op("Expand", y, b.constant([1, 1, 2, 1, 1]))
        return b.op("Reshape", y, b.constant([0, 4, 5, 4]))

    q, k, v = rotate(heads(4)), repeat(rotate(heads(2))), repeat(heads(2))
    b.output(b.linear(_attend(b, q, k, v, (0, 5, 16)), 16, 16))
    return b.build()


def merged_batch_heads() -> ir.Model:
    """PyTorch's own attention merges batch and heads into one axis."""
    b = ModelBuilder("merged_batch_heads")
    x = b.input("x", [5, 2, 16])

    def heads() -> str:
        y = b.op("Reshape", b.linear(x, 16, 16), b.constant([5, 8, 4]))
        y = b.op("Transpose", y, perm=[1, 0, 2])
        return b.op("Reshape", y, b.constant([2, 4, 5, 4]))

    q, k, v = heads(), heads(), heads()
    b.output(b.linear(_attend(b, q, k, v, (2, 5, 16)), 16, 16))
    return b.build()


def dynamic_reshape() -> ir.Model:
    """Two dynamic lengths split differently: the target stays computed."""
    b = ModelBuilder("dynamic_reshape")
    x = b.input("x", ["rows", 2, "columns", 16])
    y = b.op("MatMul", x, b.weight(16, 12, fan_in=16))
    shape = b.op("Shape", y)
    part = [b.op("Gather", shape, b.constant([i])) for i in range(4)]
    rows = b.op("Mul", part[0], part[1])
    four, three = b.constant([4]), b.constant([3])
    y = b.op("Reshape", y, b.op("Concat", rows, part[2], four, three, axis=0))
    y = b.op("Transpose", b.op("Relu", y), perm=[0, 2, 1, 3])
    y = b.op("Transpose", y, perm=[0, 2, 1, 3])
    y = b.op("Reshape", y, b.op("Concat", part[0], part[1], part[2], b.constant([12]), axis=0))
    b.output(b.linear(y, 12, 3))
    return b.build()


# --- data movement -------------------------------------------------------------------------


def slices() -> ir.Model:
    """Contiguous, strided and reversed channel slices, a permutation, joined again."""
    b = ModelBuilder("slices")
    y = _image(b, 16)
    one = b.constant([1])

    def cut(start: int, end: int, step: int) -> str:
        return b.op("Slice", y, b.constant([start]), b.constant([end]), one, b.constant([step]))

    shuffled = b.op("Gather", y, b.constant([15, 3, 8, 1]), axis=1)
    y = b.op("Concat", cut(0, 4, 1), cut(5, 2**31, 2), cut(-1, -(2**31), -4), shuffled, axis=1)
    return _head(b, b.op("Relu", b.conv(y, 18, 6)), 6)


def split_parts() -> ir.Model:
    """An uneven Split with ``num_outputs``, one part gating another."""
    b = ModelBuilder("split_parts", opset=18)
    a, g, rest = b.ops("Split", _image(b, 14), outputs=3, axis=1, num_outputs=3)
    y = b.op("Concat", b.op("Mul", a, b.op("Sigmoid", g)), rest, axis=1)
    return _head(b, b.op("Relu", b.conv(y, 9, 6)), 6)


def growing() -> ir.Model:
    """Pad, Expand, Tile, ConstantOfShape and crops on channels."""
    b = ModelBuilder("growing")
    y = _image(b)
    pads = np.array([0, 2, 0, 0, 0, 3, 0, 0], np.int64)
    y = b.op("Add", b.op("Pad", y, b.constant(pads)), b.conv(y, 8, 13))
    y = b.op("Pad", y, b.constant(-pads))
    y = b.op("Tile", y, b.constant([1, 2, 1, 1]))
    ones = b.op("Expand", b.weight(1, 1, 8, 8), b.constant([1, 16, 1, 1]))
    zeros = b.op("ConstantOfShape", b.constant([1, 16, 1, 1]))
    y = b.op("Add", b.op("Mul", y, ones), zeros)
    return _head(b, b.op("Relu", b.conv(y, 16, 6)), 6)


def space_and_depth() -> ir.Model:
    """Both channel orders of DepthToSpace, SpaceToDepth and a Resize to given sizes."""
    b = ModelBuilder("space_and_depth")
    y = b.op("DepthToSpace", _image(b, 16), blocksize=2, mode="DCR")
    y = b.op("SpaceToDepth", b.op("Relu", b.conv(y, 4, 4)), blocksize=2)
    y = b.op("DepthToSpace", b.op("Relu", b.conv(y, 16, 24)), blocksize=2, mode="CRD")
    y = b.op("Resize", y, "", "", b.constant([2, 6, 20, 20]), mode="nearest")
    b.inputs[0].type.tensor_type.shape.dim[0].dim_value = 2
    return _head(b, b.op("Relu", b.conv(y, 6, 6)), 6)


def shuffle() -> ir.Model:
    """Channel shuffle between two grouped convolutions."""
    b = ModelBuilder("shuffle")
    y = b.op("Relu", b.conv(_image(b, 16), 16, 16, 1, groups=2))
    y = b.op("Reshape", y, b.constant([0, 2, 8, 8, 8]))
    y = b.op("Transpose", y, perm=[0, 2, 1, 3, 4])
    y = b.op("Reshape", y, b.constant([0, -1, 8, 8]))
    return _head(b, b.op("Relu", b.conv(y, 16, 16, 1, groups=2)), 16)


def transposed_convolutions() -> ir.Model:
    """ConvTranspose: dense, depthwise and grouped."""
    b = ModelBuilder("transposed_convolutions")
    y = _image(b)
    for inputs, outputs, groups in ((8, 6, 1), (6, 1, 6), (6, 4, 2)):
        y = b.op(
            "ConvTranspose", y, b.weight(inputs, outputs, 3, 3), b.weight(outputs * groups),
            group=groups, kernel_shape=[3, 3], pads=[1, 1, 1, 1],
        )  # fmt: skip
    return _head(b, b.op("Relu", b.conv(y, 8, 4)), 4)


# --- parameters and reductions -------------------------------------------------------------


def group_normalization() -> ir.Model:
    """The operator of opset 21: groups go as a whole."""
    b = ModelBuilder("group_normalization", opset=21, ir_version=10)
    y = b.conv(b.input("x", ["batch", 3, 8, 8]), 3, 12)
    y = b.op("GroupNormalization", y, b.weight(12), b.weight(12), num_groups=4)
    b.output(b.conv(y, 12, 2), ["batch", 2, 8, 8])
    return b.build()


def weightless_sums() -> ir.Model:
    """Channels that no weight contracts but sums do; a channel that a mean uses stays."""
    b = ModelBuilder("weightless_sums")
    y = _image(b, 8)
    total = b.op("ReduceSum", y, b.constant([1]), keepdims=1)
    norm = b.op("ReduceL2", b.conv(y, 8, 6), axes=[1], keepdims=1)
    mean = b.op("ReduceMean", b.conv(y, 8, 5), axes=[1], keepdims=1)
    b.output(b.op("Concat", total, norm, mean, axis=1))
    return b.build()


def quantized_chain() -> ir.Model:
    """Two quantized convolutions: int8 weights, scales, zero points, int32 biases per channel."""
    b = ModelBuilder("quantized_chain")
    y = b.input("x", ["batch", 3, 8, 8])
    for channels, width in ((3, 8), (8, 6)):
        pair = b.constant(0.02), b.constant(np.array(128, np.uint8))
        y = b.op("DequantizeLinear", b.op("QuantizeLinear", y, *pair), *pair)
        data = b.rng.integers(-127, 128, (width, channels, 3, 3)).astype(np.int8)
        scale = b.rng.uniform(0.001, 0.003, width).astype(np.float32)
        zero = b.constant(np.zeros(width, np.int8))
        weight = b.op("DequantizeLinear", b.constant(data), b.constant(scale), zero, axis=0)
        bias_data = b.rng.integers(-500, 500, width).astype(np.int32)
        bias_scale = b.constant(scale * np.float32(0.02))
        bias = b.op("DequantizeLinear", b.constant(bias_data), bias_scale, axis=0)
        y = b.op("Relu", b.op("Conv", y, weight, bias, kernel_shape=[3, 3], pads=[1] * 4))
    return _head(b, y, 6)


def shared_parameters() -> ir.Model:
    """A bias vector used twice does not tie; a weight matrix used twice does."""
    b = ModelBuilder("shared_parameters")
    x = b.input("x", ["batch", 6])
    bias, matrix = b.weight(8), b.weight(8, 8)
    y = b.op("Relu", b.op("Add", b.op("MatMul", x, b.weight(6, 8)), bias))
    z = b.op("Relu", b.op("Add", b.op("MatMul", x, b.weight(6, 8)), bias))
    b.output(b.op("MatMul", b.op("Relu", b.op("MatMul", y, matrix)), b.weight(8, 2)))
    b.output(b.op("MatMul", b.op("Relu", b.op("MatMul", z, matrix)), b.weight(8, 2)))
    return b.build()


def transposed_gemm() -> ir.Model:
    """Weights behind a Transpose, on the left of a MatMul, and transA."""
    b = ModelBuilder("transposed_gemm")
    x = b.input("x", [5, 6])
    y = b.op("Relu", b.op("MatMul", x, b.op("Transpose", b.weight(8, 6), perm=[1, 0])))
    y = b.op("Relu", b.op("MatMul", b.weight(7, 8), b.op("Transpose", y, perm=[1, 0])))
    y = b.op("Gemm", y, b.weight(7, 4), b.weight(4), transA=1, alpha=0.5)
    b.output(b.gemm(b.op("Tanh", y), 4, 2))
    return b.build()


def wide_flatten() -> ir.Model:
    """Sixteen columns of the Gemm belong to each channel; NHWC order on the second path."""
    b = ModelBuilder("wide_flatten")
    y = b.op("MaxPool", _image(b), kernel_shape=[2, 2], strides=[2, 2])
    a = b.gemm(b.op("Flatten", y), 8 * 16, 3)
    last = b.op("Transpose", b.op("Relu", b.conv(y, 8, 5)), perm=[0, 2, 3, 1])
    c = b.gemm(b.op("Reshape", last, b.constant([-1, 80])), 80, 3)
    b.output(b.op("Add", a, c))
    return b.build()


def generator() -> ir.Model:
    """Gemm to an image: 16 columns per channel on the producing side."""
    b = ModelBuilder("generator")
    y = b.gemm(b.input("z", ["batch", 5]), 5, 8 * 16)
    y = b.op("Relu", b.op("Reshape", y, b.constant([-1, 8, 4, 4])))
    b.output(b.conv(y, 8, 3))
    return b.build()


def bidirectional() -> ir.Model:
    """A two-way LSTM with a zero state built from the batch size, then a two-way GRU."""
    b = ModelBuilder("bidirectional")
    x = b.input("x", [6, "batch", 5])
    batch = b.op("Gather", b.op("Shape", x), b.constant([1]))
    shape = b.op("Concat", b.constant([2]), batch, b.constant([4]), axis=0)
    state = b.op("ConstantOfShape", shape)
    y = b.ops(
        "LSTM", x, b.weight(2, 16, 5), b.weight(2, 16, 4), b.weight(2, 32), "", state, state,
        outputs=1, hidden_size=4, direction="bidirectional",
    )[0]  # fmt: skip
    y = b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1, 3]), b.constant([0, 0, 8]))
    _, last = b.ops(
        "GRU", y, b.weight(2, 9, 8), b.weight(2, 9, 3), b.weight(2, 18), outputs=2,
        hidden_size=3, direction="bidirectional", linear_before_reset=1,
    )  # fmt: skip
    b.output(b.op("MatMul", last, b.weight(3, 2)))
    return b.build()


FIXTURES: tuple[Fixture, ...] = (
    Fixture("fused_qkv", fused_qkv),
    Fixture("grouped_query", grouped_query),
    Fixture("merged_batch_heads", merged_batch_heads),
    Fixture("dynamic_reshape", dynamic_reshape, axes={"columns": 3}),
    Fixture("slices", slices),
    Fixture("split_parts", split_parts),
    Fixture("growing", growing),
    Fixture("space_and_depth", space_and_depth),
    Fixture("shuffle", shuffle),
    Fixture("transposed_convolutions", transposed_convolutions),
    Fixture("group_normalization", group_normalization),
    Fixture("weightless_sums", weightless_sums),
    Fixture("quantized_chain", quantized_chain),
    Fixture("shared_parameters", shared_parameters),
    Fixture("transposed_gemm", transposed_gemm),
    Fixture("wide_flatten", wide_flatten),
    Fixture("generator", generator),
    Fixture("bidirectional", bidirectional),
)


# --- random networks -----------------------------------------------------------------------

Step = tuple[int, int]


def random_network(steps: Sequence[Step]) -> ir.Model:
    """A convolutional network made of ``steps``: (operation, seed of its arguments).

    Every tensor is ``[2, channels, 6, 6]``, so that any two can be joined.
    """
    b = ModelBuilder(f"random_{steps}")
    live: list[tuple[str, int]] = [(b.conv(b.input("x", [2, 3, 6, 6]), 3, 8), 8)]
    for operation, seed in steps:
        rng = np.random.default_rng(seed)
        y, channels = live[int(rng.integers(len(live)))]
        other, others = live[int(rng.integers(len(live)))]
        live.append(_STEPS[operation % len(_STEPS)](b, rng, y, channels, other, others))
    joined = b.op("Concat", *(y for y, _ in live[-3:]), axis=1)
    return _head(b, b.op("Relu", joined), sum(c for _, c in live[-3:]))


_Grown = tuple[str, int]


def _dense(b: ModelBuilder, rng: np.random.Generator, y: str, c: int, o: str, d: int) -> _Grown:
    width = int(rng.integers(2, 13))
    return b.op("Relu", b.conv(y, c, width, int(rng.choice([1, 3])))), width


def _grouped(b: ModelBuilder, rng: np.random.Generator, y: str, c: int, o: str, d: int) -> _Grown:
    groups = int(rng.choice([g for g in range(1, c + 1) if c % g == 0]))
    width = groups * int(rng.integers(1, 4))
    return b.conv(y, c, width, groups=groups), width


def _normalized(
    b: ModelBuilder, rng: np.random.Generator, y: str, c: int, o: str, d: int
) -> _Grown:
    return b.op("PRelu", b.batch_norm(y, c), b.weight(c, 1, 1)), c


def _joined(b: ModelBuilder, rng: np.random.Generator, y: str, c: int, o: str, d: int) -> _Grown:
    return b.op("Concat", y, o, axis=1), c + d


def _combined(b: ModelBuilder, rng: np.random.Generator, y: str, c: int, o: str, d: int) -> _Grown:
    if c != d:
        o = b.conv(o, d, c, 1)
    return b.op(str(rng.choice(["Add", "Mul", "Max"])), y, o), c


def _excited(b: ModelBuilder, rng: np.random.Generator, y: str, c: int, o: str, d: int) -> _Grown:
    gate = b.conv(b.op("Relu", b.conv(b.op("GlobalAveragePool", y), c, 3, 1)), 3, c, 1)
    return b.op("Mul", y, b.op("Sigmoid", gate)), c


def _sliced(b: ModelBuilder, rng: np.random.Generator, y: str, c: int, o: str, d: int) -> _Grown:
    if c < 2:
        return y, c
    positions = np.arange(c)[int(rng.integers(0, c // 2)) :: int(rng.choice([1, 2]))]
    if len(positions) < 2:
        return y, c
    step = int(positions[1] - positions[0])
    bounds = [int(positions[0])], [c], [1], [step]
    return b.op("Slice", y, *(b.constant(v) for v in bounds)), len(positions)


def _permuted(b: ModelBuilder, rng: np.random.Generator, y: str, c: int, o: str, d: int) -> _Grown:
    return b.op("Gather", y, b.constant(rng.permutation(c)), axis=1), c


def _padded(b: ModelBuilder, rng: np.random.Generator, y: str, c: int, o: str, d: int) -> _Grown:
    before, behind = (int(n) for n in rng.integers(0, 3, 2))
    pads = np.array([0, before, 0, 0, 0, behind, 0, 0], np.int64)
    return b.op("Pad", y, b.constant(pads)), before + c + behind


def _shuffled(b: ModelBuilder, rng: np.random.Generator, y: str, c: int, o: str, d: int) -> _Grown:
    groups = int(rng.choice([g for g in range(1, c + 1) if c % g == 0]))
    y = b.op("Reshape", y, b.constant([2, groups, c // groups, 6, 6]))
    y = b.op("Transpose", y, perm=[0, 2, 1, 3, 4])
    return b.op("Reshape", y, b.constant([0, c, 6, 6])), c


def _split(b: ModelBuilder, rng: np.random.Generator, y: str, c: int, o: str, d: int) -> _Grown:
    if c < 2:
        return y, c
    first = int(rng.integers(1, c))
    a, z = b.ops("Split", y, b.constant([first, c - first]), outputs=2, axis=1)
    return b.op("Concat", b.op("Tanh", z), a, axis=1), c


def _last(b: ModelBuilder, rng: np.random.Generator, y: str, c: int, o: str, d: int) -> _Grown:
    width = int(rng.integers(2, 9))
    y = b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 3, 1]), b.constant([2, -1, c]))
    y = b.op("Reshape", b.linear(y, c, width), b.constant([2, 6, 6, width]))
    return b.op("Transpose", y, perm=[0, 3, 1, 2]), width


_STEPS = (
    _dense, _grouped, _normalized, _joined, _combined, _excited, _sliced, _permuted, _padded,
    _shuffled, _split, _last,
)  # fmt: skip
STEP_LISTS = st.lists(
    st.tuples(st.integers(0, len(_STEPS) - 1), st.integers(0, 2**31)), min_size=1, max_size=9
)
"""What :func:`random_network` takes."""
