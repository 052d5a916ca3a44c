"""Groups that lose all units: the law holds, what is useless goes, and what cannot go says why."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcompress import model_io
from onnxcompress.errors import UsageError
from onnxcompress.graph import labels, surgery
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.graph.cost import cost_of
from onnxcompress.graph.coupling import Coupling
from onnxcompress.graph.emptying import Emptying, RefusedError
from tests.builder import ModelBuilder
from tests.fixtures import RUNNABLE, Fixture, fixture
from tests.graph import builders
from tests.graph.law import Removal, law_error, prepared, removal

EVERY = (*RUNNABLE, *builders.FIXTURES)
EMPTIABLE = {
    "residual_bn": 2,
    "inception_concat": 3,
    "squeeze_excite": 1,
    "unet": 1,
    "pad_slice_shortcut": 2,
    "glu_split": 1,
    "mini_transformer": 4,
    "primitive_transformer": 2,
    "opset11": 2,
    "fused_qkv": 1,
    "slices": 3,
    "split_parts": 2,
    "wide_flatten": 1,
}
"""Groups that may go whole, by fixture; of all others none may."""


def able(model: ir.Model, coupling: Coupling) -> list[int]:
    emptying = Emptying(model, coupling)
    return [g.index for g in coupling.groups if emptying.reason(g.index) is None]


def emptied(coupling: Coupling, emptying: Emptying, groups: list[int]) -> Removal:
    groups = [*groups, *emptying.of(groups).implied]
    return {g: np.arange(coupling.groups[g].size) for g in groups}


def largest_set(emptying: Emptying, groups: list[int]) -> list[int]:
    """As many groups as may go together, first come first served."""
    chosen: list[int] = []
    for group in groups:
        try:
            emptying.of([*chosen, group])
        except RefusedError:
            continue
        chosen.append(group)
    return chosen


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_emptying_is_masking(case: Fixture) -> None:
    model = prepared(case.build())
    coupling = labels.analyse(model)
    emptying = Emptying(model, coupling)
    groups = able(model, coupling)
    assert len(groups) == EMPTIABLE.get(case.name, 0)
    feeds = case.feeds(model)
    for chosen in [*([g] for g in groups), largest_set(emptying, groups)] if groups else []:
        gone = emptied(coupling, emptying, chosen)
        assert law_error(model, coupling, gone, feeds) <= 1e-5, chosen
        assert law_error(model, coupling, removal(coupling, 0.5, 0) | gone, feeds) <= 1e-5, chosen


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    steps=builders.STEP_LISTS,
    seed=st.integers(0, 2**31),
)
def test_emptying_is_masking_in_random_networks(steps: list[builders.Step], seed: int) -> None:
    model = prepared(builders.random_network(steps))
    coupling = labels.analyse(model)
    emptying = Emptying(model, coupling)
    rng = np.random.default_rng(seed)
    chosen = largest_set(emptying, list(rng.permutation(able(model, coupling))))
    if not chosen:
        return
    gone = removal(coupling, 0.3, seed) | emptied(coupling, emptying, chosen)
    feeds = {"x": rng.standard_normal((2, 3, 6, 6)).astype(np.float32)}
    assert law_error(model, coupling, gone, feeds) <= 1e-5
    expected = surgery.remaining_macs(model, coupling, gone)
    surgery.remove(model, coupling, gone)
    # What was dead weight for other reasons may go too.
    assert cost_of(model).macs <= expected


def residual(bias: float, blocks: int = 2) -> ir.Model:
    """Blocks ``relu(x + conv(relu(conv(x))))`` behind a Relu, their last biases being ``bias``."""
    b = ModelBuilder("residual")
    y = b.op("Relu", b.conv(b.input("x", ["batch", 3, 6, 6]), 3, 4))
    for _ in range(blocks):
        inner = b.op("Relu", b.conv(y, 4, 6))
        weight = b.weight(4, 6, 3, 3)
        branch = b.op("Conv", inner, weight, b.constant(np.full(4, bias, np.float32)), pads=[1] * 4)
        y = b.op("Relu", b.op("Add", branch, y))
    b.output(b.gemm(b.op("Flatten", b.op("GlobalAveragePool", y)), 4, 3))
    return prepared(b.build())


def removed(model: ir.Model) -> ir.Model:
    coupling = labels.analyse(model)
    chosen = able(model, coupling)
    assert chosen
    gone = emptied(coupling, Emptying(model, coupling), chosen)
    expected = surgery.remaining_macs(model, coupling, gone)
    small = model_io.clone(model)
    surgery.remove(small, coupling, gone)
    model_io.check(small)
    assert cost_of(small).macs == expected
    return small


def kinds(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph]


def test_branches_that_answer_zero_leave_nothing_behind() -> None:
    tail = ["GlobalAveragePool", "Flatten", "Gemm"]
    assert kinds(removed(residual(0.0))) == ["Conv", "Relu", *tail]
    assert kinds(removed(residual(0.5, blocks=1))) == ["Conv", "Relu", "Add", "Relu", *tail]
    small = removed(residual(0.0))
    read = {v.name for n in small.graph for v in n.inputs if v is not None}
    assert set(small.graph.initializers) <= read


def test_a_constant_goes_into_the_bias_before_it() -> None:
    """The normalization in front of the sum, or the linear layer, takes it up."""
    b = ModelBuilder("absorbed")
    x = b.input("x", ["batch", 5, 8])
    scale, shift = b.constant(np.ones(8, np.float32)), b.constant(np.ones(8, np.float32))
    y = b.op("LayerNormalization", x, scale, shift, axis=-1)
    y = b.op("Add", b.linear(b.op("Relu", b.linear(y, 8, 16)), 16, 8), y)
    b.output(b.op("Softmax", y))
    assert kinds(removed(prepared(b.build()))) == ["LayerNormalization", "Softmax"]

    b = ModelBuilder("absorbed_by_layer")
    y = b.gemm(b.input("x", ["batch", 5]), 5, 8)
    y = b.op("Add", b.gemm(b.op("Relu", b.gemm(y, 8, 16)), 16, 8), y)
    b.output(b.op("Softmax", y))
    assert kinds(removed(prepared(b.build()))) == ["Gemm", "Softmax"]


def reasons(model: ir.Model) -> dict[str, str | None]:
    coupling = labels.analyse(model)
    emptying = Emptying(model, coupling)
    return {g.name: emptying.reason(g.index) for g in coupling.groups}


def test_the_reason_says_what_is_in_the_way() -> None:
    lstm = reasons(prepared(fixture("lstm").build()))
    assert all(lstm.values())
    assert (
        "an output of the model would be constant"
        in reasons(prepared(fixture("conv_chain").build())).values()
    )


def test_an_output_keeps_depending_on_its_inputs() -> None:
    """The branch is the only way from the second input to the output."""
    b = ModelBuilder("two_inputs")
    left, right = b.input("left", ["batch", 4]), b.input("right", ["batch", 4])
    y = b.op("Add", b.gemm(b.op("Relu", b.gemm(right, 4, 8)), 8, 4), left)
    b.output(b.op("Softmax", y))
    model = prepared(b.build())
    (reason,) = reasons(model).values()
    assert reason == "an output of the model would no longer depend on an input"
    with pytest.raises(UsageError, match="no longer depend on an input"):
        surgery.remove(model, labels.analyse(model), {0: np.arange(8)})


def test_a_constant_that_would_have_to_be_stretched_is_refused() -> None:
    """Both summands have to be broadcast: what is left would be smaller than the sum was."""
    b = ModelBuilder("stretched")
    x = b.input("x", ["batch", 4, 6, 6])
    pooled = b.op("GlobalAveragePool", x)
    y = b.op("Add", b.conv(b.op("Relu", b.conv(x, 4, 8)), 8, 4), pooled)
    b.output(b.gemm(b.op("Flatten", y), 144, 3))
    (reason,) = [r for n, r in reasons(prepared(b.build())).items() if n == "conv_0"]
    assert reason == "Add 'add_0' would read a constant"


def test_weights_may_change_before_a_group_is_emptied() -> None:
    model = residual(0.5, blocks=1)
    coupling = labels.analyse(model)
    (chosen,) = able(model, coupling)
    node = next(n for n in model.graph if n.name == coupling.groups[chosen].sinks[0].node)
    bias = node.inputs[2]
    assert bias is not None
    assert bias.name is not None
    set_initializer(model.graph, bias.name, np.full(4, 2.0, np.float32))
    surgery.remove(model, coupling, {chosen: np.arange(6)})
    add = next(n for n in model.graph if n.op_type == "Add")
    stored = [a for v in add.inputs if (a := constant_of(v)) is not None]
    np.testing.assert_array_equal(stored[0], np.full((1, 4, 1, 1), 2.0, np.float32))
