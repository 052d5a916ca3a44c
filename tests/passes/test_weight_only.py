from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.calibration.statistics import Statistic
from onnxcompress.errors import UsageError
from onnxcompress.interface import input_specs
from onnxcompress.passes._layout import Layout, row_axes
from onnxcompress.passes.base import PassReport
from onnxcompress.passes.weight_only import Format, Rounding, WeightOnlyOptions, WeightOnlyPass
from onnxcompress.runtime import optimized_graph
from tests.builder import Array, ModelBuilder
from tests.fixtures import FIXTURES, Fixture, fixture
from tests.running import SETTINGS, context, interface, largest_error, run_model

HERE = Path()  # the pass writes no files

EIGHT = WeightOnlyOptions(min_elements=1)
FORMS = {
    "int8": EIGHT,
    "int8_blocks": WeightOnlyOptions(block_size=16, min_elements=1, symmetric=False),
    "int4": WeightOnlyOptions(bits=4, block_size=16, min_elements=1),
    "int4_foldable": WeightOnlyOptions(
        bits=4, block_size=12, format=Format.FOLDABLE, symmetric=False, min_elements=1
    ),
    "int4_dequantize": WeightOnlyOptions(
        bits=4, block_size=16, format=Format.DEQUANTIZE, min_elements=1
    ),
}
# Largest error relative to the largest output: that of 8-bit activations comes on top in blocks.
TOLERANCE = {"int8": 0.03, "int8_blocks": 0.06}
# Raising the opset takes most of the time: a few of them with the forms that need it.
RAISED = {"conv_chain", "unet", "mini_transformer", "lstm", "tied_weights", "if_model", "opset7"}
CASES = [
    (case, form)
    for case in FIXTURES
    for form in FORMS
    if form not in {"int4_foldable", "int4_dequantize"} or case.name in RAISED
]


def quantize(model: ir.Model, options: WeightOnlyOptions) -> PassReport:
    return WeightOnlyPass(options).run(model, context(HERE))


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.all_nodes())


def prepared(case: Fixture) -> ir.Model:
    model = case.build()
    model_io.normalize(model)
    return model


def product(rows: int, columns: int, batch: int = 3) -> tuple[ir.Model, dict[str, Array]]:
    """One MatMul [batch, 2, rows] x [rows, columns]."""
    b = ModelBuilder(f"product{rows}x{columns}")
    b.output(b.op("MatMul", b.input("x", [batch, 2, rows]), b.weight(rows, columns, name="w")))
    model = b.build()
    model_io.normalize(model)
    return model, Fixture("product", b.build).feeds(model)


def table(rows: int, width: int) -> tuple[ir.Model, dict[str, Array]]:
    """One Gather of all rows."""
    b = ModelBuilder(f"table{rows}x{width}")
    b.output(b.op("Gather", b.weight(rows, width, name="w"), b.input("i", [rows], np.int64)))
    model = b.build()
    model_io.normalize(model)
    return model, {"i": np.arange(rows)[::-1].copy()}


# --- every fixture -------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "form"), CASES, ids=str)
def test_every_fixture_runs_and_keeps_its_interface(case: Fixture, form: str) -> None:
    model = prepared(case)
    original = model.clone()
    report = quantize(model, FORMS[form])
    model_io.infer_shapes(model)
    model_io.check(model)
    assert interface(model) == interface(original)
    weights = {v for g in original.graphs() for v in g.initializers}
    treated = {c.node for c in report.changes}
    assert treated <= weights
    left = {v for g in model.graphs() for v in g.initializers}
    assert not treated & left
    assert all(
        value.uses()
        for graph in model.graphs()
        for value in graph.initializers.values()
        if "/weights_" in (value.name or "")
    )
    if case.runs:
        feeds = case.feeds(original)
        found, expected = run_model(model, feeds), run_model(original, feeds)
        floats = [n for n, a in expected.items() if a.dtype.kind == "f"]
        error = largest_error({n: found[n] for n in floats}, {n: expected[n] for n in floats})
        assert error <= TOLERANCE.get(form, 0.6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["tied_weights", "lstm", "mini_transformer"])
def test_a_plan_changes_nothing_and_names_what_a_run_treats(name: str, form: str) -> None:
    model = prepared(fixture(name))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    plan = WeightOnlyPass(FORMS[form]).plan(model, context(HERE))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    report = quantize(model, FORMS[form])
    assert (plan.changes, plan.skips) == (report.changes, report.skips)
    assert plan.changes


@pytest.mark.parametrize(
    "name", ["conv_chain", "conv_1d_3d", "lstm", "tied_weights", "if_model", "loop_model", "einsum"]
)
@pytest.mark.parametrize("form", ["int8", "int4_foldable"])
def test_foldable_weights_are_computed_at_load(name: str, form: str, tmp_path: Path) -> None:
    model = prepared(fixture(name))
    original = model.clone()
    if form == "int4_foldable":
        model_io.normalize(original, min_opset=21)
    before = ops(optimized_graph(original, SETTINGS, tmp_path))
    quantize(model, FORMS[form])
    after = ops(optimized_graph(model, SETTINGS, tmp_path))
    assert after == before


# --- kernels of onnxruntime ----------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("inner", "block"), [(64, 16), (100, 32), (48, 128), (33, 16)])
def test_matmul_nbits_computes_with_the_weights_meant(
    bits: int, symmetric: bool, inner: int, block: int
) -> None:
    """The foldable form of the same codes is plain arithmetic: both have to agree."""
    model, feeds = product(inner, 24)
    plain = model.clone()
    common = WeightOnlyOptions(
        bits=bits, block_size=block, symmetric=symmetric, accuracy_level=1, min_elements=1
    )
    report = quantize(model, common)
    assert ops(model) == {"MatMulNBits": 1}
    (node,) = model.graph
    codes, scale = node.inputs[1], node.inputs[2]
    assert codes is not None
    assert scale is not None
    length = node.attributes["block_size"].as_int()
    assert codes.const_value is not None
    assert codes.const_value.shape.numpy() == (24, -(-inner // length), length * bits // 8)
    weight = _expanded(model, bits)[:, :inner]
    array = plain.graph.initializers["w"].const_value
    assert array is not None
    assert 10 * np.log10(
        np.square(array.numpy()).sum() / np.square(array.numpy() - weight.T).sum()
    ) == pytest.approx(float(report.figures["weight_sqnr_db"]), abs=0.01)
    expected = feeds["x"].astype(np.float64) @ weight.T
    (found,) = run_model(model, feeds).values()
    error = np.abs(found.astype(np.float64) - expected).max()
    assert error <= 1e-5 * np.abs(expected).max()


def _expanded(model: ir.Model, bits: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Dequantize a MatMulNBits node by the layout that onnxruntime documents."""
    (node,) = model.graph
    arrays = [None if v is None else v.const_value for v in node.inputs]
    assert arrays[1] is not None
    assert arrays[2] is not None
    codes, scale = arrays[1].numpy(), arrays[2].numpy().astype(np.float64)
    zero: Array = np.full(scale.shape, 1 << (bits - 1))
    if bits == 4:
        codes = np.stack([codes % 16, codes // 16], -1).reshape(*codes.shape[:2], -1)
    if len(arrays) > 3 and arrays[3] is not None:
        zero = arrays[3].numpy()
        if bits == 4:
            zero = np.stack([zero % 16, zero // 16], -1).reshape(len(zero), -1)
        zero = zero[:, : scale.shape[1]]
    steps = codes.astype(np.float64) - zero.astype(np.float64)[..., None]
    return np.asarray((steps * scale[..., None]).reshape(len(scale), -1))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (8, 16), (8, 64)])
def test_gathered_blocks_equal_the_folded_ones(bits: int, block: int, symmetric: bool) -> None:
    model, feeds = table(20, 64)
    folded = model.clone()
    quantize(
        model,
        WeightOnlyOptions(bits=bits, block_size=block, symmetric=symmetric, min_elements=1),
    )
    assert ops(model) == {"GatherBlockQuantized": 1}
    quantize(
        folded,
        WeightOnlyOptions(
            bits=bits,
            block_size=block,
            symmetric=symmetric,
            format=Format.FOLDABLE,
            min_elements=1,
        ),
    )
    assert "Mul" in ops(folded)
    assert largest_error(run_model(model, feeds), run_model(folded, feeds)) < 1e-6


@pytest.mark.parametrize("width", [50, 63, 12])
def test_tables_of_awkward_width(width: int) -> None:
    model, feeds = table(40, width)
    original = model.clone()
    quantize(model, WeightOnlyOptions(bits=4, block_size=16, min_elements=1))
    model_io.check(model)
    assert largest_error(run_model(model, feeds), run_model(original, feeds)) < 0.1


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_table_per_row_is_gathered_in_codes(symmetric: bool) -> None:
    model, feeds = table(40, 30)
    original = model.clone()
    quantize(model, WeightOnlyOptions(symmetric=symmetric, min_elements=1))
    assert ops(model)["Gather"] == (2 if symmetric else 3)
    assert largest_error(run_model(model, feeds), run_model(original, feeds)) < 0.005


def test_a_plain_gemm_keeps_its_bias() -> None:
    model = prepared(fixture("mlp_gemm"))
    original = model.clone()
    feeds = fixture("mlp_gemm").feeds(original)
    quantize(model, WeightOnlyOptions(block_size=16, accuracy_level=1, min_elements=1))
    assert ops(original)["Gemm"] == ops(model)["MatMulNBits"] + 1 == 3
    # The last one scales its product, which the kernel cannot.
    (left,) = [n for n in model.graph if n.op_type == "Gemm"]
    assert left.attributes["alpha"].as_float() != 1
    assert largest_error(run_model(model, feeds), run_model(original, feeds)) < 0.02


def test_one_weight_of_two_products_is_stored_once() -> None:
    model = prepared(fixture("tied_weights"))
    quantize(model, WeightOnlyOptions(bits=4, block_size=16, min_elements=1))
    products = [n for n in model.graph if n.op_type == "MatMulNBits"]
    assert len(products) == 2
    assert products[0].inputs[1] is products[1].inputs[1]


# --- dequantize ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantize_is_standard_onnx(bits: int) -> None:
    model, feeds = product(40, 24)
    original = model.clone()
    options = WeightOnlyOptions(
        bits=bits, block_size=16, format=Format.DEQUANTIZE, symmetric=False, min_elements=1
    )
    report = quantize(model, options)
    assert model.opset_imports == {"": 21}
    assert "raised from 17 to 21" in " ".join(report.notes)
    assert ops(model) == {"DequantizeLinear": 1, "MatMul": 1}
    model_io.check(model)
    assert largest_error(run_model(model, feeds), run_model(original, feeds)) < 0.2


# --- what stays ----------------------------------------------------------------------------------


def test_small_tensors_are_one_skip() -> None:
    report = quantize(prepared(fixture("mini_transformer")), WeightOnlyOptions())
    assert report.changes == ()
    (skip,) = report.skips
    assert "min_elements=1024" in skip.reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [("half_precision", "FLOAT16"), ("double_precision", "DOUBLE"), ("opset7", None)],
)
def test_only_float32_is_treated(name: str, reason: str | None) -> None:
    report = quantize(prepared(fixture(name)), EIGHT)
    if reason is None:
        assert report.changes
    else:
        assert report.changes == ()
        assert any(reason in s.reason for s in report.skips)


def test_what_no_product_reads_stays_with_the_reason() -> None:
    b = ModelBuilder("added")
    x = b.input("x", ["batch", 40, 40])
    y = b.op("Add", x, b.weight(40, 40, name="positions"))
    bad = np.full((40, 40), np.nan, np.float32)
    b.output(b.op("MatMul", y, b.constant(bad, "bad")))
    report = quantize(b.build(), EIGHT)
    reasons = {s.node: s.reason for s in report.skips}
    assert re.match(r"Add 'add_0' reads it", reasons["positions"])
    assert "not finite" in reasons["bad"]


def test_embeddings_can_stay() -> None:
    model, _ = table(40, 64)
    report = quantize(model, WeightOnlyOptions(embeddings=False))
    assert "embeddings=false" in report.skips[0].reason


def test_patterns_choose_by_weight_or_node() -> None:
    model = prepared(fixture("mlp_matmul"))
    names = {v.name for v in model.graph.initializers.values() if len(v.shape or ()) == 2}
    first = next(n for n in model.graph if n.op_type in {"MatMul", "Gemm"})
    weight = first.inputs[1]
    assert weight is not None
    only = quantize(model.clone(), WeightOnlyOptions(min_elements=1, include=(first.name or "",)))
    assert {c.node for c in only.changes} == {weight.name}
    rest = quantize(model.clone(), WeightOnlyOptions(min_elements=1, exclude=(weight.name or "",)))
    assert {c.node for c in rest.changes} == names - {weight.name}


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    for options in (WeightOnlyOptions(include=("nowhere*",)), WeightOnlyOptions(exclude=("x_y",))):
        with pytest.raises(UsageError, match="matches no weight"):
            quantize(prepared(fixture("mlp_gemm")), options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": "6"}, "must be 8, 4, 2 or 1"),
        ({"format": "matmul_nbits", "block_size": "24"}, "does not go with"),
        ({"format": "matmul_nbits", "block_size": "0"}, "does not go with"),
        ({"block_size": "-1"}, "at least 0"),
        ({"accuracy_level": "5"}, "at most 4"),
    ],
)
def test_options_that_contradict(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        WeightOnlyOptions.parse(values, owner="weights")


# --- error feedback ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv_chain", "grouped_shuffle", "mlp_gemm", "mini_transformer"])
def test_feedback_brings_the_outputs_nearer(name: str) -> None:
    model = prepared(fixture(name))
    original = model.clone()
    many = fixture(name).feeds(original, batch=64, seed=1)
    job = context(HERE, open_dataset(many, input_specs(model)))
    feeds = fixture(name).feeds(original, batch=32, seed=2)
    expected = run_model(original, feeds)
    errors: dict[Rounding, float] = {}
    for rounding in Rounding:
        options = WeightOnlyOptions(
            bits=4, format=Format.FOLDABLE, rounding=rounding, min_elements=1
        )
        quantized = model.clone()
        report = WeightOnlyPass(options).run(quantized, job)
        found = run_model(quantized, feeds)
        errors[rounding] = sum(
            float(np.square(found[n].astype(np.float64) - a.astype(np.float64)).sum())
            for n, a in expected.items()
        )
    assert report.figures["rounded_with_feedback"] == len(report.changes)
    assert errors[Rounding.GPTQ] < 0.9 * errors[Rounding.NEAREST]


def test_only_feedback_asks_for_calibration() -> None:
    assert WeightOnlyPass().needs == frozenset()
    gptq = WeightOnlyPass(WeightOnlyOptions(rounding=Rounding.GPTQ))
    assert gptq.needs == {Statistic.MOMENTS}


# --- layout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_a_layout_goes_there_and_back(rows: tuple[int, ...]) -> None:
    data = np.arange(24).reshape(2, 3, 4)
    layout = Layout(data.shape, rows)
    matrix = layout.matrix(data)
    assert matrix.shape == (layout.row_count, layout.columns)
    np.testing.assert_array_equal(layout.tensor(matrix), data)
    first = matrix.max(1).reshape(layout.per_row)
    other = tuple(a for a in range(3) if a not in rows)
    np.testing.assert_array_equal(first, data.max(other, keepdims=True))


@pytest.mark.parametrize(
    ("name", "op_type", "index", "rank", "rows"),
    [
        ("conv_chain", "Conv", 1, 4, (0,)),
        ("conv_chain", "Gemm", 1, 2, (0,)),
        ("unet", "ConvTranspose", 1, 4, (1,)),
        ("mlp_matmul", "MatMul", 1, 2, (1,)),
        ("embedding", "Gather", 0, 2, (0,)),
        ("lstm", "LSTM", 2, 3, (0, 1)),
        ("einsum", "Einsum", 1, 3, (1, 2)),
        ("tied_weights", "Transpose", 0, 2, (0,)),
        ("conv_chain", "Relu", 0, 4, None),
    ],
)
def test_output_channels_of_operators(
    name: str, op_type: str, index: int, rank: int, rows: tuple[int, ...] | None
) -> None:
    model = fixture(name).build()
    node = next(n for n in model.graph if n.op_type == op_type)
    assert row_axes(node, index, rank) == rows
