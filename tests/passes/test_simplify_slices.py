"""Slices that take an input apart."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcompress import model_io
from onnxcompress.passes._slices import split_inputs
from onnxcompress.passes.simplify import SimplifyOptions, SimplifyPass
from tests.builder import ModelBuilder
from tests.running import context, run_model


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def taken(b: ModelBuilder, x: str, bounds: dict[int, tuple[int, int]]) -> str:
    """A Slice of some axes."""
    if b.opset < 10:
        lows, highs = zip(*bounds.values(), strict=True)
        return b.op("Slice", x, starts=list(lows), ends=list(highs), axes=list(bounds))
    columns = [[r[0] for r in bounds.values()], [r[1] for r in bounds.values()], list(bounds)]
    return b.op("Slice", x, *(b.constant(np.array(c, np.int64)) for c in columns))


def built(b: ModelBuilder) -> ir.Model:
    model = b.build()
    model_io.infer_shapes(model)
    return model


def assert_equal(model: ir.Model, before: ir.Model, shape: tuple[int, ...]) -> None:
    model_io.check(model)
    feeds = {"x": np.arange(np.prod(shape), dtype=np.float32).reshape(shape)}
    found = run_model(model, feeds)
    for name, array in run_model(before, feeds).items():
        np.testing.assert_array_equal(found[name], array)


@st.composite
def _grids(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[int, list[int]]]:
    """A shape, and where some of its axes are cut."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    cuts = {}
    for axis, length in enumerate(shape):
        inner = draw(st.sets(st.integers(1, length - 1))) if length > 1 else set()
        if inner:
            cuts[axis] = [0, *sorted(inner), length]
    return shape, cuts


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(grid=_grids(), opset=st.sampled_from([9, 11, 17]), ends=st.booleans())
def test_a_grid_of_slices_becomes_splits(
    grid: tuple[tuple[int, ...], dict[int, list[int]]], opset: int, ends: bool
) -> None:
    shape, cuts = grid
    b = ModelBuilder("grid", opset=opset)
    x = b.input("x", shape)
    tiles = [[(axis, r) for r in itertools.pairwise(points)] for axis, points in cuts.items()]
    count = 0
    for box in itertools.product(*tiles) if cuts else ():
        value = taken(b, x, dict(box))
        b.output(value if ends else b.op("Neg", value))
        count += 1
    b.output(b.op("Abs", x))
    model = built(b)
    before = model.clone()
    divided = split_inputs(model)
    assert_equal(model, before, shape)
    assert divided == (count > 1)
    if divided:
        fewest = [len(points) - 1 for points in cuts.values()]
        splits = sum(int(np.prod(sorted(fewest)[:k])) for k in range(len(fewest)))
        assert ops(model)["Split"] == splits
        assert ops(model)["Slice"] == 0


@pytest.mark.parametrize(
    ("shape", "boxes"),
    [
        ((4, 6), [{1: (0, 3)}, {1: (3, 5)}]),  # the end is missing
        ((4, 6), [{1: (0, 3)}, {1: (2, 6)}]),  # they overlap
        ((4, 6), [{1: (0, 3)}, {0: (0, 2)}]),  # of different axes
        ((4, 6), [{0: (0, 2), 1: (0, 3)}, {0: (0, 2), 1: (3, 6)}, {0: (2, 4), 1: (0, 3)}]),
        (("n", 6), [{0: (0, 1)}, {0: (1, 2)}]),  # as long as it is at run time
    ],
)
def test_what_is_no_grid_stays(
    shape: tuple[int, ...], boxes: list[dict[int, tuple[int, int]]]
) -> None:
    b = ModelBuilder("none")
    x = b.input("x", shape)
    for box in boxes:
        b.output(b.op("Neg", taken(b, x, box)))
    assert split_inputs(built(b)) == 0


def test_only_inputs_are_divided() -> None:
    b = ModelBuilder("inner")
    x = b.op("Neg", b.input("x", [4, 6]))
    for box in ({1: (0, 3)}, {1: (3, 6)}):
        b.output(b.op("Neg", taken(b, x, box)))
    assert split_inputs(built(b)) == 0


def test_states_of_layers_are_taken_out_by_splits(tmp_path: Path) -> None:
    b = ModelBuilder("states")
    x = b.input("x", [1, 2, 8, 2])
    for i, j in itertools.product(range(2), range(2)):
        part = taken(b, x, {1: (i, i + 1), 3: (j, j + 1 if j == 0 else 2**31)})
        b.output(b.op("Neg", b.op("Squeeze", part, b.constant(np.array([1, 3])))))
    model = b.build()
    model_io.normalize(model)
    before = model.clone()
    SimplifyPass(SimplifyOptions(onnxsim=False)).run(model, context(tmp_path))
    assert_equal(model, before, (1, 2, 8, 2))
    assert ops(model) == {"Split": 3, "Squeeze": 4, "Neg": 4}
