"""Which unfolding belongs to which layer: W times the unfolded rows must be the layer's output."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.calibration.geometry import unfold_of
from onnxcompress.calibration.statistics import (
    AxisUnfold,
    ConvUnfold,
    CrossMomentsRequest,
    MomentsRequest,
    TailRequest,
)
from onnxcompress.errors import ModelError
from tests.calibration.builders import gather, im2col, parse, run

FLOAT = ir.TensorType(ir.DataType.FLOAT)


def _normal(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _node(op_type: str, *shapes: tuple[int | str, ...] | None, **attributes: object) -> ir.Node:
    inputs = [
        ir.Value(name=f"i{n}", type=FLOAT, shape=None if s is None else ir.Shape(s))
        for n, s in enumerate(shapes)
    ]
    return ir.node(op_type, inputs, attributes=attributes, name="layer")  # type: ignore[arg-type]


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_conv_is_its_weight_times_its_rows(data: st.DataObject) -> None:
    auto = data.draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    groups = data.draw(st.sampled_from([1, 2]))
    kernel, stride = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = data.draw(st.integers(1, 2)) if auto == "NOTSET" else 1
    height, width = data.draw(st.tuples(st.integers(5, 8), st.integers(5, 8)))
    pads = ", pads = [0, 1, 2, 0]" if auto == "NOTSET" else ""
    weight = _normal(4, 4 // groups, kernel, 2)
    model = parse(
        f"""g (float[2, 4, {height}, {width}] x) => (float[A, B, C, D] y) {{
            y = Conv<auto_pad = "{auto}", group = {groups}, strides = [{stride}, 1],
                     dilations = [{dilation}, 1]{pads}>(x, w)
        }}""",
        {"w": weight},
    )
    x = _normal(2, 4, height, width)
    y = run(model, {"x": x})["y"]
    unfold = unfold_of(model.graph[0])
    assert isinstance(unfold, ConvUnfold)
    rows = im2col(x, unfold)
    matrix = weight.reshape(groups, 4 // groups, -1)
    expected = np.einsum("gnd,god->ngo", rows, matrix).reshape(-1, 4)
    np.testing.assert_allclose(
        np.moveaxis(y, 1, -1).reshape(-1, 4).astype(np.float64), expected, atol=1e-4
    )


@pytest.mark.parametrize(
    ("text", "shape", "data_input", "axis"),
    [
        ("MatMul(x, w)", (5, 4, 3), 0, -1),
        ("MatMul(w, x)", (5, 3, 4), 1, -2),
        ("Gemm(x, w)", (5, 3), 0, 1),
        ("Gemm<transA = 1>(x, w)", (3, 5), 0, 0),
        ("Gemm(w, x)", (3, 5), 1, 0),
        ("Gemm<transB = 1>(w, x)", (5, 3), 1, 1),
    ],
)
def test_matrix_products_regress_to_their_weight(
    text: str, shape: tuple[int, ...], data_input: int, axis: int
) -> None:
    weight = _normal(3, 2) if data_input == 0 else _normal(2, 3)
    axes, out = ", ".join(map(str, shape)), ", ".join("ABC"[: len(shape)])
    model = parse(f"g (float[{axes}] x) => (float[{out}] y) {{ y = {text} }}", {"w": weight})
    unfold = unfold_of(model.graph[0], data_input)
    assert unfold == AxisUnfold(axis)
    # A second value with the output's rows, whichever axis the targets run along.
    target_axis = -1 if data_input == 0 else len(shape) - 2
    model.graph[0].outputs[0].shape = None
    cross = CrossMomentsRequest("x", unfold, (("y", 1.0),), target_axis)
    samples = np.random.default_rng(1).standard_normal((6, *shape)).astype(np.float32)
    found = gather(model, [cross], {"x": samples})[cross]
    solved = np.linalg.solve(found.covariance[0], found.cross[0])
    np.testing.assert_allclose(solved, weight if data_input == 0 else weight.T, atol=1e-4)


def test_other_layers() -> None:
    assert unfold_of(_node("ConvTranspose", (1, 2, 3), (2, 3, 3))) == AxisUnfold(1)
    assert unfold_of(_node("LSTM", (1, 2, 3), (1, 8, 3))) == AxisUnfold(-1)
    with pytest.raises(ModelError, match="Relu 'layer' has no input to unfold"):
        unfold_of(_node("Relu", (1, 2)))


def test_same_padding_with_unknown_lengths() -> None:
    weight = (4, 4, 3)
    conv = _node("Conv", ("N", 4, "L"), weight, auto_pad="SAME_UPPER")
    assert unfold_of(conv) == ConvUnfold((3,), (1,), (1,), (1, 1))
    conv = _node("Conv", ("N", 4, "L"), weight, auto_pad="SAME_LOWER", strides=[2])
    with pytest.raises(ModelError, match="Conv 'layer': auto_pad=SAME with stride 2"):
        unfold_of(conv)
    with pytest.raises(ModelError, match="kernel shape is unknown"):
        unfold_of(_node("Conv", ("N", 4, "L"), None))


def test_requests_and_geometries_are_checked() -> None:
    with pytest.raises(ValueError, match="kernel of rank 2"):
        ConvUnfold((3, 3), (1,), (1, 1), (0, 0, 0, 0))
    with pytest.raises(ValueError, match="must be positive"):
        ConvUnfold((3,), (0,), (1,), (0, 0))
    with pytest.raises(ValueError, match="not be negative"):
        ConvUnfold((3,), (1,), (1,), (-1, 0))
    with pytest.raises(ValueError, match=r"in \(0, 0.5\)"):
        TailRequest("x", 0.5)
    with pytest.raises(ValueError, match="max_rows of 'x' must be positive"):
        MomentsRequest("x", AxisUnfold(), 0)
    with pytest.raises(ValueError, match="need a target"):
        CrossMomentsRequest("x", AxisUnfold(), (), 1)
