"""Removing units means masking them; costs are known beforehand; names and interface stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcompress import model_io
from onnxcompress.errors import ModelError, UsageError
from onnxcompress.graph import labels, surgery
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.graph.cost import cost_of
from onnxcompress.interface import input_specs, output_specs
from tests.builder import ModelBuilder
from tests.fixtures import RUNNABLE, Fixture, fixture
from tests.graph import builders
from tests.graph.law import law_error, outputs, prepared, removal

EVERY = (*RUNNABLE, *builders.FIXTURES)
TOLERANCE = {"half_precision": 2e-3}


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_removing_is_masking(case: Fixture) -> None:
    model = prepared(case.build())
    coupling = labels.analyse(model)
    feeds = case.feeds(model)
    for seed, fraction in enumerate((0.2, 0.5, 1.0)):
        removed = removal(coupling, fraction, seed)
        error = law_error(model, coupling, removed, feeds)
        assert error <= TOLERANCE.get(case.name, 1e-5), (fraction, removed)


@pytest.mark.parametrize("case", builders.FIXTURES, ids=str)
def test_removing_head_dimensions_is_masking(case: Fixture) -> None:
    model = prepared(case.build())
    coupling = labels.analyse(model, reshape_policy="head_dims")
    removed = removal(coupling, 0.5, 3)
    assert law_error(model, coupling, removed, case.feeds(model)) <= 1e-5


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    steps=builders.STEP_LISTS,
    fraction=st.sampled_from((0.2, 0.5, 1.0)),
    seed=st.integers(0, 2**31),
)
def test_removing_is_masking_in_random_networks(
    steps: list[builders.Step], fraction: float, seed: int
) -> None:
    model = prepared(builders.random_network(steps))
    coupling = labels.analyse(model)
    rng = np.random.default_rng(seed)
    feeds = {"x": rng.standard_normal((2, 3, 6, 6)).astype(np.float32)}
    removed = removal(coupling, fraction, seed)
    assert law_error(model, coupling, removed, feeds) <= 1e-5
    small = model_io.clone(model)
    expected = surgery.remaining_macs(model, coupling, removed)
    surgery.remove(small, coupling, removed)
    assert cost_of(small).macs == expected


def test_masking_is_not_the_identity() -> None:
    """Were the mask empty, the law would hold for a removal that does nothing."""
    for case in builders.FIXTURES:
        model = prepared(case.build())
        coupling = labels.analyse(model)
        feeds = case.feeds(model)
        masked = surgery.mask(model, coupling, removal(coupling, 0.5, 0))
        plain, other = outputs(model, feeds), outputs(masked, feeds)
        assert any(not np.allclose(plain[n], other[n], rtol=1e-3) for n in plain), case.name


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_costs_are_known_before_removing(case: Fixture) -> None:
    model = prepared(case.build())
    coupling = labels.analyse(model)
    macs = surgery.MacsModel(model, coupling)
    assert macs.total == cost_of(model).macs
    assert 0 <= macs.covered() <= macs.total
    removed = removal(coupling, 0.5, 0)
    small = model_io.clone(model)
    surgery.remove(small, coupling, removed)
    assert macs.remaining(removed) == cost_of(small).macs


def test_blocks_of_channels_are_paid_for_as_a_whole() -> None:
    b = ModelBuilder("blocks")
    y = b.op("Relu", b.conv(b.input("x", ["batch", 3, 8, 8]), 3, 32))
    b.output(b.conv(y, 32, 5))
    model = prepared(b.build())
    coupling = labels.analyse(model)
    macs = surgery.MacsModel(model, coupling)

    def cost(made: int, read: int) -> int:
        """Each output costs its own multiply-accumulates and those of 32 for moving it."""
        return 64 * (made * (27 + 32) + 5 * (9 * read + 32 if read else 0))

    (group,) = coupling.groups
    for gone, made, read in ((0, 32, 32), (1, 32, 32), (15, 32, 32), (16, 16, 16), (30, 16, 2)):
        removed = {group.index: np.arange(gone)}
        assert macs.padded(removed, 16) == cost(made, read)
    assert macs.padded({group.index: np.arange(32)}, 16) == 0


def test_removing_nothing_changes_nothing() -> None:
    model = prepared(fixture("residual_bn").build())
    coupling = labels.analyse(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    surgery.remove(model, coupling, {0: np.zeros(0, np.int64)})
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("name", ["unet", "squeeze_excite", "lstm", "mini_transformer"])
def test_names_and_interface_stay(name: str) -> None:
    case = fixture(name)
    model = prepared(case.build())
    specs = input_specs(model), output_specs(model)
    nodes = [n.name for n in model.graph.all_nodes()]
    values = {o.name for n in model.graph.all_nodes() for o in n.outputs}
    coupling = labels.analyse(model)
    surgery.remove(model, coupling, removal(coupling, 0.5, 0))
    assert (input_specs(model), output_specs(model)) == specs
    assert [n.name for n in model.graph.all_nodes()] == nodes
    assert {o.name for n in model.graph.all_nodes() for o in n.outputs} == values


def test_weights_may_change_between_analysis_and_removal() -> None:
    model = prepared(fixture("mlp_gemm").build())
    coupling = labels.analyse(model)
    cut = coupling.groups[0].cuts[0]
    old = constant_of(model.graph.initializers[cut.initializer])
    assert old is not None
    set_initializer(model.graph, cut.initializer, np.asarray(old * 2))
    surgery.remove(model, coupling, {0: np.array([3, 5])})
    new = constant_of(model.graph.initializers[cut.initializer])
    assert new is not None
    kept = np.delete(np.arange(coupling.groups[0].size), [3, 5])
    np.testing.assert_array_equal(new, np.take(old * 2, cut.indices[kept, 0], axis=cut.axis))


def test_shapes_that_inference_does_not_find_stay_right() -> None:
    model = prepared(builders.group_normalization())
    coupling = labels.analyse(model)
    (value,) = next(n for n in model.graph if n.op_type == "GroupNormalization").outputs
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", 12, 8, 8])
    surgery.remove(model, coupling, {0: np.array([1])})
    assert value.shape == ir.Shape(["batch", 9, 8, 8])
    assert value.dtype == ir.DataType.FLOAT


def test_the_last_unit_stays() -> None:
    model = prepared(fixture("conv_chain").build())
    coupling = labels.analyse(model)
    with pytest.raises(UsageError, match="would lose all of its 8 units"):
        surgery.remove(model, coupling, {0: np.arange(8)})


def test_another_model_is_refused() -> None:
    model = prepared(fixture("conv_chain").build())
    coupling = labels.analyse(model)
    surgery.remove(model, coupling, {0: np.array([1])})
    with pytest.raises(ModelError, match="when it was analysed"):
        surgery.remove(model, coupling, {0: np.array([2])})


def test_infinities_of_removed_channels_do_not_leak() -> None:
    """log of a channel that is always zero is -inf; a product with zero would be NaN."""
    b = ModelBuilder("infinite")
    x = b.input("x", ["batch", 4])
    y = b.op("Relu", b.linear(x, 4, 6))
    b.output(b.op("MatMul", b.op("Log", b.op("Mul", y, b.constant(0.0))), b.weight(6, 2)))
    model = prepared(b.build())
    coupling = labels.analyse(model)
    removed = {0: np.arange(1, 6)}
    feeds = {"x": np.ones((2, 4), np.float32)}
    assert law_error(model, coupling, removed, feeds) == 0
