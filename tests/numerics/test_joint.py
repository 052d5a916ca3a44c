"""Layers on both sides of a hidden tensor, fitted together."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.numerics.clipping import Bounds
from onnxcompress.numerics.joint import Fitted, Floats, Layer, Layers, Rows, Task
from onnxcompress.numerics.joint import jointly as jointly_of_all

RELU, NONE, CLIP = Bounds(low=0.0), Bounds(), Bounds(-0.5, 1.0)


def jointly(
    fit: Rows, held: Rows, layers: Layers, hidden: Bounds, outer: Bounds, *, turns: int = 3
) -> Fitted:
    functions = [hidden] * len(layers.first)
    return jointly_of_all([Task([fit], [held], outer)], layers, functions, turns=turns)


def normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape, dtype=np.float32)


def made_layer(rng: np.random.Generator, outputs: int, width: int, bias: float) -> Layer:
    weight = normal(rng, outputs, width) / np.float32(np.sqrt(width))
    return Layer(weight, np.float32(bias) * normal(rng, outputs))


def layers(rng: np.random.Generator, width: int, hidden: int, taps: int, outputs: int) -> Layers:
    first = made_layer(rng, hidden, width, 0.25)
    return Layers((first,), (made_layer(rng, outputs, taps * hidden, 1.0),))


def answer(
    x: tuple[Floats, ...],
    inside: npt.NDArray[np.bool_],
    given: Layers,
    bounds: Bounds,
    reader: int = 0,
    pooled: int = 1,
) -> Floats:
    """``Σ_t W_t max_p f(V xₜₚ + v) + b`` as it is written."""
    layer, taps = given.second[reader], inside.shape[1] // pooled
    second = layer.weight.reshape(len(layer.weight), taps, -1)
    total = np.tile(layer.bias.astype(np.float64), (len(inside), 1))
    for t in range(taps):
        largest = np.full((len(inside), second.shape[2]), -np.inf)
        for p in range(t * pooled, (t + 1) * pooled):
            hidden = [
                bounds.value(own[:, p] @ first.weight.T + first.bias)
                for own, first in zip(x, given.first, strict=True)
            ]
            there = inside[:, p, np.newaxis]
            largest = np.maximum(largest, np.where(there, np.concatenate(hidden, axis=1), -np.inf))
        total = total + np.where(np.isfinite(largest), largest, 0) @ second[:, t].T
    return total.astype(np.float32)


def rows(rng: np.random.Generator, count: int, teacher: Layers, width: int, bounds: Bounds) -> Rows:
    taps = teacher.second[0].weight.shape[1] // sum(len(f.bias) for f in teacher.first)
    x, inside = (normal(rng, count, taps, width),), rng.random((count, taps)) < 0.9
    return Rows(x, inside, answer(x, inside, teacher, bounds), None)


def without_units(teacher: Layers, kept: int) -> Layers:
    """The teacher with the first hidden units of each layer alone."""
    size = len(teacher.first[0].bias)
    stay = np.concatenate([m * size + np.arange(kept) for m in range(len(teacher.first))])
    second = [
        Layer(
            np.ascontiguousarray(
                s.weight.reshape(len(s.bias), -1, size * len(teacher.first))[:, :, stay]
            ).reshape(len(s.bias), -1),
            s.bias,
        )
        for s in teacher.second
    ]
    first = [Layer(f.weight[:kept], f.bias[:kept]) for f in teacher.first]
    return Layers(tuple(first), tuple(second))


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
    (own,) = teacher.first
    start = dataclasses.replace(teacher, first=(Layer(own.weight + noise, own.bias),))
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
    every = (*found.layers.first, *found.layers.second)
    assert all(np.isfinite(a).all() for layer in every for a in (layer.weight, layer.bias))
    assert (found.layers is given) == (found.after == found.before)


def test_what_stands_at_taps_outside_does_not_count() -> None:
    rng = np.random.default_rng(2)
    teacher = layers(rng, 5, 6, 3, 3)
    fit, held = (rows(rng, n, teacher, 5, RELU) for n in (500, 200))
    start = without_units(teacher, 4)

    def filled(given: Rows, value: float) -> Rows:
        x = np.where(given.inside[:, :, np.newaxis], given.x[0], np.float32(value))
        return dataclasses.replace(given, x=(x.astype(np.float32),))

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
    for a, b in (
        (beside.layers.first, plain.layers.first),
        (beside.layers.second, plain.layers.second),
    ):
        np.testing.assert_allclose(a[0].weight, b[0].weight, atol=1e-3)


def test_dead_units_are_left_alone() -> None:
    rng = np.random.default_rng(5)
    teacher = layers(rng, 5, 6, 2, 3)
    fit, held = (rows(rng, n, teacher, 5, RELU) for n in (300, 100))
    dead = dataclasses.replace(
        teacher, first=(Layer(teacher.first[0].weight, np.full(6, -1e3, np.float32)),)
    )
    found = jointly(fit, held, dead, RELU, NONE)
    assert np.isfinite(found.after)
    np.testing.assert_array_equal(found.layers.first[0].weight, dead.first[0].weight)


def test_parts_and_threads_change_nothing() -> None:
    rng = np.random.default_rng(8)
    teacher = layers(rng, 5, 6, 3, 3)
    fit, held = (rows(rng, n, teacher, 5, RELU) for n in (600, 200))

    def parts(given: Rows, count: int) -> list[Rows]:
        split = (np.split(a, count) for a in (given.x[0], given.inside, given.target))
        return [Rows((x,), inside, y, None) for x, inside, y in zip(*split, strict=True)]

    start = without_units(teacher, 4)
    whole = jointly(fit, held, start, RELU, NONE)
    with ThreadPoolExecutor(3) as pool:
        task = Task(parts(fit, 6), parts(held, 4), NONE)
        found = jointly_of_all([task], start, [RELU], each=pool.map)
    # Whitening looks at other rows, so the steps are not quite the same.
    assert found.after == pytest.approx(whole.after, rel=0.1)
    again = jointly_of_all([task], start, [RELU])
    np.testing.assert_array_equal(found.layers.first[0].weight, again.layers.first[0].weight)


def test_what_is_right_already_stays() -> None:
    rng = np.random.default_rng(9)
    teacher = layers(rng, 5, 6, 2, 3)
    fit, held = (rows(rng, n, teacher, 5, RELU) for n in (300, 100))
    found = jointly(fit, held, teacher, RELU, NONE)
    assert found.layers is teacher
    assert found.after == found.before < 1e-6


@pytest.mark.parametrize("pooled", [1, 3])
def test_several_layers_on_both_sides_learn_what_others_did(pooled: int) -> None:
    """Two layers make the hidden tensor from inputs of different width, two read it."""
    rng = np.random.default_rng(10)
    first = (made_layer(rng, 6, 5, 0.25), made_layer(rng, 6, 4, 0.25))
    teacher = Layers(first, (made_layer(rng, 3, 12, 1.0), made_layer(rng, 2, 24, 1.0)))

    def seen(count: int, reader: int) -> Rows:
        places = (1, 2)[reader] * pooled
        x = (normal(rng, count, places, 5), normal(rng, count, places, 4))
        inside = rng.random((count, places)) < 0.9
        return Rows(x, inside, answer(x, inside, teacher, RELU, reader, pooled), None)

    tasks = [Task([seen(3000, r)], [seen(1000, r)], NONE, pooled=pooled) for r in (0, 1)]
    assert jointly_of_all(tasks, teacher, [RELU, RELU]).before < 1e-6
    found = jointly_of_all(tasks, without_units(teacher, 4), [RELU, RELU], turns=20)
    assert found.after < 0.7 * found.before


def test_all_targets_count_alike_whatever_their_scale() -> None:
    rng = np.random.default_rng(11)
    first = (made_layer(rng, 6, 5, 0.25),)
    teacher = Layers(first, (made_layer(rng, 3, 6, 1.0), made_layer(rng, 3, 6, 1.0)))

    def tasks(scale: float) -> tuple[list[Task], Layers]:
        scaled = Layer(
            teacher.second[1].weight * np.float32(scale), teacher.second[1].bias * np.float32(scale)
        )
        given = Layers(first, (teacher.second[0], scaled))
        rng = np.random.default_rng(12)
        x = [(normal(rng, n, 1, 5),) for n in (1000, 300)]
        inside = [np.ones((len(own[0]), 1), np.bool_) for own in x]
        parts = [
            [Rows(o, i, answer(o, i, given, RELU, r), None) for o, i in zip(x, inside, strict=True)]
            for r in (0, 1)
        ]
        return [Task([fit], [held], NONE) for fit, held in parts], without_units(given, 4)

    plain, scaled = (jointly_of_all(*tasks(scale), [RELU]) for scale in (1.0, 100.0))
    assert scaled.after == pytest.approx(plain.after, rel=0.02)
