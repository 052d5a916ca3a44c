"""Layers on both sides of a hidden tensor, fitted together."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress.numerics import joint
from onnxcompress.numerics.clipping import Bounds
from onnxcompress.numerics.hidden import Floats, Layer, Layers, Rows
from onnxcompress.numerics.joint import Fitted, Task
from onnxcompress.numerics.joint import jointly as jointly_of_all
from onnxcompress.numerics.places import Places

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
    read: npt.NDArray[np.int64],
    given: Layers,
    bounds: Bounds,
    reader: int = 0,
) -> Floats:
    """``Σ_t W_t max_p f(V xₜₚ + v) + b`` as it is written."""
    layer, (count, taps, pooled) = given.second[reader], read.shape
    second = layer.weight.reshape(len(layer.weight), taps, -1)
    total = np.tile(layer.bias.astype(np.float64), (count, 1))
    hidden = np.concatenate(
        [bounds.value(o @ f.weight.T + f.bias) for o, f in zip(x, given.first, strict=True)], axis=1
    )
    for t in range(taps):
        largest = np.full((count, second.shape[2]), -np.inf)
        for p in range(pooled):
            there = read[:, t, p, np.newaxis] < len(hidden)
            seen = hidden[np.minimum(read[:, t, p], len(hidden) - 1)]
            largest = np.maximum(largest, np.where(there, seen, -np.inf))
        total = total + np.where(np.isfinite(largest), largest, 0) @ second[:, t].T
    return total.astype(np.float32)


def places(rng: np.random.Generator, rows: int, taps: int, pooled: int = 1) -> Places:
    """Places of a tensor that several rows read, and some that are padding."""
    count = max(rows * taps * pooled // 2, 1)
    read = rng.integers(0, count, (rows, taps, pooled))
    read[rng.random(read.shape) < 0.1] = count
    return Places.of(read, count)


def rows(rng: np.random.Generator, count: int, teacher: Layers, width: int, bounds: Bounds) -> Rows:
    taps = teacher.second[0].weight.shape[1] // sum(len(f.bias) for f in teacher.first)
    where = places(rng, count, taps)
    x = (normal(rng, where.count, width),)
    return Rows(x, where, answer(x, where.read, teacher, bounds), None)


def some_rows(given: Rows, part: slice) -> Rows:
    """Some rows, each of which reads places of its own."""
    read = given.places.read[part]
    inside = read < given.places.count
    own = np.where(inside, np.cumsum(inside).reshape(read.shape) - 1, inside.sum())
    x = given.x[0][read[inside]]
    shortcut = None if given.shortcut is None else given.shortcut[part]
    return Rows((x,), Places.of(own, len(x)), given.target[part], shortcut)


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


def test_places_may_be_named_in_any_order_and_twice() -> None:
    rng = np.random.default_rng(2)
    teacher = layers(rng, 5, 6, 3, 3)
    fit, held = (rows(rng, n, teacher, 5, RELU) for n in (500, 200))
    start = without_units(teacher, 4)

    a = jointly(fit, held, start, RELU, NONE)
    alone_fit, alone_held = (some_rows(given, slice(None)) for given in (fit, held))
    b = jointly(alone_fit, alone_held, start, RELU, NONE)
    assert a.before == pytest.approx(b.before)
    # Whitening looks at other places, so the steps are not quite the same.
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


def test_parts_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint, "_ROWS_PER_INPUT", 10**6)  # whitening sees all places
    rng = np.random.default_rng(8)
    teacher = layers(rng, 5, 6, 3, 3)
    fit, held = (rows(rng, n, teacher, 5, RELU) for n in (600, 200))

    def parts(given: Rows, count: int) -> list[Rows]:
        size = len(given.target) // count
        return [some_rows(given, slice(i * size, (i + 1) * size)) for i in range(count)]

    start = without_units(teacher, 4)
    fit, held = (some_rows(given, slice(None)) for given in (fit, held))
    whole = jointly(fit, held, start, RELU, NONE, turns=6)
    with ThreadPoolExecutor(3) as pool:
        task = Task(parts(fit, 6), parts(held, 4), NONE)
        found = jointly_of_all([task], start, [RELU], turns=6, each=pool.map)
    assert found.after == pytest.approx(whole.after, rel=1e-3)
    again = jointly_of_all([task], start, [RELU], turns=6)
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
        where = places(rng, count, 1 + reader, pooled)
        x = (normal(rng, where.count, 5), normal(rng, where.count, 4))
        return Rows(x, where, answer(x, where.read, teacher, RELU, reader), None)

    tasks = [Task([seen(3000, r)], [seen(1000, r)], NONE) for r in (0, 1)]
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
        where = [places(rng, n, 1) for n in (1000, 300)]
        x = [(normal(rng, w.count, 5),) for w in where]
        parts = [
            [
                Rows(o, w, answer(o, w.read, given, RELU, r), None)
                for o, w in zip(x, where, strict=True)
            ]
            for r in (0, 1)
        ]
        return [Task([fit], [held], NONE) for fit, held in parts], without_units(given, 4)

    plain, scaled = (jointly_of_all(*tasks(scale), [RELU]) for scale in (1.0, 100.0))
    assert scaled.after == pytest.approx(plain.after, rel=0.02)
