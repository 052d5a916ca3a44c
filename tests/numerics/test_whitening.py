from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcompress.numerics.adam import Adam
from onnxcompress.numerics.whitening import Whitened


def _moment(rng: np.random.Generator, groups: int, width: int) -> npt.NDArray[np.float64]:
    """Second moments of inputs whose directions differ by orders of magnitude."""
    mixed = rng.standard_normal((groups, width, width)) * np.logspace(0, -3, width)
    return mixed @ mixed.transpose(0, 2, 1)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 7), st.integers(0, 1000))
def test_a_step_along_the_gradient_of_the_coordinates_is_one_of_the_weights(
    groups: int, rows: int, width: int, seed: int
) -> None:
    """``⟨∂L/∂V, S⟩ = ⟨∂L/∂W, move(S)⟩`` for every step ``S``."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((groups * rows, width))
    found = Whitened.of(weight, _moment(rng, groups, width))
    assert found is not None
    slope = rng.standard_normal(weight.shape).astype(np.float32)
    step = rng.standard_normal((groups, rows, width)).astype(np.float32)
    ours = np.vdot(found.gradient(slope).astype(np.float64), step)
    scale = np.linalg.norm(found.gradient(slope)) * np.linalg.norm(step)
    assert ours == pytest.approx(np.vdot(slope, found.move(step)), abs=1e-4 * float(scale))


def test_every_coordinate_moves_the_output_equally_far() -> None:
    rng = np.random.default_rng(0)
    moment = _moment(rng, 1, 6)
    found = Whitened.of(rng.standard_normal((2, 6)), moment)
    assert found is not None
    energies = []
    for place in range(6):
        step = np.zeros((1, 2, 6), np.float32)
        step[0, 0, place] = 1
        moved = found.move(step)[0].astype(np.float64)
        energies.append(moved @ moment[0] @ moved)
    values = np.linalg.eigvalsh(moment[0])
    damping = 0.1 * values.mean()
    assert energies == pytest.approx(values / (values + damping), rel=1e-3, abs=1e-6)


def test_sizes_are_those_of_the_outputs_per_direction() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 5)) * np.array([[1.0], [10.0], [0.0]])
    found = Whitened.of(weight, np.eye(5)[None])
    assert found is not None
    expected = np.sqrt(1.1 * np.mean(weight**2, axis=1))
    assert found.size[0, :2, 0] == pytest.approx(expected[:2], rel=1e-5)
    assert found.size[0, 2, 0] == pytest.approx(0.01 * np.sqrt(1.1 * np.mean(weight**2)), rel=1e-5)


@pytest.mark.parametrize("moment", [np.zeros((1, 3, 3)), np.full((1, 3, 3), np.nan)])
def test_without_signal_there_are_no_coordinates(moment: npt.NDArray[np.float64]) -> None:
    assert Whitened.of(np.ones((2, 3)), moment) is None


def test_it_finds_the_minimum_where_directions_differ_by_orders_of_magnitude() -> None:
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    x = rng.standard_normal((512, 12)) @ (rotation * np.logspace(0, -1, 12)).T
    target = rng.standard_normal((4, 12))
    moment = x.T @ x / len(x)
    start = target + 0.3 * rng.standard_normal(target.shape)
    own = Whitened.of(start, moment[None])
    assert own is not None
    weights = {"w": start.astype(np.float32)}
    adam = Adam(weights, {"w": own})

    def error() -> float:
        missed = weights["w"] - target
        return float(np.trace(missed @ moment @ missed.T))

    before = error()
    for step in range(100):
        slope = 2 * (weights["w"] - target) @ moment
        adam.step({"w": slope.astype(np.float32)}, 0.03 * (1 - step / 100))
    assert error() < 0.01 * before
