"""Which units the analysis finds, where they live, and why others stay."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.graph import labels
from onnxcompress.graph.coupling import Coupling
from tests.builder import ModelBuilder
from tests.fixtures import FIXTURES, fixture
from tests.graph import builders
from tests.graph.law import prepared, sizes

# Over-tying keeps the law, so that only these numbers can catch it: group name to number of units.
UNITS: dict[str, dict[str, int]] = {
    "conv_chain": {"conv_0": 8, "conv_1": 12},
    "residual_bn": {"conv_0": 8, "conv_1": 8, "conv_3": 16, "conv_4": 16},
    "depthwise_separable": {"conv_0": 8, "conv_2": 16, "conv_4": 16},
    "inception_concat": {"conv_0": 8, "conv_1": 4, "conv_2": 6, "conv_3": 8, "conv_4": 4},
    "squeeze_excite": {"conv_0": 16, "conv_1": 4},
    "grouped_shuffle": {"conv_0": 4, "conv_2": 3},
    "unet": {"conv_0": 8, "conv_1": 16, "convtranspose_0": 8, "conv_2": 8},
    "conv_1d_3d": {"conv_0": 6, "conv_2": 4},
    "conv_activations": {"conv_0": 8, "conv_1": 8, "conv_2": 8, "conv_3": 8},
    "super_resolution": {"conv_0": 8, "conv_1": 4, "conv_2": 4},
    "pad_slice_shortcut": {"conv_0": 6, "conv_2": 4, "conv_1": 10},
    "nhwc_transposes": {"conv_0": 8, "conv_1": 6},
    "norm_forms": {"conv_0": 8, "conv_1": 8, "conv_2": 8, "gemm_0": 12, "matmul_0": 10},
    "group_instance_norm": {"conv_0": 8, "conv_1": 4},
    "mlp_gemm": {"gemm_0": 24, "gemm_1": 12},
    "mlp_matmul": {"matmul_0": 24, "matmul_1": 16},
    "glu_split": {"matmul_0": 16},
    "einsum": {"einsum_0": 2, "einsum_0:1": 6},
    "mini_transformer": {"matmul_0": 4, "matmul_6": 32, "matmul_8": 4, "matmul_14": 32},
    "primitive_transformer": {"matmul_0": 4, "matmul_6": 32},
    "embedding": {"gather_0": 12, "matmul_0": 8},
    "tied_weights": {"gather_0": 8},
    "lstm": {"lstm_0": 8, "lstm_1": 6},
    "gru_rnn": {"gru_0": 8, "rnn_0": 6},
    "stateful_gru": {"gru_0": 8},
    "if_model": {"matmul_0": 12, "matmul_1": 12, "matmul_3": 12},
    "loop_model": {},
    "half_precision": {"conv_0": 8, "conv_1": 8},
    "double_precision": {"matmul_0": 8},
    "quantized_qdq": {},
    "opset7": {"conv_0": 8},
    "opset9": {"conv_0": 8, "conv_1": 8},
    "opset11": {"conv_0": 4, "conv_0:1": 4, "conv_1": 8},
    "export_leftovers": {"conv_0": 8},
    "two_outputs": {"conv_1": 8},
    "fused_qkv": {"matmul_0": 4},
    "grouped_query": {"matmul_0": 2},
    "merged_batch_heads": {"matmul_0": 4},
    "dynamic_reshape": {"matmul_0": 4},
    "slices": {"conv_0": 2, "conv_0:1": 3, "conv_0:2": 2, "conv_1": 6},
    "split_parts": {"conv_0": 5, "conv_0:1": 4, "conv_1": 6},
    "growing": {"conv_0": 8, "conv_2": 6},
    "space_and_depth": {"conv_0": 4, "conv_1": 4, "conv_2": 6, "conv_3": 6},
    "shuffle": {"conv_0": 8, "conv_2": 8},
    "transposed_convolutions": {
        "conv_0": 8, "convtranspose_0": 3, "convtranspose_2": 4, "conv_1": 4,
    },
    "group_normalization": {"conv_0": 4},
    "weightless_sums": {"conv_0": 8, "conv_1": 6},
    "quantized_chain": {"conv_0": 8, "conv_1": 6},
    "shared_parameters": {"matmul_0": 8, "matmul_2": 8},
    "transposed_gemm": {"matmul_0": 8, "matmul_1": 7, "gemm_0": 4},
    "wide_flatten": {"conv_0": 8, "conv_1": 5},
    "generator": {"gemm_0": 8},
    "bidirectional": {"lstm_0": 4, "gru_0": 3},
}  # fmt: skip

ALL = {f.name: f for f in (*FIXTURES, *builders.FIXTURES)}


def analysed(name: str) -> Coupling:
    return labels.analyse(prepared(ALL[name].build()))


@pytest.mark.parametrize("name", UNITS)
def test_number_of_units_is_pinned(name: str) -> None:
    assert sizes(ALL[name].build()) == UNITS[name]


def test_every_fixture_of_this_folder_is_pinned() -> None:
    assert {f.name for f in builders.FIXTURES} <= UNITS.keys()


def test_a_channel_after_flatten_owns_all_its_columns() -> None:
    group = analysed("wide_flatten").groups[0]
    gemm = next(s for s in group.sinks if s.node.startswith("gemm"))
    assert gemm.weight_axis == 1
    np.testing.assert_array_equal(gemm.positions[2], np.arange(32, 48))


def test_nhwc_flatten_interleaves_the_columns() -> None:
    group = analysed("wide_flatten").groups[1]
    (gemm,) = group.sinks
    np.testing.assert_array_equal(gemm.positions[1], np.arange(1, 80, 5))


def test_an_lstm_cell_owns_a_row_of_every_gate() -> None:
    group = analysed("bidirectional").groups[0]
    cuts = {(c.initializer, c.axis): c.indices for c in group.cuts}
    rows = sorted(tuple(i[1].tolist()) for i in cuts.values())
    # W and R rows, biases (W's then R's), columns of R, and both directions in the next layer.
    assert rows == [(1,), (1, 5), (1, 5, 9, 13), (1, 5, 9, 13), (1, 5, 9, 13, 17, 21, 25, 29)]
    recurrent = next(s for s in group.sinks if s.data_input == s.weight_input)
    assert (recurrent.data_input, recurrent.axis) == (2, 2)


def test_a_head_of_a_fused_projection_owns_its_queries_keys_and_values() -> None:
    (group,) = analysed("fused_qkv").groups
    (source,) = group.sources
    expected = [base + i for base in (4, 20, 36) for i in range(4)]
    np.testing.assert_array_equal(source.positions[1], expected)
    assert {s.weight is None for s in group.sinks} == {False}


def test_the_sum_of_queries_and_keys_has_no_weight() -> None:
    coupling = labels.analyse(prepared(ALL["fused_qkv"].build()), reshape_policy="head_dims")
    weightless = [s for g in coupling.groups for s in g.sinks if s.weight_input is None]
    assert [s.axis for s in weightless] == [3]


def test_head_dims_policy_takes_the_same_dimension_of_every_head() -> None:
    found = sizes(ALL["merged_batch_heads"].build(), reshape_policy="head_dims")
    # Values reach the output; queries meet keys.
    assert sorted(found.values()) == [4, 4]


def test_weights_are_traced_through_quantization_and_transpose() -> None:
    for name in ("quantized_chain", "transposed_gemm"):
        for group in analysed(name).groups:
            for sink in group.sinks:
                assert sink.weight is not None, (name, sink)
                cut = next(c for c in group.cuts if c.initializer == sink.weight)
                assert cut.axis == sink.weight_axis


def test_weight_on_the_left_of_a_matmul() -> None:
    group = analysed("transposed_gemm").groups[0]
    sink = next(s for s in group.sinks if s.node == "matmul_1")
    assert (sink.data_input, sink.axis, sink.weight_input, sink.weight_axis) == (1, 0, 0, 1)


def test_places_of_a_grouped_convolution_meet_every_group() -> None:
    group = analysed("shuffle").groups[0]
    sink = next(s for s in group.sinks if s.node == "conv_1")
    cut = next(c for c in group.cuts if c.initializer == sink.weight)
    assert cut.indices.shape == (8, 1)
    np.testing.assert_array_equal(sink.positions[3], [3, 11])


def test_units_are_numbered_across_groups() -> None:
    coupling = analysed("conv_chain")
    np.testing.assert_array_equal(coupling.offsets, [0, 8, 20])
    second = coupling.groups[1]
    cut = second.cuts[0]
    units = coupling.axes[cut.initializer][cut.axis]
    assert units is not None
    np.testing.assert_array_equal(units[cut.indices[:, 0]], np.arange(8, 20))


def test_unknown_unit_is_refused() -> None:
    with pytest.raises(IndexError, match="units 0 to 7"):
        analysed("conv_chain").kept({0: np.array([8])})


# --- what stays, and why ---------------------------------------------------------------------


def reasons(model: ir.Model, *, states: bool = True) -> str:
    coupling = labels.analyse(prepared(model), states=states)
    return "\n".join(f"{f.node}: {f.reason}" for f in coupling.frozen)


def test_unknown_operator_freezes_what_it_reads() -> None:
    text = reasons(fixture("custom_op").build())
    assert "an operator without a rule" in text


def test_outputs_of_the_model_stay() -> None:
    assert "is an output of the model" in reasons(fixture("two_outputs").build())


def test_states_of_the_interface_stay_by_option() -> None:
    assert "starts from a state" in reasons(fixture("stateful_gru").build(), states=False)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "reason"),
    [
        ("Softmax", (), {"axis": 1}, "the axis of a Softmax"),
        ("LayerNormalization", ("scale",), {"axis": -1}, "is normalized over"),
        ("LpNormalization", (), {"axis": 1}, "the axis of a LpNormalization"),
        ("ReduceMax", (), {"axes": [1]}, "is reduced by ReduceMax"),
        ("ArgMax", (), {"axis": 1}, "positions are data"),
        ("CumSum", ("one",), {}, "the axis of a CumSum"),
        ("Gather", ("ids",), {"axis": 1}, "is indexed by data"),
        ("GatherElements", ("ids",), {"axis": 1}, "at computed places"),
        ("Pad", ("pads",), {"mode": "reflect"}, "padded with its own values"),
        ("Size", (), {}, "counts all elements"),
    ],
)
def test_operators_that_mix_channels_freeze_them(
    op: str, inputs: tuple[str, ...], attributes: dict[str, object], reason: str
) -> None:
    b = ModelBuilder(f"mixing_{op}")
    x = b.input("x", ["batch", 4])
    if "ids" in inputs:
        b.input("ids", ["batch", 3], np.int64)
    b.constant(np.array(1, np.int64), "one")
    b.constant(np.array([0, 1, 0, 1], np.int64), "pads")
    b.weight(8, name="scale")
    y = b.op("Relu", b.linear(x, 4, 8))
    b.output(b.op("MatMul", y, b.weight(8, 2)))
    integer = op in {"ArgMax", "Size"}
    mixed = b.ops(op, y, *inputs, outputs=1, **attributes)[0]  # type: ignore[arg-type]
    b.output(mixed, None, np.int64 if integer else None)
    model = b.build()
    assert sizes(model) == {}
    assert reason in reasons(model)


def test_channels_read_inside_a_loop_stay() -> None:
    b = ModelBuilder("captured")
    x = b.input("x", [4, 5])
    outer = b.linear(x, 5, 6)
    body = ModelBuilder("captured_body")
    body.share_names(b)
    step = body.input("step", [5])
    body.output(body.op("ReduceSum", step, keepdims=0), [])
    graph = body.proto().graph
    graph.node.add(op_type="ReduceMax", input=[outer], output=["seen"], name="reader")
    graph.output[0].name = "seen"
    graph.output[0].type.tensor_type.ClearField("shape")
    (total,) = b.ops("Scan", x, outputs=1, body=graph, num_scan_inputs=1)
    b.output(total, None)
    b.output(b.op("MatMul", b.op("Relu", outer), b.weight(6, 2)))
    assert "is read inside a Scan" in reasons(b.build())


def test_a_weight_that_a_loop_reads_first_stays() -> None:
    """The loop stands before the node that the weight's channels would be found at."""
    b = ModelBuilder("shared_with_a_loop")
    x = b.input("x", [4, 5])
    weight = b.weight(5, 6)
    body = ModelBuilder("shared_with_a_loop_body")
    body.share_names(b)
    step = body.input("step", [5])
    body.output(body.op("ReduceSum", step, keepdims=0), [])
    graph = body.proto().graph
    graph.node.add(op_type="ReduceMax", input=[weight], output=["seen"], name="reader")
    graph.output[0].name = "seen"
    graph.output[0].type.tensor_type.ClearField("shape")
    (total,) = b.ops("Scan", x, outputs=1, body=graph, num_scan_inputs=1)
    b.output(total, None)
    b.output(b.op("MatMul", b.op("Relu", b.op("MatMul", x, weight)), b.weight(6, 2)))
    model = b.build()
    assert sizes(model) == {}
    assert "is read inside a Scan" in reasons(model)


def test_a_group_never_loses_a_whole_branch() -> None:
    """Halves of a Split that go different ways are groups of their own."""
    b = ModelBuilder("halves")
    y = b.op("Relu", b.conv(b.input("x", [1, 3, 4, 4]), 3, 8))
    low, high = b.ops("Split", y, b.constant([4, 4]), outputs=2, axis=1)
    joined = b.op("Concat", b.op("Tanh", low), b.op("Abs", high), axis=1)
    b.output(b.op("GlobalAveragePool", b.conv(joined, 8, 2)))
    assert sizes(b.build()) == {"conv_0": 4, "conv_0:1": 4}


def test_analysis_does_not_change_the_model() -> None:
    model = prepared(ALL["fused_qkv"].build())
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    labels.analyse(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_thousand_nodes_take_seconds() -> None:
    b = ModelBuilder("deep")
    y = b.conv(b.input("x", ["batch", 3, 8, 8]), 3, 16)
    for _ in range(200):
        z = b.op("Relu", b.batch_norm(b.conv(y, 16, 16, 1, bias=False), 16))
        y = b.op("Add", y, b.conv(z, 16, 16, 1))
    b.output(b.op("GlobalAveragePool", y))
    model = prepared(b.build())
    start = time.process_time()
    coupling = labels.analyse(model)
    elapsed = time.process_time() - start
    assert len(model.graph) > 1000
    assert len(coupling.groups) == 200  # the residual stream is an output
    assert elapsed < 4.0  # seconds of CPU; 0.6 measured on a loaded machine


@pytest.mark.parametrize(
    ("name", "groups", "units"),
    [
        ("ad_autoencoder", 9, 1032),
        ("cifar_resnet20", 12, 400),
        ("cifar_resnet56", 30, 1072),
        ("dtln_1", 0, 0),
        ("dtln_2", 0, 0),
        ("kws_dscnn", 5, 320),
        ("magika_v3_3", 2, 576),
        ("minilm_l6_v2", 12, 9288),
        ("mnist_lenet", 3, 570),
        ("mobilenetv1_025_224", 14, 1496),
        ("ppocr_cls", 26, 1338),
        ("silero_vad", 8, 706),
        ("squeezenet11", 25, 2944),
        ("supres", 3, 160),
    ],
)
def test_units_of_real_models(zoo: Path, name: str, groups: int, units: int) -> None:
    model = prepared(model_io.load(zoo / f"{name}.onnx"))
    coupling = labels.analyse(model)
    assert len(coupling.groups) == groups
    assert sum(g.size for g in coupling.groups) == units
