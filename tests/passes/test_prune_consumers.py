"""Linear layers as the regression reads them: layouts, moments and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from onnxcompress import model_io
from onnxcompress.calibration.collector import collect
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.calibration.statistics import REFERENCE_PREFIX, CrossMomentsRequest
from onnxcompress.interface import input_specs
from onnxcompress.passes.prune.consumers import Layers, UnsupportedError, consumer_of
from onnxcompress.progress import SilentProgress
from tests.builder import Array, ModelBuilder
from tests.running import SETTINGS, run_model


def built(builder: ModelBuilder) -> ir.Model:
    model = builder.build()
    model_io.normalize(model)
    return model


def convolution(group: int = 1, **attributes: str | list[int]) -> ir.Model:
    b = ModelBuilder("consumer_conv")
    x = b.input("x", ["batch", 4, 9, 7])
    weight, bias = b.weight(6, 4 // group, 3, 2), b.weight(6, fan_in=1)
    y = b.op("Conv", x, weight, bias, kernel_shape=[3, 2], group=group)
    b.nodes[-1].attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
    b.output(y)
    return built(b)


def product(
    op_type: str, *, alpha: float = 1.0, transposed: int = 0, flip: bool = False
) -> ir.Model:
    b = ModelBuilder(f"consumer_{op_type}_{transposed}")
    if op_type == "Gemm":
        x = b.input("x", ["batch", 5])
        weight = b.weight(*((3, 5) if transposed else (5, 3)))
        b.output(b.op("Gemm", x, weight, b.weight(1, 3), alpha=alpha, transB=transposed))
    else:
        x = b.input("x", ["batch", 4, 5])
        made, bias = b.op("MatMul", x, b.weight(5, 3)), b.weight(3, fan_in=1)
        b.output(b.op("Add", *((bias, made) if flip else (made, bias))))
    return built(b)


MODELS = {
    "padded": lambda: convolution(pads=[1, 0, 2, 1]),
    "strided": lambda: convolution(strides=[2, 1], dilations=[1, 3]),
    "grouped": lambda: convolution(group=2),
    "same_upper": lambda: convolution(auto_pad="SAME_UPPER", strides=[2, 2]),
    "same_lower": lambda: convolution(auto_pad="SAME_LOWER", strides=[2, 2]),
    "valid": lambda: convolution(auto_pad="VALID"),
    "gemm": lambda: product("Gemm", alpha=0.5),
    "gemm_transposed": lambda: product("Gemm", alpha=-2.0, transposed=1),
    "matmul": lambda: product("MatMul"),
    "matmul_bias_first": lambda: product("MatMul", flip=True),
}


def samples(model: ir.Model, count: int = 12) -> Array:
    shape = [count if not isinstance(d, int) else d for d in input_specs(model)[0].shape or ()]
    return np.random.default_rng(0).normal(1.0, 1.0, shape).astype(np.float32)


@pytest.mark.parametrize("name", MODELS)
def test_moments_and_matrix_belong_together(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    (consumer,) = Layers.of(model).consumers.values()
    request = CrossMomentsRequest(
        consumer.data,
        consumer.unfold,
        ((REFERENCE_PREFIX + consumer.output, 1.0),),
        consumer.target_axis,
    )
    data = open_dataset({"x": samples(model)}, input_specs(model))
    found = collect(
        model,
        [request],
        data,
        reference=model_io.clone(model),
        settings=SETTINGS,
        batch_size=5,
        seed=0,
        work_dir=tmp_path,
        progress=SilentProgress(),
        description="test",
    )[request]
    weight, bias = consumer.matrix(model), consumer.bias_vector(model)
    # y = W x + b holds exactly, so Cov(x, y) = Cov(x) Wᵀ and mean y = W mean x + b.
    expected = np.einsum("gde,goe->gdo", found.covariance, weight)
    np.testing.assert_allclose(found.cross, expected, atol=1e-4)
    mean = np.einsum("god,gd->go", weight, found.mean_x).ravel() + bias
    np.testing.assert_allclose(found.mean_y, mean, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_writing_what_was_read_changes_nothing_and_a_factor_scales_the_output(name: str) -> None:
    model = MODELS[name]()
    feeds = {"x": samples(model, 2)}
    (before,) = (v.astype(np.float64) for v in run_model(model, feeds).values())
    (consumer,) = Layers.of(model).consumers.values()
    weight, bias = consumer.matrix(model), consumer.bias_vector(model)
    consumer.write(model, weight, bias)
    (same,) = (v.astype(np.float64) for v in run_model(model, feeds).values())
    np.testing.assert_allclose(same, before, atol=1e-6)
    consumer.write(model, 3 * weight, 3 * bias)
    (tripled,) = (v.astype(np.float64) for v in run_model(model, feeds).values())
    np.testing.assert_allclose(tripled, 3 * before, rtol=1e-4, atol=1e-4)


def test_columns_of_channels_cover_the_kernel() -> None:
    (consumer,) = Layers.of(MODELS["grouped"]()).consumers.values()
    assert (consumer.groups, consumer.taps, consumer.width) == (2, 6, 12)
    assert consumer.columns(np.array([[1]])).tolist() == [[6, 7, 8, 9, 10, 11]]
    assert consumer.columns(np.array([0, 1])).tolist() == list(range(12))


def test_what_cannot_be_refitted_says_why() -> None:
    b = ModelBuilder("refused")
    x = b.input("x", ["batch", 4])
    wide = b.op("MatMul", x, b.weight(4, 4))
    b.output(b.op("Gemm", wide, b.weight(4, 4), b.weight(4, fan_in=1), beta=0.5))
    b.output(b.op("MatMul", wide, b.op("MatMul", b.op("Transpose", x, perm=[1, 0]), x)))
    b.output(b.op("Relu", wide))
    layers = Layers.of(built(b))
    reasons = sorted(layers.refused.values())
    assert any("beta" in r for r in reasons)
    assert any("computed, not stored" in r for r in reasons)
    assert any("Relu is not a linear layer" in r for r in reasons)
    assert len(layers.consumers) == 1


def test_a_shared_weight_is_an_obstacle() -> None:
    b = ModelBuilder("shared")
    x, weight = b.input("x", ["batch", 4]), b.weight(4, 4)
    b.output(b.op("MatMul", b.op("Relu", b.op("MatMul", x, weight)), weight))
    layers = Layers.of(built(b))
    assert len(layers.consumers) == 2
    for name in layers.consumers:
        assert "shared with" in layers.obstacle(name)


def test_an_unknown_domain_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Conv is not a linear layer"):
        consumer_of(ir.Node("com.example", "Conv", []))
