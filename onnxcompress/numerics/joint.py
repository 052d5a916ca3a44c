"""Two layers with an activation between them, fitted together.

    y = Σ_t W₂ₜ f(W₁ xₜ + b₁) + b₂

``t`` runs over the taps of the second layer. Fitted one after the other, the first layer goes on
making what it made in the original, though the second one has lost a part of that and could use
something else. Given ``W₂``, the output is nearly linear in small changes of ``W₁`` (of a Relu
exactly, as long as no hidden value crosses zero), so that one step of Gauss and Newton is

    δ = argmin Σ_rows ‖e - Σ_t W₂ₜ (f'(zₜ) ∘ δ xₜ)‖² + λ‖δ‖²

with ``e`` what is missing now. Conjugate gradients solve it, preconditioned by the Kronecker
product ``A ⊗ B`` of ``A = Σ_t W₂ₜᵀ W₂ₜ ∘ E[f' f'ᵀ]`` and ``B = E[x xᵀ]``, so that a few turns are
enough. Then ``W₂`` is fitted anew to what the first layer makes now. Rows that were not fitted to
say when to stop.

Source: Martens and Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate
curvature" (the preconditioner); Björck 1996, "Numerical methods for least squares problems" (Gauss
and Newton).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.clipping import Bounds, clipped_target
from onnxcompress.numerics.least_squares import Moments, damping, regress
from onnxcompress.numerics.scalar_function import ScalarFunction

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]

TURNS = 3
"""Most turns; each fits both layers once."""
_SOLVES = 2
"""Conjugate gradients of one step."""
_DAMPING = 0.1
"""``λ`` relative to the mean curvature: so far outputs are nearly linear in the weights."""
RIDGE = 1e-2
"""Of the second layer if none is known, and of ``A`` and ``B``."""
_SHRINKS = (1.0, 0.5, 0.25)
"""Parts of a step to try."""
_LEAST_GAIN = 5e-3
"""A turn that lowers the error of the rows held out by less than this share is the last one, and
the layers stay as they are where all turns together gain no more."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What two layers see, and what they should answer.

    Attributes:
        x: Inputs of the first layer at each tap of the second, [k, T, D].
        inside: Whether the tap is a position of the hidden tensor and not padding, [k, T].
        target: What the second layer is to give, before an activation and before the shortcut is
            subtracted, [k, O].
        shortcut: What is added to it, [k, O]; None where nothing is.
    """

    x: Floats
    inside: npt.NDArray[np.bool_]
    target: Floats
    shortcut: Floats | None


@dataclass(frozen=True, slots=True)
class Layers:
    """The weights of both layers.

    Attributes:
        first: ``W₁``, [H, D].
        first_bias: ``b₁``, [H].
        second: ``W₂``, [O, T · H], tap first.
        second_bias: ``b₂``, [O].
    """

    first: Floats
    first_bias: Floats
    second: Floats
    second_bias: Floats


@dataclass(frozen=True, slots=True)
class Fitted:
    """Both layers and what they leave of the rows held out.

    Attributes:
        layers: The weights.
        before: The error that the given weights leave, relative to the energy of the target.
        after: The same of these weights.
    """

    layers: Layers
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class _Pass:
    """One run through both layers.

    Attributes:
        slopes: ``f'``, 0 for padding, [k, T, H].
        hidden: ``f``, likewise, [k, T · H].
        missing: What the outputs should be more, [k, O].
        open: 1 where the outputs can change what is missing, else 0, [k, O].
    """

    slopes: Floats
    hidden: Floats
    missing: Floats
    open: Floats


def jointly(
    fit: Rows,
    held: Rows,
    layers: Layers,
    hidden: ScalarFunction,
    outer: Bounds,
    *,
    ridge: float = RIDGE,
    turns: int = TURNS,
) -> Fitted:
    """Fit both layers; never worse than the given weights on the rows held out.

    Args:
        fit: Rows to fit to.
        held: Rows to judge by.
        layers: The weights to begin with.
        hidden: The activation between them.
        outer: What the activation behind them clips to.
        ridge: Pull of the second layer towards its weights, relative to the mean variance of its
            inputs.
        turns: Most turns.
    """
    best = layers
    before = least = _error(held, layers, hidden, outer)
    for _ in range(turns):
        start = least
        for step in (_first, _second):
            # A layer that gains nothing on rows held out stays, and the other goes on from there.
            tried = step(fit, best, hidden, outer, ridge)
            error = _error(held, tried, hidden, outer)
            if error < least:
                best, least = tried, error
        if not least < (1.0 - _LEAST_GAIN) * start:
            break
    if not least < (1.0 - _LEAST_GAIN) * before:
        return Fitted(layers, before, before)
    return Fitted(best, before, least)


def _run(rows: Rows, layers: Layers, hidden: ScalarFunction, outer: Bounds) -> _Pass:
    count, taps, width = rows.x.shape
    z = rows.x.reshape(-1, width) @ layers.first.T + layers.first_bias
    inside = rows.inside.reshape(-1, 1).astype(np.float32)
    slopes = hidden.slope(z) * inside
    values = (hidden.value(z) * inside).reshape(count, -1)
    now = np.asarray(values @ layers.second.T + layers.second_bias, np.float32)
    if rows.shortcut is not None:
        now = now + rows.shortcut
    missing = np.asarray(clipped_target(rows.target, now, outer) - now, np.float32)
    open_ = np.maximum(outer.slope(rows.target), outer.slope(now))
    return _Pass(slopes.reshape(count, taps, -1), values, missing, open_)


def _error(rows: Rows, layers: Layers, hidden: ScalarFunction, outer: Bounds) -> float:
    """``Σ‖f(y₀) - f(y)‖² / Σ‖f(y₀)‖²``, bounded from above as in :mod:`numerics.clipping`."""
    missing = _run(rows, layers, hidden, outer).missing
    energy = float(np.sum(outer.value(rows.target).astype(np.float64) ** 2))
    return float(np.sum(missing.astype(np.float64) ** 2)) / max(energy, 1e-30)


def _first(
    rows: Rows, layers: Layers, hidden: ScalarFunction, outer: Bounds, ridge: float
) -> Layers:
    """One step of the first layer; it has a damping of its own."""
    del ridge
    found = _run(rows, layers, hidden, outer)
    weight, bias = _step(rows, found, layers.second)
    least, best = float(np.sum(found.missing.astype(np.float64) ** 2)), layers
    for part in _SHRINKS:
        tried = dataclasses.replace(
            layers,
            first=layers.first + np.float32(part) * weight,
            first_bias=layers.first_bias + np.float32(part) * bias,
        )
        error = float(np.sum(_run(rows, tried, hidden, outer).missing.astype(np.float64) ** 2))
        if error < least:
            return tried
    return best


def _step(rows: Rows, found: _Pass, second: Floats) -> tuple[Floats, Floats]:
    """``δ`` of the weights [H, D] and of the bias [H]."""
    count, taps, width = rows.x.shape
    flat = rows.x.reshape(-1, width)
    slopes, across = found.slopes, found.open
    own = flat.T @ flat / len(flat)
    own += np.float32(damping(own.astype(np.float64), RIDGE)) * np.eye(width, dtype=np.float32)
    states = slopes.reshape(-1, slopes.shape[2])
    blocks = second.reshape(len(second), taps, -1)
    curve = np.einsum("oth,otg->hg", blocks, blocks) * (states.T @ states / len(states))
    # Where all units are clipped there is no curvature, and nothing to do.
    scale = float(np.trace(curve)) / len(curve) * float(np.trace(own)) / width
    if scale <= 0:
        return np.zeros((len(curve), width), np.float32), np.zeros(len(curve), np.float32)
    curve += np.float32(damping(curve.astype(np.float64), RIDGE)) * np.eye(
        len(curve), dtype=np.float32
    )
    left = np.linalg.inv(curve.astype(np.float64)).astype(np.float32)
    right = np.linalg.inv(own.astype(np.float64)).astype(np.float32)

    def image(weight: Floats, bias: Floats) -> Floats:
        hidden = (flat @ weight.T + bias).reshape(slopes.shape) * slopes
        return np.asarray((hidden.reshape(count, -1) @ second.T) * across, np.float32)

    def gradient(missing: Floats) -> tuple[Floats, Floats]:
        hidden = ((missing @ second).reshape(slopes.shape) * slopes).reshape(states.shape)
        return np.asarray(hidden.T @ flat, np.float32), hidden.sum(axis=0, dtype=np.float32)

    def precondition(weight: Floats, bias: Floats) -> tuple[Floats, Floats]:
        return np.asarray(left @ weight @ right, np.float32), np.asarray(left @ bias, np.float32)

    return _conjugate_gradients(
        gradient(found.missing * across),
        lambda w, b: gradient(image(w, b)),
        precondition,
        np.float32(_DAMPING * count * scale),
    )


Pair = tuple[Floats, Floats]


def _conjugate_gradients(
    right: Pair,
    product: Callable[[Floats, Floats], Pair],
    precondition: Callable[[Floats, Floats], Pair],
    shift: np.float32,
) -> Pair:
    """A few turns towards the solution of ``(P + shift) δ = right``, from zero."""
    found = (np.zeros_like(right[0]), np.zeros_like(right[1]))
    rest = right
    towards = precondition(*rest)
    direction, length = towards, _inner(rest, towards)
    for _ in range(_SOLVES):
        if not length > 0:
            break
        image = _plus(product(*direction), direction, shift)
        step = np.float32(length / max(_inner(direction, image), 1e-30))
        found, rest = _plus(found, direction, step), _plus(rest, image, -step)
        towards = precondition(*rest)
        longer = _inner(rest, towards)
        direction, length = _plus(towards, direction, np.float32(longer / length)), longer
    return found


def _inner(a: Pair, b: Pair) -> float:
    return sum(float(np.sum(p.astype(np.float64) * q)) for p, q in zip(a, b, strict=True))


def _plus(a: Pair, b: Pair, factor: np.float32) -> Pair:
    return a[0] + factor * b[0], a[1] + factor * b[1]


def _second(
    rows: Rows, layers: Layers, hidden: ScalarFunction, outer: Bounds, ridge: float
) -> Layers:
    """The second layer fitted to what the first one makes."""
    found = _run(rows, layers, hidden, outer)
    target = found.hidden @ layers.second.T + layers.second_bias + found.missing
    mean_x, mean_y = found.hidden.mean(axis=0), target.mean(axis=0)
    x, y = found.hidden - mean_x, target - mean_y
    count = len(x)
    moments = Moments(
        count,
        mean_x.astype(np.float64),
        mean_y.astype(np.float64),
        (x.T @ x).astype(np.float64) / count,
        (x.T @ y).astype(np.float64) / count,
    )
    weight, bias = regress(moments, layers.second.astype(np.float64), ridge)
    return dataclasses.replace(
        layers, second=weight.astype(np.float32), second_bias=bias.astype(np.float32)
    )
