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
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.clipping import Bounds, clipped_target
from onnxcompress.numerics.least_squares import Moments, damping, regress
from onnxcompress.numerics.scalar_function import ScalarFunction

Floats = npt.NDArray[np.float32]
T = TypeVar("T")

TURNS = 3
"""Most turns; each fits both layers once."""
_SOLVES = 2
"""Conjugate gradients of one step."""
_DAMPING = 0.1
"""``λ`` relative to the mean curvature: so far outputs are nearly linear in the weights."""
RIDGE = 1e-2
"""Of the second layer if none is known, and of ``A`` and ``B``."""
_ROWS_PER_INPUT = 20
"""Rows for ``B``, for each of the inputs."""
_SHRINKS = (1.0, 0.5, 0.25)
"""Parts of a step to try."""
_NOTHING = 1e-6
"""Error below which there is nothing to fit but what sums in float32 lose."""
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
        slopes: ``f'``, 0 for padding, [k T, H].
        hidden: ``f``, likewise, [k, T · H].
        missing: What the outputs should be more, [k, O].
        open: 1 where the outputs can change what is missing, else 0, [k, O].
    """

    slopes: Floats
    hidden: Floats
    missing: Floats
    open: Floats

    @property
    def energy(self) -> float:
        """``Σ‖missing‖²``."""
        return float(np.sum(self.missing.astype(np.float64) ** 2))


class Each(Protocol):
    """As :func:`map`: does something to each part of the rows, perhaps side by side."""

    def __call__(self, function: Callable[[int], T], numbers: Iterable[int], /) -> Iterable[T]:
        """The results, in order."""
        ...


def jointly(
    fit: Sequence[Rows],
    held: Sequence[Rows],
    layers: Layers,
    hidden: ScalarFunction,
    outer: Bounds,
    *,
    ridge: float = RIDGE,
    turns: int = TURNS,
    each: Each = map,
) -> Fitted:
    """Fit both layers; never worse than the given weights on the rows held out.

    Args:
        fit: Rows to fit to, in parts.
        held: Rows to judge by, in parts.
        layers: The weights to begin with.
        hidden: The activation between them.
        outer: What the activation behind them clips to.
        ridge: Pull of the second layer towards its weights, relative to the mean variance of its
            inputs.
        turns: Most turns.
        each: Runs over parts; in threads, say.
    """
    own, others = (_Parts(parts, hidden, outer, each) for parts in (fit, held))
    best = layers
    before = least = others.error(layers)
    if before < _NOTHING:
        return Fitted(layers, before, before)
    whitening = _whitening(fit)
    for _ in range(turns):
        start = least
        for step in (_first, _second):
            # A layer that gains nothing on rows held out stays, and the other goes on from there.
            tried = step(own, best, whitening, ridge)
            error = others.error(tried)
            if error < least:
                best, least = tried, error
        if not least < (1.0 - _LEAST_GAIN) * start:
            break
    if not least < (1.0 - _LEAST_GAIN) * before:
        return Fitted(layers, before, before)
    return Fitted(best, before, least)


class _Parts:
    """Rows in parts, and the activations.

    Args:
        parts: The rows.
        hidden: The activation between the layers.
        outer: What the activation behind them clips to.
        each: Runs over parts.
    """

    def __init__(
        self, parts: Sequence[Rows], hidden: ScalarFunction, outer: Bounds, each: Each
    ) -> None:
        self.parts, self._hidden, self._outer, self._each = parts, hidden, outer, each
        self._energy = sum(
            float(np.sum(outer.value(p.target).astype(np.float64) ** 2)) for p in parts
        )

    def each(self, function: Callable[[int], T]) -> list[T]:
        """What ``function`` gives for the number of each part, in order."""
        return list(self._each(function, range(len(self.parts))))

    def error(self, layers: Layers) -> float:
        """``Σ‖f(y₀) - f(y)‖² / Σ‖f(y₀)‖²``, from above as in :mod:`numerics.clipping`."""
        left = sum(self.each(lambda number: self.run(number, layers).energy))
        return left / max(self._energy, 1e-30)

    def run(self, number: int, layers: Layers) -> _Pass:
        """One part through both layers."""
        rows = self.parts[number]
        count, _, width = rows.x.shape
        z = rows.x.reshape(-1, width) @ layers.first.T + layers.first_bias
        inside = rows.inside.reshape(-1, 1).astype(np.float32)
        slopes = self._hidden.slope(z) * inside
        values = (self._hidden.value(z) * inside).reshape(count, -1)
        now = np.asarray(values @ layers.second.T + layers.second_bias, np.float32)
        if rows.shortcut is not None:
            now = now + rows.shortcut
        missing = np.asarray(clipped_target(rows.target, now, self._outer) - now, np.float32)
        open_ = np.maximum(self._outer.slope(rows.target), self._outer.slope(now))
        return _Pass(slopes, values, missing, open_)


@dataclass(frozen=True, slots=True)
class _Whitening:
    """``B⁻¹``, [D, D], and the mean diagonal of ``B``."""

    inverse: Floats
    variance: float


def _whitening(parts: Sequence[Rows]) -> _Whitening:
    """Of some of the rows: it only has to be near."""
    width = parts[0].x.shape[2]
    there = sum(p.x.size // width for p in parts)
    step = max(1, there // (_ROWS_PER_INPUT * width))
    some = np.concatenate([p.x.reshape(-1, width)[::step] for p in parts])
    own = np.asarray(some.T @ some / len(some), np.float32)
    return _Whitening(_inverted(own), float(np.trace(own)) / len(own))


def _inverted(matrix: Floats) -> Floats:
    wide = matrix.astype(np.float64)
    wide += damping(wide, RIDGE) * np.eye(len(wide))
    return np.asarray(np.linalg.inv(wide), np.float32)


def _first(rows: _Parts, layers: Layers, whitening: _Whitening, ridge: float) -> Layers:
    """One step of the first layer; its damping is its own."""
    del ridge
    found = rows.each(lambda number: rows.run(number, layers))
    weight, bias = _step(rows, found, layers, whitening)
    least = sum(f.energy for f in found)
    for part in _SHRINKS:
        tried = dataclasses.replace(
            layers,
            first=layers.first + np.float32(part) * weight,
            first_bias=layers.first_bias + np.float32(part) * bias,
        )
        if sum(rows.each(functools.partial(_energy, rows, tried))) < least:
            return tried
    return layers


def _energy(rows: _Parts, layers: Layers, number: int) -> float:
    return rows.run(number, layers).energy


def _step(
    rows: _Parts, found: Sequence[_Pass], layers: Layers, whitening: _Whitening
) -> tuple[Floats, Floats]:
    """``δ`` of the weights [H, D] and of the bias [H]."""
    second = layers.second
    taps = second.shape[1] // len(layers.first)
    blocks = second.reshape(len(second), taps, -1)
    states = sum(rows.each(lambda n: found[n].slopes.T @ found[n].slopes))
    count = sum(len(f.missing) for f in found)
    curve = np.einsum("oth,otg->hg", blocks, blocks) * (states / np.float32(count * taps))
    # Where all units are clipped there is no curvature, and nothing to do.
    scale = float(np.trace(curve)) / len(curve) * whitening.variance
    if scale <= 0:
        return np.zeros_like(layers.first), np.zeros_like(layers.first_bias)
    left, right = _inverted(curve), whitening.inverse

    def gradient(number: int, missing: Floats) -> Pair:
        now, x = found[number], rows.parts[number].x
        hidden = (missing @ second).reshape(now.slopes.shape) * now.slopes
        weight = hidden.T @ x.reshape(-1, x.shape[2])
        return np.asarray(weight, np.float32), hidden.sum(axis=0, dtype=np.float32)

    def missing(number: int) -> Pair:
        return gradient(number, found[number].missing * found[number].open)

    def image(number: int, weight: Floats, bias: Floats) -> Pair:
        now, x = found[number], rows.parts[number].x
        hidden = (x.reshape(-1, x.shape[2]) @ weight.T + bias) * now.slopes
        made = (hidden.reshape(len(now.missing), -1) @ second.T) * now.open
        return gradient(number, np.asarray(made, np.float32))

    def precondition(weight: Floats, bias: Floats) -> Pair:
        return np.asarray(left @ weight @ right, np.float32), np.asarray(left @ bias, np.float32)

    return _conjugate_gradients(
        _summed(rows.each(missing)),
        lambda w, b: _summed(rows.each(lambda n: image(n, w, b))),
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


def _summed(pairs: Sequence[Pair]) -> Pair:
    return (
        np.sum([p[0] for p in pairs], axis=0, dtype=np.float32),
        np.sum([p[1] for p in pairs], axis=0, dtype=np.float32),
    )


def _second(rows: _Parts, layers: Layers, whitening: _Whitening, ridge: float) -> Layers:
    """The second layer fitted to what the first one makes."""
    del whitening

    def moments(number: int) -> Moments:
        found = rows.run(number, layers)
        target = found.hidden @ layers.second.T + layers.second_bias + found.missing
        mean_x, mean_y = found.hidden.mean(axis=0), target.mean(axis=0)
        x, y = found.hidden - mean_x, target - mean_y
        return Moments(
            len(x),
            mean_x.astype(np.float64),
            mean_y.astype(np.float64),
            (x.T @ x).astype(np.float64) / len(x),
            (x.T @ y).astype(np.float64) / len(x),
        )

    whole = functools.reduce(Moments.merge, rows.each(moments))
    weight, bias = regress(whole, layers.second.astype(np.float64), ridge)
    return dataclasses.replace(
        layers, second=weight.astype(np.float32), second_bias=bias.astype(np.float32)
    )
