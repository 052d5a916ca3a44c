"""States of the interface: cells go inside, shapes stay outside, and what is data stays data."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from onnxcompress import model_io
from onnxcompress.graph import labels, surgery
from onnxcompress.interface import input_specs, output_specs
from tests.builder import Array, ModelBuilder
from tests.fixtures import Fixture, fixture
from tests.graph.law import error, law_error, outputs, prepared, removal, sizes


def two_lstms() -> ir.Model:
    """Two LSTM layers whose h and c share one tensor, stacked as Keras does."""
    b = ModelBuilder("two_lstms")
    y = b.input("x", [1, 1, 5])
    state = b.input("state", [1, 2, 8, 2])
    halves: list[list[str]] = [[], []]
    for layer, width in enumerate((5, 8)):
        initial = []
        for kind in range(2):
            bounds = [0, layer, 0, kind], [1, layer + 1, 8, kind + 1], [0, 1, 2, 3]
            part = b.op("Slice", state, *(b.constant(v) for v in bounds))
            initial.append(b.op("Squeeze", part, b.constant([3])))
        y, h, c = b.ops(
            "LSTM", y, b.weight(1, 32, width), b.weight(1, 32, 8), b.weight(1, 64), "", *initial,
            outputs=3, hidden_size=8,
        )  # fmt: skip
        y = b.op("Squeeze", y, b.constant([1]))
        for half, last in zip(halves, (h, c), strict=True):
            half.append(b.op("Unsqueeze", last, b.constant([3])))
    b.output(b.op("Sigmoid", b.linear(y, 8, 5)))
    stacked = [b.op("Concat", *half, axis=1) for half in halves]
    b.output(b.op("Concat", *stacked, axis=3), [1, 2, 8, 2])
    return b.build()


def single_operators() -> ir.Model:
    """An LSTM cell of MatMul, Split, Sigmoid and Tanh; no path ties the old h to the new one."""
    b = ModelBuilder("single_operators")
    x = b.input("x", ["batch", 5])
    h, c = b.input("h", ["batch", 8]), b.input("c", ["batch", 8])
    gates = b.op("Add", b.linear(x, 5, 32), b.op("MatMul", h, b.weight(8, 32)))
    i, f, g, o = b.ops("Split", gates, b.constant([8] * 4), outputs=4, axis=1)
    kept = b.op("Mul", b.op("Sigmoid", f), c)
    new = b.op("Add", kept, b.op("Mul", b.op("Sigmoid", i), b.op("Tanh", g)))
    out = b.op("Mul", b.op("Sigmoid", o), b.op("Tanh", new))
    b.output(b.linear(out, 8, 5))
    b.output(out, ["batch", 8])
    b.output(new, ["batch", 8])
    return b.build()


def convolution_cache() -> ir.Model:
    """A causal convolution that remembers the last two frames of its input."""
    b = ModelBuilder("convolution_cache")
    x, cache = b.input("x", ["batch", 4, 3]), b.input("cache", ["batch", 6, 2])
    wide = b.op("Concat", cache, b.op("Relu", b.conv(x, 4, 6, 1, rank=1)), axis=2)
    b.output(b.conv(wide, 6, 4, 3, pad=0, rank=1))
    b.output(b.op("Slice", wide, b.constant([3]), b.constant([5]), b.constant([2])))
    return b.build()


def key_value_cache() -> ir.Model:
    """One attention layer of a decoder that appends to the keys and values it was given."""
    b = ModelBuilder("key_value_cache")
    x = b.input("x", ["batch", "new", 8])
    past = [b.input(n, ["batch", 4, "past", 3]) for n in ("past_k", "past_v")]
    split = b.constant([0, -1, 4, 3])
    query, *fresh = (
        b.op("Transpose", b.op("Reshape", b.linear(x, 8, 12), split), perm=[0, 2, 1, 3])
        for _ in range(3)
    )
    key, value = (b.op("Concat", *pair, axis=2) for pair in zip(past, fresh, strict=True))
    scores = b.op("MatMul", query, b.op("Transpose", key, perm=[0, 1, 3, 2]))
    heads = b.op("MatMul", b.op("Softmax", scores, axis=-1), value)
    joined = b.op("Transpose", heads, perm=[0, 2, 1, 3])
    b.output(b.linear(b.op("Reshape", joined, b.constant([0, 0, 12])), 12, 8))
    b.output(key, ["batch", 4, "all", 3])
    b.output(value, ["batch", 4, "all", 3])
    return b.build()


def two_rates() -> ir.Model:
    """Each branch of an If has its own weights for the cells of the same state."""
    b = ModelBuilder("two_rates")
    x, state = b.input("x", [1, 2, 5]), b.input("state", [2, 2, 8])
    flag = b.input("fast", [], np.bool_)
    branches = {}
    for name in ("then_branch", "else_branch"):
        inner = ModelBuilder(f"two_rates_{name}")
        inner.share_names(b)
        h, c = inner.ops("Split", state, inner.constant([1, 1]), outputs=2, axis=0)
        y, last_h, last_c = inner.ops(
            "LSTM", x, inner.weight(1, 32, 5), inner.weight(1, 32, 8), inner.weight(1, 64), "",
            h, c, outputs=3, hidden_size=8,
        )  # fmt: skip
        results = (
            inner.op("Squeeze", y, inner.constant([1])),
            inner.op("Concat", last_h, last_c, axis=0),
        )
        branches[name] = helper.make_graph(
            inner.nodes, name, [], [onnx.ValueInfoProto(name=r) for r in results],
            inner.initializers,
        )  # fmt: skip
    y, new = b.ops("If", flag, outputs=2, **branches)
    b.output(b.linear(y, 8, 5))
    b.output(new, [2, 2, 8])
    return b.build()


CASES: tuple[tuple[Fixture, dict[str, int]], ...] = (
    (Fixture("two_lstms", two_lstms), {"lstm_0": 8, "lstm_1": 8}),
    (Fixture("single_operators", single_operators), {"matmul_0": 8}),
    (Fixture("convolution_cache", convolution_cache), {"conv_0": 6}),
    (
        Fixture("key_value_cache", key_value_cache, axes={"past": 3}),
        {"matmul_0": 4},
    ),
    (Fixture("two_rates", two_rates), {"lstm_0": 8}),
    (fixture("stateful_gru"), {"gru_0": 8}),
)
IDS = [case.name for case, _ in CASES]


@pytest.mark.parametrize(("case", "units"), CASES, ids=IDS)
def test_number_of_units_is_pinned(case: Fixture, units: dict[str, int]) -> None:
    assert sizes(case.build()) == units
    assert sizes(case.build(), states=False).keys() <= units.keys()


@pytest.mark.parametrize(("case", "units"), CASES, ids=IDS)
def test_removing_is_masking_call_after_call(case: Fixture, units: dict[str, int]) -> None:
    """The states that the pruned and the masked model hand on are those that they take up."""
    model = prepared(case.build())
    specs = input_specs(model), output_specs(model)
    coupling = labels.analyse(model)
    for seed, fraction in enumerate((0.2, 0.5, 1.0)):
        removed = removal(coupling, fraction, seed)
        masked = surgery.mask(model, coupling, removed)
        small = model_io.clone(model)
        surgery.remove(small, coupling, removed)
        assert (input_specs(small), output_specs(small)) == specs
        model_io.check(small)
        feeds = case.feeds(model, seed=seed)
        reads = list(dict.fromkeys(p.state for p in coupling.ports if not p.writes))
        writes = list(dict.fromkeys(p.state for p in coupling.ports if p.writes))
        assert len(reads) == len(writes) > 0
        one, two = dict(feeds), dict(feeds)
        for _ in range(3):
            a, b = outputs(masked, one), outputs(small, two)
            assert error(a, b) <= 1e-5
            one = _next(feeds, a, reads, writes)
            two = _next(feeds, b, reads, writes)


def _next(
    feeds: Mapping[str, Array], got: Mapping[str, Array], reads: list[str], writes: list[str]
) -> dict[str, Array]:
    pairs = {r: got[w] for r, w in zip(reads, writes, strict=True)}
    return {**feeds, **pairs}


@pytest.mark.parametrize(("case", "units"), CASES, ids=IDS)
def test_states_stay_by_option(case: Fixture, units: dict[str, int]) -> None:
    model = prepared(case.build())
    coupling = labels.analyse(model, states=False)
    assert not coupling.ports
    removed = removal(coupling, 0.5, 0)
    assert law_error(model, coupling, removed, case.feeds(model)) <= 1e-5


def test_masking_a_state_shows_in_what_is_written() -> None:
    case = CASES[0][0]
    model = prepared(case.build())
    coupling = labels.analyse(model)
    feeds = case.feeds(model)
    masked = outputs(surgery.mask(model, coupling, {1: np.array([2, 5])}), feeds)
    state = masked[model.graph.outputs[1].name or ""]
    np.testing.assert_array_equal(state[:, 1, [2, 5]], 0)
    assert np.all(state[:, 0] != 0)
    assert np.all(state[:, 1, [0, 1, 3, 4, 6, 7]] != 0)


def test_data_that_comes_back_changed_is_no_state() -> None:
    """A denoiser multiplies its first input by a mask; only its second input is a state."""
    b = ModelBuilder("denoiser")
    x, state = b.input("x", [1, 1, 8]), b.input("state", [1, 1, 8])
    y, last = b.ops(
        "GRU", x, b.weight(1, 24, 8), b.weight(1, 24, 8), b.weight(1, 48), "", state,
        outputs=2, hidden_size=8,
    )  # fmt: skip
    mask = b.op("Sigmoid", b.linear(b.op("Squeeze", y, b.constant([1])), 8, 8))
    b.output(b.op("Mul", x, mask))
    b.output(last)
    coupling = labels.analyse(prepared(b.build()))
    assert [g.size for g in coupling.groups] == [8]
    assert {p.state for p in coupling.ports} == {"state", last}


def test_an_image_to_image_network_has_no_state() -> None:
    b = ModelBuilder("residual_image")
    x = b.input("x", [1, 8, 4, 4])
    b.output(b.op("Add", x, b.conv(b.op("Relu", b.conv(x, 8, 5)), 5, 8)))
    coupling = labels.analyse(prepared(b.build()))
    assert not coupling.ports
    assert [g.size for g in coupling.groups] == [5]


def test_two_images_are_no_states() -> None:
    """All inputs come back: then nothing says which are states."""
    b = ModelBuilder("two_images")
    both = [b.input(name, [1, 8, 4, 4]) for name in ("left", "right")]
    for x in both:
        b.output(b.op("Add", x, b.conv(b.op("Relu", b.conv(x, 8, 5)), 5, 8)))
    assert not labels.analyse(prepared(b.build())).ports
