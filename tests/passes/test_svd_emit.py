"""Every layer as a chain of full rank computes what it computed before."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from onnxcompress import model_io
from onnxcompress.numerics.low_rank import Form, Spectrum
from onnxcompress.passes.svd.emit import Writer
from onnxcompress.passes.svd.moments import plain
from onnxcompress.passes.svd.options import SvdOptions
from onnxcompress.passes.svd.sites import Kind, find_sites
from tests.builder import Array, ModelBuilder
from tests.running import interface, largest_error, run_model


def convolution(**attributes: str | list[int]) -> ir.Model:
    b = ModelBuilder("svd_conv")
    x = b.input("x", ["batch", 4, 11, 9])
    y = b.op("Conv", x, b.weight(6, 4, 3, 2), b.weight(6))
    b.nodes[-1].attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
    b.output(y)
    return b.build()


def convolution_without_bias() -> ir.Model:
    b = ModelBuilder("svd_conv_plain")
    x = b.input("x", ["batch", 5, 8])
    b.output(b.op("Conv", x, b.weight(4, 5, 3), pads=[2, 0], strides=[2]))
    return b.build()


def gemm() -> ir.Model:
    b = ModelBuilder("svd_gemm")
    x = b.input("x", ["batch", 7])
    b.output(b.op("Gemm", x, b.weight(7, 5), b.weight(5), alpha=0.5))
    return b.build()


def gemm_transposed() -> ir.Model:
    b = ModelBuilder("svd_gemm_transposed")
    b.output(b.gemm(b.input("x", ["batch", 7]), 7, 5))
    return b.build()


def matmul() -> ir.Model:
    b = ModelBuilder("svd_matmul")
    b.output(b.linear(b.input("x", ["batch", "length", 6]), 6, 9))
    return b.build()


def matmul_left() -> ir.Model:
    b = ModelBuilder("svd_left")
    x = b.input("x", ["batch", 6, "length"])
    b.output(b.op("MatMul", b.weight(4, 6), x))
    return b.build()


def matmul_stack() -> ir.Model:
    b = ModelBuilder("svd_stack")
    x = b.input("x", ["batch", 3, "length", 6])
    b.output(b.op("MatMul", x, b.weight(3, 6, 5)))
    return b.build()


def recurrent(op_type: str, gates: int) -> ir.Model:
    b = ModelBuilder(f"svd_{op_type}")
    x = b.input("x", ["length", "batch", 8])
    w, r = b.weight(2, gates * 3, 8), b.weight(2, gates * 3, 3)
    b.output(
        b.op(op_type, x, w, r, b.weight(2, gates * 6), hidden_size=3, direction="bidirectional")
    )
    return b.build()


def embedding() -> ir.Model:
    b = ModelBuilder("svd_embedding")
    x = b.input("x", ["batch", "length"], np.int64)
    b.output(b.op("Gather", b.weight(20, 6), x))
    return b.build()


def transposed() -> ir.Model:
    b = ModelBuilder("svd_transposed")
    x = b.input("x", ["batch", 6, 5, 4])
    b.output(
        b.op("ConvTranspose", x, b.weight(6, 4, 3, 3), b.weight(4), strides=[2, 2], pads=[1] * 4)
    )
    return b.build()


CASES: dict[str, tuple[Callable[[], ir.Model], Kind]] = {
    "conv": (convolution, Kind.CONV),
    "strided": (lambda: convolution(strides=[2, 3], pads=[1, 0, 2, 1]), Kind.CONV),
    "dilated": (lambda: convolution(dilations=[2, 3], kernel_shape=[3, 2]), Kind.CONV),
    "same": (lambda: convolution(auto_pad="SAME_UPPER", strides=[2, 2]), Kind.CONV),
    "valid": (lambda: convolution(auto_pad="VALID"), Kind.CONV),
    "conv1d": (convolution_without_bias, Kind.CONV),
    "gemm": (gemm, Kind.GEMM),
    "gemm_transposed": (gemm_transposed, Kind.GEMM),
    "matmul": (matmul, Kind.MATMUL),
    "matmul_left": (matmul_left, Kind.LEFT),
    "matmul_stack": (matmul_stack, Kind.BATCHED),
    "lstm": (lambda: recurrent("LSTM", 4), Kind.RECURRENT),
    "gru": (lambda: recurrent("GRU", 3), Kind.RECURRENT),
    "embedding": (embedding, Kind.EMBEDDING),
    "transposed": (transposed, Kind.TRANSPOSED),
}


def feeds(model: ir.Model) -> dict[str, Array]:
    random = np.random.default_rng(0)
    made: dict[str, Array] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        shape = [d if isinstance(d, int) else 3 for d in value.shape]
        if value.dtype == ir.DataType.INT64:
            made[value.name or ""] = random.integers(0, 20, shape)
        else:
            made[value.name or ""] = random.normal(size=shape).astype(np.float32)
    return made


@pytest.mark.parametrize("name", CASES)
def test_full_rank_computes_the_same(name: str) -> None:
    build, kind = CASES[name]
    model = build()
    model_io.normalize(model)
    (site,) = find_sites(model, SvdOptions()).sites
    assert site.kind is kind
    spectra = plain(model, site).spectra
    assert len(spectra) == site.batch
    data = feeds(model)
    for form in site.kernel.forms:
        ranks: tuple[int, ...] = (site.kernel.most(form),)
        if form is Form.TUCKER:
            ranks = (*ranks, site.kernel.outputs)
        result = model_io.clone(model)
        written = Writer(result).write(site, [s.chain(form, ranks) for s in spectra])
        assert site.weight not in result.graph.initializers
        assert written.ranks == ranks
        assert all(f.startswith(f"{site.weight}/svd_") for f in written.factors)
        model_io.infer_shapes(result)
        model_io.check(result)
        assert interface(result) == interface(model)
        assert largest_error(run_model(result, data), run_model(model, data)) < 2e-6


def test_a_new_bias_is_added_to_the_last_part_only() -> None:
    model = convolution_without_bias()
    model_io.normalize(model)
    (site,) = find_sites(model, SvdOptions()).sites
    assert site.takes_bias
    assert site.bias is None
    before = run_model(model, feeds(model))
    chain = plain(model, site).spectra[0].chain(Form.INPUT, (5,))
    written = Writer(model).write(site, [chain], np.arange(4.0))
    first, last = model.graph
    assert written.bias == last.inputs[2].name  # type: ignore[union-attr]
    assert len(first.inputs) == 2
    after = run_model(model, feeds(model))
    for name, array in before.items():
        shifted = array.astype(np.float64) + np.arange(4.0)[:, None]
        np.testing.assert_allclose(after[name].astype(np.float64), shifted, atol=1e-5)


def test_a_chain_can_be_rewritten() -> None:
    model = gemm()
    model_io.normalize(model)
    (site,) = find_sites(model, SvdOptions()).sites
    chain = plain(model, site).spectra[0].chain(Form.OUTPUT, (5,))
    written = Writer(model).write(site, [chain])
    zero = Spectrum(np.zeros((5, 7)), site.kernel).chain(Form.OUTPUT, (5,))
    written.store(model, [zero], np.full(5, 2.0))
    (array,) = run_model(model, feeds(model)).values()
    np.testing.assert_allclose(array.astype(np.float64), 2.0, atol=1e-6)


REFUSED: dict[str, tuple[str, Callable[[ModelBuilder, str], str]]] = {
    "grouped": ("grouped or depthwise", lambda b, x: b.conv(x, 4, 8, groups=2)),
    "shared": (
        "shared with",
        lambda b, x: b.op(
            "Add",
            b.op("MatMul", x, b.weight(6, 6, name="twice")),
            b.op("MatMul", x, "twice"),
        ),
    ),
    "beta": (
        "beta",
        lambda b, x: b.op("Gemm", b.op("Flatten", x), b.weight(144, 6), b.weight(6), beta=0.5),
    ),
    "transposed_data": (
        "transA",
        lambda b, x: b.op("Gemm", b.op("Flatten", x), b.weight(2, 6), transA=1),
    ),
    "not_rows": (
        "whole rows",
        lambda b, x: b.op("Gather", b.weight(6, 6), b.op("Cast", x, to=7), axis=1),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_split_says_why(name: str) -> None:
    reason, build = REFUSED[name]
    b = ModelBuilder(f"svd_refused_{name}")
    b.output(build(b, b.input("x", [2, 4, 6, 6])))
    model = b.build()
    model_io.normalize(model)
    found = find_sites(model, SvdOptions())
    assert not found.sites
    assert any(reason in s.reason for s in found.skips), found.skips
