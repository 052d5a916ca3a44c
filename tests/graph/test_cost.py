from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from onnxcompress import model_io
from onnxcompress.graph.cost import cost_of, probe_shapes
from onnxcompress.runtime import open_session
from tests.builder import ModelBuilder
from tests.fixtures import FIXTURES, RUNNABLE, Fixture, fixture


def _one(builder: ModelBuilder, op_type: str) -> int | None:
    cost = cost_of(builder.build())
    (found,) = [n.macs for n in cost.nodes if n.op_type == op_type]
    return found


def test_conv_counts_groups_strides_and_kernels() -> None:
    b = ModelBuilder("c")
    b.output(b.conv(b.input("x", [2, 8, 10, 10]), 8, 12, 3, groups=4, stride=2))
    # [2, 12, 5, 5] outputs, each a sum over 8/4 channels and 3·3 positions
    assert _one(b, "Conv") == (2 * 12 * 5 * 5) * (2 * 9)


def test_conv_transpose_counts_every_input_once_per_kernel_element() -> None:
    b = ModelBuilder("t")
    x = b.input("x", [1, 6, 5, 5])
    b.output(b.op("ConvTranspose", x, b.weight(6, 4, 2, 2), strides=[2, 2], group=2))
    assert _one(b, "ConvTranspose") == (6 * 25) * (4 * 4)


@pytest.mark.parametrize("flags", [{}, {"transA": 1}, {"transB": 1}, {"transA": 1, "transB": 1}])
def test_gemm_counts_m_n_k_whatever_is_transposed(flags: dict[str, int]) -> None:
    b = ModelBuilder("g")
    x = b.input("x", [7, 5] if "transA" in flags else [5, 7])
    weight = b.weight(3, 7) if "transB" in flags else b.weight(7, 3)
    b.output(b.op("Gemm", x, weight, transA=flags.get("transA"), transB=flags.get("transB")))
    assert _one(b, "Gemm") == 5 * 3 * 7


@pytest.mark.parametrize(
    ("left", "right", "macs"),
    [
        ([5, 7], [7, 3], 5 * 3 * 7),
        ([2, 4, 5, 7], [7, 3], 2 * 4 * 5 * 3 * 7),
        ([2, 1, 5, 7], [4, 7, 3], 2 * 4 * 5 * 3 * 7),
        ([7], [7, 3], 3 * 7),
        ([5, 7], [7], 5 * 7),
    ],
)
def test_matmul_broadcasts_batches(left: list[int], right: list[int], macs: int) -> None:
    b = ModelBuilder("m")
    b.output(b.op("MatMul", b.input("x", left), b.input("y", right)))
    assert _one(b, "MatMul") == macs


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("bij,bjk->bik", [[2, 3, 4], [2, 4, 5]], 2 * 3 * 4 * 5),
        ("...ij,jk->...ik", [[6, 2, 3, 4], [4, 5]], 6 * 2 * 3 * 4 * 5),
        ("ij->ji", [[3, 4]], 0),
    ],
)
def test_einsum_counts_all_axes(equation: str, shapes: list[list[int]], macs: int) -> None:
    b = ModelBuilder("e")
    inputs = [b.input(f"x{i}", shape) for i, shape in enumerate(shapes)]
    b.output(b.op("Einsum", *inputs, equation=equation))
    assert _one(b, "Einsum") == macs


@pytest.mark.parametrize(("op_type", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_counts_gates_and_directions(op_type: str, gates: int) -> None:
    b = ModelBuilder("r")
    x = b.input("x", [9, 2, 6])
    weights = b.weight(2, gates * 8, 6), b.weight(2, gates * 8, 8)
    output = b.ops(op_type, x, *weights, outputs=1, hidden_size=8, direction="bidirectional")
    b.output(output[0])
    assert _one(b, op_type) == 9 * 2 * 2 * gates * 8 * (6 + 8)


def test_quantized_forms_cost_what_the_float_operator_costs() -> None:
    b = ModelBuilder("q")
    x = b.input("x", [1, 3, 8, 8], np.uint8)
    scale, zero = b.constant(0.1), b.constant(np.array(0, np.uint8))
    weight = b.constant(np.ones((6, 3, 3, 3), np.int8))
    bias = b.constant(np.ones(6, np.int32))
    signed = b.constant(np.array(0, np.int8))
    conv = b.op("QLinearConv", x, scale, zero, weight, scale, signed, scale, zero, bias)
    flat = b.op("Flatten", conv)
    b.output(b.op("MatMulInteger", flat, b.constant(np.ones((216, 4), np.int8))), [1, 4], np.int32)
    cost = cost_of(b.build())
    assert [n.macs for n in cost.nodes] == [6 * 36 * 27, 0, 216 * 4]
    assert cost.parameters == 6 * 27 + 6 + 216 * 4


def test_qdq_weights_count_and_belong_to_the_convolution() -> None:
    cost = cost_of(fixture("quantized_qdq").build())
    (conv,) = [n for n in cost.nodes if n.op_type == "Conv"]
    assert cost.parameters == conv.parameters == 6 * 27 + 6  # no scales, no zero points
    assert cost.macs == conv.macs == 6 * 64 * 27
    assert conv.weight_bytes == 6 * 27 + 6 * 4 + 2 * 6 * 4  # data, bias and their scales


def test_shared_weights_count_once() -> None:
    cost = cost_of(fixture("tied_weights").build())
    assert cost.parameters == 20 * 8 + 8 * 8
    assert cost.weight_bytes == 4 * (20 * 8 + 8 * 8)
    assert cost.macs == 5 * (8 * 8 + 8 * 8 + 8 * 20)


def test_shapes_and_axes_are_no_parameters() -> None:
    b = ModelBuilder("s")
    y = b.op("Reshape", b.input("x", [2, 6]), b.constant([3, 4]))
    y = b.op("Clip", y, b.constant(0.0), b.constant(1.0))
    b.output(b.op("Mul", y, b.weight(4)))
    assert cost_of(b.build()).parameters == 4


def test_dynamic_axes_take_the_given_shape_else_one() -> None:
    model = fixture("unet").build()
    given = cost_of(model, {"x": (2, 1, 16, 24)})
    again = cost_of(model, {"x": (1, 1, 8, 12)})
    assert given.macs == 2 * 4 * again.macs
    assert model.graph.inputs[0].shape == ir.Shape(["batch", 1, "height", "width"])


def test_shape_arithmetic_is_followed() -> None:
    model = fixture("pad_slice_shortcut").build()
    cost = cost_of(model)
    assert cost.unknown == ()
    assert cost.macs == 64 * 6 * 27 + 16 * 10 * 54 + 16 * 10 * 90 + 10 * 4


def test_of_an_if_the_dearer_branch_counts() -> None:
    cost = cost_of(fixture("if_model").build())
    assert cost.macs == 8 * 12 + 12 * 12 + 12 * 8  # both branches: 12·12 + 12·8
    assert cost.parameters == 8 * 12 + 12 + 2 * (12 * 12 + 12 + 12 * 8) + 8


def test_a_custom_operator_hides_the_shapes_behind_it() -> None:
    b = ModelBuilder("hidden", domains={"test.custom": 1})
    x = b.input("x", ["batch", 3, 8, 8])
    y = b.op("Mystery", b.conv(x, 3, 8), domain="test.custom")
    b.output(b.conv(b.conv(y, 8, 8), 8, 4), ["batch", 4, 8, 8])
    cost = cost_of(b.build())
    assert cost.unknown == ("conv_1",)  # that of the last one follows from the declared output
    assert cost.macs == 64 * 8 * 27 + 64 * 4 * 72
    assert cost.parameters == 8 * 27 + 8 + 8 * 72 + 8 + 4 * 72 + 4


def test_unused_initializers_have_bytes_but_no_parameters() -> None:
    model = fixture("export_leftovers").build()
    whole = cost_of(model)
    model.graph.initializers.pop("unused")
    rest = cost_of(model)
    assert whole.weight_bytes - rest.weight_bytes == 4 * 49
    assert whole.parameters == rest.parameters


@pytest.mark.parametrize("case", FIXTURES, ids=str)
def test_totals_are_consistent_and_the_model_is_untouched(case: Fixture) -> None:
    model = case.build()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    cost = cost_of(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    stored = [v.const_value for g in model.graphs() for v in g.initializers.values()]
    in_nodes = [
        n.attributes["value"].as_tensor()
        for n in model.graph.all_nodes()
        if n.op_type == "Constant"
    ]
    assert cost.weight_bytes == sum(t.nbytes for t in (*stored, *in_nodes) if t is not None)
    assert cost.parameters == sum(n.parameters for n in cost.nodes)
    assert len(cost.nodes) == sum(1 for _ in model.graph.all_nodes())


@pytest.mark.parametrize("case", RUNNABLE, ids=str)
def test_probed_shapes_are_those_of_a_run(case: Fixture) -> None:
    model = case.build()
    model_io.normalize(model)
    feeds = case.feeds(model)
    shapes = probe_shapes(model, {name: array.shape for name, array in feeds.items()})
    found = open_session(model).run(feeds)
    for value in model.graph.outputs:
        if value in shapes:
            assert shapes[value] == found[value.name or ""].shape


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        # He et al. 2016: 0.27 M and 41 M; Iandola et al. 2016: 1.24 M and 0.35 G
        ("cifar_resnet20", 269_034, 40_551_040),
        ("squeezenet11", 1_235_496, 349_151_936),
    ],
)
def test_published_models_cost_what_is_published(
    zoo: Path, name: str, parameters: int, macs: int
) -> None:
    cost = cost_of(model_io.load(zoo / f"{name}.onnx"))
    assert (cost.parameters, cost.macs) == (parameters, macs)


def test_packed_weights_count_like_the_float_ones() -> None:
    packed = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        g (int64[N, 5] i) => (float[N, 5, 48] y) {
            x = com.microsoft.GatherBlockQuantized
                <bits = 4, block_size = 32, gather_axis = 0, quantize_axis = 1>(table, i, s)
            y = com.microsoft.MatMulNBits <K = 64, N = 48, bits = 4, block_size = 32>(x, w, t)
        }"""
    )
    for name, shape, dtype in [
        ("table", (100, 32), np.uint8),
        ("s", (100, 2), np.float32),
        ("w", (48, 2, 16), np.uint8),
        ("t", (96,), np.float32),
    ]:
        packed.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, dtype), name))
    cost = cost_of(ir.from_proto(packed), {"i": (2, 5)})
    assert cost.macs == 2 * 5 * 64 * 48
    assert cost.parameters == 100 * 64 + 64 * 48


def test_operators_of_onnxruntime_do_not_hide_the_cost_behind_them() -> None:
    """A stack of them without stored shapes: every one counts as its standard form does."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        g (float[T, N, 6] x) => (float[A, B, C] y) {
            a, h, c = com.microsoft.DynamicQuantizeLSTM <hidden_size = 8>
                (x, w, r, , , , , , s, z, s, z)
            b = Squeeze(a, one)
            d = com.microsoft.FastGelu(b)
            e = com.microsoft.DynamicQuantizeMatMul(d, m, t)
            y = com.microsoft.MatMulIntegerToFloat(e, n, t, t)
        }"""
    )
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "w": np.zeros((1, 6, 32), np.int8),
        "r": np.zeros((1, 8, 32), np.int8),
        "s": np.ones((1, 32), np.float32),
        "z": np.zeros((1, 32), np.int8),
        "one": np.array([1]),
        "m": np.zeros((8, 5), np.int8),
        "n": np.zeros((5, 3), np.int8),
        "t": np.ones(1, np.float32),
    }
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    cost = cost_of(ir.from_proto(model), {"x": (7, 2, 6)})
    assert cost.macs == 7 * 2 * (32 * (6 + 8) + 8 * 5 + 5 * 3)
    assert not cost.unknown
