"""Fused operators: attention in its forms, rotary positions, and what runtimes fuse themselves."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.graph import labels, surgery
from onnxcompress.graph.cost import cost_of
from tests.builder import ModelBuilder
from tests.fixtures import Fixture
from tests.graph.law import error, law_error, outputs, prepared, removal, sizes

MS = "com.microsoft"


def _projections(b: ModelBuilder, x: str, *widths: int) -> list[str]:
    return [b.linear(x, 8, width) for width in widths]


def _builder(name: str, opset: int = 17, batch: str | int = "batch") -> tuple[ModelBuilder, str]:
    b = ModelBuilder(name, opset=opset, ir_version=10, domains={MS: 1})
    return b, b.input("x", [batch, 5, 8])


def attention_of_three_axes() -> ir.Model:
    """Grouped queries: four query heads, two key and value heads, a mask."""
    b, x = _builder("attention_of_three_axes", 23)
    q, k, v = _projections(b, x, 12, 6, 8)
    y = b.op("Attention", q, k, v, b.weight(5, 5), q_num_heads=4, kv_num_heads=2)
    b.output(b.linear(y, 16, 8), ["batch", 5, 8])
    return b.build()


def attention_of_four_axes() -> ir.Model:
    b, x = _builder("attention_of_four_axes", 23)
    shape = b.constant([0, 0, 4, 3])
    q, k, v = (
        b.op("Transpose", b.op("Reshape", p, shape), perm=[0, 2, 1, 3])
        for p in _projections(b, x, 12, 12, 12)
    )
    y = b.op("Attention", q, k, v, b.weight(1, 4, 5, 5), is_causal=0)
    y = b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1, 3]), b.constant([0, 0, 12]))
    b.output(b.linear(y, 12, 8), ["batch", 5, 8])
    return b.build()


def attention_with_rotary() -> ir.Model:
    """Queries and keys are turned, three axes for the one and four for the other."""
    b, x = _builder("attention_with_rotary", 23)
    q, k, v = _projections(b, x, 16, 16, 16)
    angles = b.rng.uniform(0, 1, (5, 2)).astype(np.float32)
    cos, sin = b.constant(np.cos(angles)), b.constant(np.sin(angles))
    places = b.constant(np.tile(np.arange(5), (2, 1)))
    q, k = (b.op("RotaryEmbedding", p, cos, sin, places, num_heads=4) for p in (q, k))
    y = b.op("Attention", q, k, v, q_num_heads=4, kv_num_heads=4)
    b.output(b.linear(y, 16, 8), ["batch", 5, 8])
    return b.build()


def single_key_head() -> ir.Model:
    b, x = _builder("single_key_head", 23)
    q, k, v = _projections(b, x, 12, 3, 3)
    y = b.op("Attention", q, k, v, q_num_heads=4, kv_num_heads=1)
    b.output(b.linear(y, 12, 8), ["batch", 5, 8])
    return b.build()


def multi_head() -> ir.Model:
    b, x = _builder("multi_head")
    q, k, v = (b.op("MatMul", x, b.weight(8, 12, fan_in=8)) for _ in range(3))
    y = b.op("MultiHeadAttention", q, k, v, b.weight(36, fan_in=4), domain=MS, num_heads=4)
    y = b.op("SkipLayerNormalization", b.linear(y, 12, 8), x, b.weight(8), b.weight(8), domain=MS)
    y = b.op("BiasGelu", b.op("MatMul", y, b.weight(8, 10)), b.weight(10), domain=MS)
    b.output(b.op("FusedMatMul", y, b.weight(8, 10), domain=MS, transB=1), ["batch", 5, 8])
    return b.build()


def grouped_query_operator() -> ir.Model:
    """With rotary positions inside and a cache that the model gives away."""
    b, x = _builder("grouped_query_operator", batch=1)
    q, k, v = _projections(b, x, 64, 32, 32)
    past = [b.input(n, [1, 2, "past", 16]) for n in ("past_k", "past_v")]
    lengths = b.constant(np.array([7], np.int32))
    total = b.constant(np.array(8, np.int32))
    angles = b.rng.uniform(0, 1, (16, 8)).astype(np.float32)
    y, *present = b.ops(
        "GroupQueryAttention", q, k, v, *past, lengths, total,
        b.constant(np.cos(angles)), b.constant(np.sin(angles)),
        domain=MS, outputs=3, num_heads=4, kv_num_heads=2, do_rotary=1,
    )  # fmt: skip
    b.output(b.linear(y, 64, 8), [1, 5, 8])
    for value in present:
        b.output(value, [1, 2, "all", 16])
    return b.build()


def packed_grouped_query() -> ir.Model:
    b, x = _builder("packed_grouped_query")
    qkv = b.linear(x, 8, 128)
    lengths = b.constant(np.array([4, 4], np.int32))
    y = b.op(
        "GroupQueryAttention", qkv, "", "", "", "", lengths, b.constant(np.array(5, np.int32)),
        domain=MS, num_heads=4, kv_num_heads=2,
    )  # fmt: skip
    b.output(b.linear(y, 64, 8), ["batch", 5, 8])
    return b.build()


def projected_attention() -> ir.Model:
    b, x = _builder("projected_attention")
    x = b.op("Relu", b.linear(x, 8, 6))
    weight, bias = b.weight(6, 36, fan_in=6), b.weight(36, fan_in=4)
    y = b.op("Attention", x, weight, bias, domain=MS, num_heads=4)
    b.output(b.linear(y, 12, 8), ["batch", 5, 8])
    return b.build()


def rotary_operator() -> ir.Model:
    """The heads of a rotary embedding that says their number, and of one that does not."""
    b, x = _builder("rotary_operator")
    angles = b.rng.uniform(0, 1, (16, 2)).astype(np.float32)
    caches = b.constant(np.cos(angles)), b.constant(np.sin(angles))
    places = b.constant(np.tile(np.arange(5), (2, 1)))
    y = b.op("RotaryEmbedding", b.linear(x, 8, 16), places, *caches, domain=MS)
    b.output(b.linear(y, 16, 8), ["batch", 5, 8])
    return b.build()


def fused_convolutions() -> ir.Model:
    b = ModelBuilder("fused_convolutions", ir_version=10, domains={MS: 1})
    x = b.input("x", ["batch", 3, 6, 6])
    y = b.conv(x, 3, 8)
    z = b.op(
        "FusedConv", y, b.weight(8, 8, 3, 3), b.weight(8), y,
        domain=MS, activation="Relu", pads=[1] * 4,
    )  # fmt: skip
    z = b.op("FusedConv", z, b.weight(6, 8, 1, 1), domain=MS, activation="Tanh")
    y = b.op("Flatten", b.op("GlobalAveragePool", z))
    y = b.op("FusedGemm", y, b.weight(7, 6), b.weight(7), domain=MS, activation="Relu", transB=1)
    b.output(b.linear(y, 7, 2), ["batch", 2])
    return b.build()


def deformed_convolution() -> ir.Model:
    b = ModelBuilder("deformed_convolution", opset=19, ir_version=10)
    x = b.input("x", ["batch", 3, 6, 6])
    y = b.op("Relu", b.conv(x, 3, 8))
    offsets = b.conv(y, 8, 18)
    y = b.op("DeformConv", y, b.weight(5, 8, 3, 3), offsets, b.weight(5), pads=[1] * 4)
    b.output(b.conv(b.op("Relu", y), 5, 2), ["batch", 2, 6, 6])
    return b.build()


CASES: dict[str, tuple[Fixture, dict[str, int]]] = {
    build.__name__: (Fixture(build.__name__, build, axes={"past": 3}), units)
    for build, units in (
        (attention_of_three_axes, {"matmul_0": 2}),
        (attention_of_four_axes, {"matmul_0": 4}),
        (attention_with_rotary, {"matmul_0": 4}),
        (single_key_head, {"matmul_0": 4}),
        (multi_head, {"matmul_0": 4, "matmul_4": 10}),
        (grouped_query_operator, {"matmul_0": 2}),
        (packed_grouped_query, {"matmul_0": 2}),
        (projected_attention, {"matmul_0": 6, "attention_0": 4}),
        (rotary_operator, {"matmul_0": 4}),
        (fused_convolutions, {"conv_0": 8, "fusedconv_1": 6, "fusedgemm_0": 7}),
        (deformed_convolution, {"conv_0": 8, "deformconv_0": 5}),
    )
}


@pytest.mark.parametrize("name", CASES)
def test_number_of_units_is_pinned(name: str) -> None:
    case, units = CASES[name]
    assert sizes(case.build()) == units


@pytest.mark.parametrize("policy", ["heads", "head_dims"])
@pytest.mark.parametrize("name", CASES)
def test_removing_is_masking(name: str, policy: str) -> None:
    case, _ = CASES[name]
    model = prepared(case.build())
    coupling = labels.analyse(model, reshape_policy=policy)  # type: ignore[arg-type]
    assert coupling.groups or ("grouped_query" in name and policy == "head_dims")
    feeds = case.feeds(model)
    for seed, fraction in enumerate((0.2, 0.5, 1.0)):
        removed = removal(coupling, fraction, seed)
        assert law_error(model, coupling, removed, feeds) <= 1e-5, fraction


@pytest.mark.parametrize("name", CASES)
def test_masking_is_not_the_identity(name: str) -> None:
    case, _ = CASES[name]
    model = prepared(case.build())
    coupling = labels.analyse(model)
    feeds = case.feeds(model)
    masked = surgery.mask(model, coupling, removal(coupling, 1.0, 0))
    assert error(outputs(model, feeds), outputs(masked, feeds)) > 1e-3


@pytest.mark.parametrize("name", ["attention_of_three_axes", "attention_of_four_axes"])
def test_head_dimensions_keep_the_scale_of_the_original(name: str) -> None:
    case, _ = CASES[name]
    model = prepared(case.build())
    coupling = labels.analyse(model, reshape_policy="head_dims")
    assert sorted(g.size for g in coupling.groups) in ([3, 3], [3, 4])
    surgery.remove(model, coupling, {g.index: np.array([1]) for g in coupling.groups})
    (node,) = (n for n in model.graph if n.op_type == "Attention")
    assert node.attributes["scale"].as_float() == pytest.approx(3**-0.5)


@pytest.mark.parametrize("name", ["attention_of_three_axes", "attention_of_four_axes"])
def test_costs_of_attention_are_known_before_removing(name: str) -> None:
    case, _ = CASES[name]
    model = prepared(case.build())
    coupling = labels.analyse(model)
    macs = surgery.MacsModel(model, coupling)
    assert macs.total == cost_of(model).macs
    removed = removal(coupling, 0.5, 0)
    expected = macs.remaining(removed)
    surgery.remove(model, coupling, removed)
    assert cost_of(model).macs == expected < macs.total
