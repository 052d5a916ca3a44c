"""Two layers with a clipping activation between them, fitted together."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.numerics.clipping import Bounds
from onnxcompress.numerics.joint import Fitted, Floats, Layers, Rows
from onnxcompress.numerics.joint import jointly as jointly_in_parts

RELU, NONE, CLIP = Bounds(low=0.0), Bounds(), Bounds(-0.5, 1.0)


def jointly(
    fit: Rows, held: Rows, layers: Layers, hidden: Bounds, outer: Bounds, *, turns: int = 3
) -> Fitted:
    return jointly_in_parts([fit], [held], layers, hidden, outer, turns=turns)


def normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape, dtype=np.float32)


def layers(rng: np.random.Generator, width: int, hidden: int, taps: int, outputs: int) -> Layers:
    return Layers(
        normal(rng, hidden, width) / np.float32(np.sqrt(width)),
        normal(rng, hidden) / np.float32(4),
        normal(rng, outputs, taps * hidden) / np.float32(np.sqrt(taps * hidden)),
        normal(rng, outputs),
    )


def answer(x: Floats, inside: npt.NDArray[np.bool_], given: Layers, bounds: Bounds) -> Floats:
    """``Σ_t W₂ₜ f(W₁ xₜ + b₁) + b₂`` as it is written."""
    taps = x.shape[1]
    second = given.second.reshape(len(given.second), taps, -1)
    total = np.tile(given.second_bias, (len(x), 1))
    for t in range(taps):
        hidden = bounds.value(x[:, t] @ given.first.T + given.first_bias)
        total += (hidden * inside[:, t, np.newaxis]) @ second[:, t].T
    return total.astype(np.float32)


def rows(rng: np.random.Generator, count: int, teacher: Layers, width: int, bounds: Bounds) -> Rows:
    taps = teacher.second.shape[1] // len(teacher.first)
    x, inside = normal(rng, count, taps, width), rng.random((count, taps)) < 0.9
    return Rows(x, inside, answer(x, inside, teacher, bounds), None)


def without_units(teacher: Layers, kept: int) -> Layers:
    """The teacher with the first hidden units alone."""
    taps = teacher.second.shape[1] // len(teacher.first)
    second = teacher.second.reshape(len(teacher.second), taps, -1)[:, :, :kept]
    return dataclasses.replace(
        teacher,
        first=teacher.first[:kept],
        first_bias=teacher.first_bias[:kept],
        second=np.ascontiguousarray(second).reshape(len(second), -1),
    )


@pytest.mark.parametrize("bounds", [RELU, NONE, CLIP], ids=["relu", "none", "clip"])
@pytest.mark.parametrize("taps", [1, 4])
def test_units_that_stay_learn_what_others_did(bounds: Bounds, taps: int) -> None:
    rng = np.random.default_rng(0)
    teacher = layers(rng, 5, 6, taps, 3)
    fit, held = (rows(rng, n, teacher, 5, bounds) for n in (3000, 1000))
    found = jointly(fit, held, without_units(teacher, 4), bounds, NONE, turns=20)
    assert found.after < 0.6 * found.before


def test_layers_that_were_disturbed_find_back() -> None:
    rng = np.random.default_rng(1)
    teacher = layers(rng, 5, 6, 3, 8)
    fit, held = (rows(rng, n, teacher, 5, RELU) for n in (3000, 1000))
    noise = (0.1 * normal(rng, 6, 5)).astype(np.float32)
    start = dataclasses.replace(teacher, first=teacher.first + noise)
    found = jointly(fit, held, start, RELU, NONE, turns=60)
    assert found.after < 0.05 * found.before


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([RELU, NONE, CLIP]), st.integers(8, 200))
def test_rows_held_out_are_never_served_worse(seed: int, bounds: Bounds, count: int) -> None:
    """However few rows there are, and if targets are noise."""
    rng = np.random.default_rng(seed)
    given = layers(rng, 4, 5, 2, 3)
    fit, held = (rows(rng, n, layers(rng, 4, 5, 2, 3), 4, RELU) for n in (count, 40))
    outer = RELU if seed % 2 else NONE
    found = jointly(fit, held, given, bounds, outer)
    assert found.after <= found.before
    assert all(np.isfinite(a).all() for a in dataclasses.astuple(found.layers))
    assert (found.layers is given) == (found.after == found.before)


def test_what_stands_at_taps_outside_does_not_count() -> None:
    rng = np.random.default_rng(2)
    teacher = layers(rng, 5, 6, 3, 3)
    fit, held = (rows(rng, n, teacher, 5, RELU) for n in (500, 200))
    start = without_units(teacher, 4)

    def filled(given: Rows, value: float) -> Rows:
        x = np.where(given.inside[:, :, np.newaxis], given.x, np.float32(value))
        return dataclasses.replace(given, x=x.astype(np.float32))

    a, b = (jointly(filled(fit, v), filled(held, v), start, RELU, NONE) for v in (0.0, 1.0))
    assert a.before == pytest.approx(b.before)
    # The curvature of inputs sees them; what is missing does not.
    assert a.after == pytest.approx(b.after, rel=0.1)


def test_a_shortcut_is_part_of_the_target() -> None:
    rng = np.random.default_rng(3)
    teacher = layers(rng, 5, 6, 2, 3)
    fit, held = (rows(rng, n, teacher, 5, RELU) for n in (500, 200))
    start = without_units(teacher, 4)

    def added(given: Rows) -> Rows:
        shortcut = normal(np.random.default_rng(4), *given.target.shape)
        return dataclasses.replace(given, target=given.target + shortcut, shortcut=shortcut)

    plain = jointly(fit, held, start, RELU, NONE)
    beside = jointly(added(fit), added(held), start, RELU, NONE)
    np.testing.assert_allclose(beside.layers.first, plain.layers.first, atol=1e-3)
    np.testing.assert_allclose(beside.layers.second, plain.layers.second, atol=1e-3)


def test_dead_units_are_left_alone() -> None:
    rng = np.random.default_rng(5)
    teacher = layers(rng, 5, 6, 2, 3)
    fit, held = (rows(rng, n, teacher, 5, RELU) for n in (300, 100))
    dead = dataclasses.replace(teacher, first_bias=np.full(6, -1e3, np.float32))
    found = jointly(fit, held, dead, RELU, NONE)
    assert np.isfinite(found.after)
    np.testing.assert_array_equal(found.layers.first, dead.first)


def test_parts_and_threads_change_nothing() -> None:
    rng = np.random.default_rng(8)
    teacher = layers(rng, 5, 6, 3, 3)
    fit, held = (rows(rng, n, teacher, 5, RELU) for n in (600, 200))

    def parts(given: Rows, count: int) -> list[Rows]:
        split = (np.split(a, count) for a in (given.x, given.inside, given.target))
        return [Rows(x, inside, y, None) for x, inside, y in zip(*split, strict=True)]

    start = without_units(teacher, 4)
    whole = jointly(fit, held, start, RELU, NONE)
    with ThreadPoolExecutor(3) as pool:
        found = jointly_in_parts(parts(fit, 6), parts(held, 4), start, RELU, NONE, each=pool.map)
    # Whitening looks at other rows, so the steps are not quite the same.
    assert found.after == pytest.approx(whole.after, rel=0.1)
    again = jointly_in_parts(parts(fit, 6), parts(held, 4), start, RELU, NONE)
    np.testing.assert_array_equal(found.layers.first, again.layers.first)


def test_what_is_right_already_stays() -> None:
    rng = np.random.default_rng(9)
    teacher = layers(rng, 5, 6, 2, 3)
    fit, held = (rows(rng, n, teacher, 5, RELU) for n in (300, 100))
    found = jointly(fit, held, teacher, RELU, NONE)
    assert found.layers is teacher
    assert found.after == found.before < 1e-6
