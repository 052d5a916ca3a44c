from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress.errors import ModelError
from onnxcompress.graph.constants import (
    add_initializer,
    constant_of,
    constant_tensor,
    is_constant,
    scalar_of,
    set_initializer,
)
from tests.fixtures import fixture

MODEL = """<ir_version: 8, opset_import: ["" : 17]>
main (float[2] x, float[2] overridable) => (float[2] z)
<float[2] w = {1.0, 2.0}, float[2] overridable = {3.0, 4.0}> {
    half = Constant <value_float = 0.5> ()
    t = Mul(x, w)
    u = Mul(t, half)
    v = Add(u, overridable)
    z = Relu(v)
}"""


def _values(model: ir.Model) -> dict[str, ir.Value]:
    return ir.convenience.create_value_mapping(model.graph)


def test_initializers_and_constant_nodes_are_constant() -> None:
    values = _values(ir.from_onnx_text(MODEL))
    w, half = constant_of(values["w"]), constant_of(values["half"])
    assert w is not None
    assert w.tolist() == [1.0, 2.0]
    assert half is not None
    assert half.shape == ()
    assert is_constant(values["w"])


def test_computed_values_inputs_and_absent_inputs_are_not() -> None:
    values = _values(ir.from_onnx_text(MODEL))
    assert constant_of(values["t"]) is None
    assert constant_of(values["x"]) is None
    assert constant_of(None) is None


def test_an_initializer_that_callers_can_override_is_not_constant() -> None:
    model = ir.from_onnx_text(MODEL)
    value = model.graph.inputs[1]
    assert value.const_value is not None
    assert constant_tensor(value) is None


def test_scalar_of_takes_any_rank_but_one_element_only() -> None:
    model = fixture("conv_chain").build()
    one = add_initializer(model, "one", np.full((1, 1, 1), 0.25, np.float32))
    two = add_initializer(model, "two", np.zeros(2, np.float32))
    assert scalar_of(one) == 0.25
    assert scalar_of(two) is None
    assert scalar_of(model.graph.inputs[0]) is None


def test_set_initializer_changes_what_users_read() -> None:
    model = ir.from_onnx_text(MODEL)
    before = _values(model)["w"]
    after = set_initializer(model.graph, "w", np.ones((2,), np.float16))
    assert after is before
    assert after.dtype == ir.DataType.FLOAT16
    assert constant_of(model.graph.node(1).inputs[1]) is constant_of(after)


def test_set_initializer_changes_the_shape() -> None:
    model = ir.from_onnx_text(MODEL)
    value = set_initializer(model.graph, "w", np.ones((3, 1), np.float32))
    assert value.shape == ir.Shape([3, 1])


def test_an_initializer_cannot_take_the_name_of_a_computed_value() -> None:
    model = ir.from_onnx_text(MODEL)
    for taken in ("t", "x"):
        with pytest.raises(ModelError, match=taken):
            set_initializer(model.graph, taken, np.ones(2, np.float32))


def test_add_initializer_finds_a_free_name_and_survives_serialization() -> None:
    model = ir.from_onnx_text(MODEL)
    assert add_initializer(model, "t", np.arange(3)).name == "t_1"
    packed = add_initializer(
        model, "packed", np.array([-8, 7, 1], dtype=ml_dtypes.int4), dtype=ir.DataType.INT4
    )
    assert packed.dtype == ir.DataType.INT4
    again = ir.from_proto(ir.to_proto(model)).graph.initializers
    read = constant_of(again["packed"])
    assert read is not None
    assert read.astype(np.int64).tolist() == [-8, 7, 1]
