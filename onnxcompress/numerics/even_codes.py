"""Codes that are the numbers themselves: levels at equal distances, which need no table.

    ŵ_rd = s_r (q_rd - 128),    q_rd = 0 ... 255

Beside few weights a table of 256 levels takes more bytes than it is worth; equal distances cost
about as much as a third of a bit, and the scale of a row takes that up where rows are short.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from onnxcompress.numerics.codebook import (
    Coded,
    Float32,
    Snap,
    damped,
    descend,
    factored,
    refit_scale,
    with_feedback,
)
from onnxcompress.numerics.feedback import FloatArray, InputMoments

MIDDLE = 128
"""The code of zero."""
_LEVELS = np.arange(2 * MIDDLE, dtype=np.float32)[None] - MIDDLE


def is_even(coded: Coded) -> bool:
    """Whether codes are of this kind."""
    return coded.scale is not None and np.array_equal(coded.levels, _LEVELS)


def fit_even(
    weight: Float32, moments: InputMoments | None, *, rounds: int, snap: Snap | None
) -> Coded:
    """Fit scales and codes in turns.

    Args:
        weight: ``W``, finite, [R, D].
        moments: ``H``; None for the identity, and nearest codes.
        rounds: How often.
        snap: The scales that can be stored; all when None.

    Returns:
        The best of what was tried in the H-norm (damped).
    """
    exact = weight.astype(np.float64)
    largest = np.abs(exact).max(axis=1, initial=0.0)
    scale = np.where(largest > 0, largest / (MIDDLE - 1), 1.0)
    best = current = _nearest(exact, scale if snap is None else snap(scale))
    inputs = None if moments is None else damped(moments)
    factors = None if moments is None else factored(moments)
    for _ in range(rounds):
        if factors is not None and inputs is not None:
            current = descend(exact, with_feedback(exact, current, inputs, factors), inputs)
            best = _better(exact, best, current, inputs)
        current = refit_scale(exact, current, inputs, snap=snap)
        if factors is None and current.scale is not None:
            current = _nearest(exact, current.scale.astype(np.float64))
        best = _better(exact, best, current, inputs)
    return best


def _nearest(weight: FloatArray, scale: FloatArray) -> Coded:
    stored = scale.astype(np.float32)
    codes = np.rint(weight / stored.astype(np.float64)[:, None]) + MIDDLE
    return Coded(np.clip(codes, 0, 2 * MIDDLE - 1).astype(np.uint8), _LEVELS, stored)


def _better(weight: FloatArray, one: Coded, other: Coded, moments: InputMoments | None) -> Coded:
    """The rows of less error of two that differ in codes and scales."""
    if one.scale is None or other.scale is None:
        return one
    wins = other.error(weight, moments) < one.error(weight, moments)
    return dataclasses.replace(
        one,
        codes=np.where(wins[:, None], other.codes, one.codes),
        scale=np.where(wins, other.scale, one.scale),
    )
