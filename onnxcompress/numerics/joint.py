"""Layers on both sides of a hidden tensor, fitted together.

    y_r = Σ_t W_rₜ h_t + b_r,     h = max_p f(V x_p + v)

Several first layers ``V`` may make channels of the hidden tensor each, and several second layers
``W_r`` may read them. ``t`` runs over the taps of a second layer, ``p`` over the places that a
pooling in front of it takes the largest of (one where there is none). Fitted one after the other,
a first layer goes on making what it made in the original, though those behind have lost a part of
that and could use something else. Given ``W``, the outputs are nearly linear in small changes of
``V`` (with a Relu exactly, as long as no hidden value crosses zero and no other place becomes the
largest), so that one step of Gauss and Newton is

    δ = argmin Σ_r w_r Σ_rows ‖e - Σ_t W_rₜ (f'(zₜ) ∘ δ xₜ)‖² + λ‖δ‖²

with ``e`` what is missing now, and ``w_r`` one over the energy of what a layer should answer.
Conjugate gradients solve it, preconditioned for each first layer by the Kronecker product
``A ⊗ B`` of ``A = Σ_r w_r Σ_t W_rₜᵀ W_rₜ ∘ Σ f' f'ᵀ`` and ``B = E[x xᵀ]``, so that a few turns are
enough. Then each ``W_r`` is fitted anew to what the first layers make now. Rows that were not
fitted to say when to stop.

Source: Martens and Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate
curvature" (the preconditioner); Björck 1996, "Numerical methods for least squares problems" (Gauss
and Newton).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from onnxcompress._threads import Each
from onnxcompress.numerics.clipping import Bounds, clipped_target
from onnxcompress.numerics.hidden import Floats, Layer, Layers, Made, Rows, made_of
from onnxcompress.numerics.least_squares import Moments, damping, regress
from onnxcompress.numerics.scalar_function import ScalarFunction

T = TypeVar("T")

TURNS = 6
"""Most turns; each fits all layers once."""
_SOLVES = 2
"""Conjugate gradients of one step."""
_DAMPING = 0.03
"""``λ`` relative to the mean curvature: so far outputs are nearly linear in the weights."""
RIDGE = 1e-2
"""Of the second layers if none is known, and of ``A`` and ``B``."""
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
class Task:
    """A second layer's part in the fit.

    Attributes:
        fit: Rows to fit to, in parts.
        held: Rows to judge by, in parts.
        outer: What the activation behind it clips to.
        ridge: Pull towards its weights, relative to the mean variance of its inputs.
    """

    fit: Sequence[Rows]
    held: Sequence[Rows]
    outer: Bounds
    ridge: float = RIDGE


@dataclass(frozen=True, slots=True)
class Fitted:
    """The layers and what they leave of the rows held out.

    Attributes:
        layers: The weights.
        before: The error that the given weights leave, relative to the energy of the targets; the
            mean over the second layers.
        after: The same of these weights, before the second layers were fitted to all rows.
    """

    layers: Layers
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class _Pass:
    """One run through the layers.

    Attributes:
        made: What each first layer makes.
        hidden: The hidden tensor, [k, T · H].
        missing: What the outputs should be more, [k, O].
        open: 1 where the outputs can change what is missing, else 0, [k, O].
    """

    made: tuple[Made, ...]
    hidden: Floats
    missing: Floats
    open: Floats

    @property
    def energy(self) -> float:
        """``Σ‖missing‖²``."""
        return float(np.sum(self.missing.astype(np.float64) ** 2))


def jointly(
    tasks: Sequence[Task],
    layers: Layers,
    hidden: Sequence[ScalarFunction],
    *,
    turns: int = TURNS,
    each: Each = map,
) -> Fitted:
    """Fit all layers, where that serves the rows held out better than the given weights do.

    What is found is then fitted to all rows, in the second layers.

    Args:
        tasks: What each second layer is fitted to.
        layers: The weights to begin with.
        hidden: The activation behind each first layer.
        turns: Most turns.
        each: Runs over parts; in threads, say.
    """
    own = _Parts(tasks, [t.fit for t in tasks], hidden, each)
    others = _Parts(tasks, [t.held for t in tasks], hidden, each)
    ridges = [t.ridge for t in tasks]
    best = layers
    before = least = others.error(layers)
    if before < _NOTHING:
        return Fitted(layers, before, before)
    whitening = [_whitening(own, maker) for maker in range(len(hidden))]
    steps = (
        functools.partial(_first, own, whitening=whitening),
        functools.partial(_second, own, ridges=ridges),
    )
    for _ in range(turns):
        start = least
        for step in steps:
            # Layers that gain nothing on rows held out stay, and the others go on from there.
            tried = step(best)
            error = others.error(tried)
            if error < least:
                best, least = tried, error
        if not least < (1.0 - _LEAST_GAIN) * start:
            break
    if not least < (1.0 - _LEAST_GAIN) * before:
        return Fitted(layers, before, before)
    every = _Parts(tasks, [[*t.fit, *t.held] for t in tasks], hidden, each)
    return Fitted(_second(every, best, ridges), before, least)


class _Parts:
    """Rows of all second layers, in parts.

    Args:
        tasks: The second layers.
        parts: The rows of each, in parts.
        hidden: The activation behind each first layer.
        each: Runs over parts.

    Attributes:
        parts: All parts, each with the number of its second layer.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        parts: Sequence[Sequence[Rows]],
        hidden: Sequence[ScalarFunction],
        each: Each,
    ) -> None:
        self._tasks, self._hidden, self._each = tasks, hidden, each
        self.parts = [(reader, rows) for reader, own in enumerate(parts) for rows in own]
        energies = [0.0] * len(tasks)
        for reader, rows in self.parts:
            values = tasks[reader].outer.value(rows.target)
            energies[reader] += float(np.sum(values.astype(np.float64) ** 2))
        self._weights = [1.0 / (len(tasks) * max(e, 1e-30)) for e in energies]

    def each(self, function: Callable[[int], T]) -> list[T]:
        """What ``function`` gives for the number of each part, in order."""
        return list(self._each(function, range(len(self.parts))))

    def weight(self, number: int) -> float:
        """``w`` of the layer that a part belongs to."""
        return self._weights[self.parts[number][0]]

    def error(self, layers: Layers) -> float:
        """``Σ‖f(y₀) - f(y)‖² / Σ‖f(y₀)‖²``, from above as in :mod:`numerics.clipping`."""
        return sum(self.each(lambda n: self.weight(n) * self.run(n, layers).energy))

    def run(self, number: int, layers: Layers) -> _Pass:
        """One part through the layers."""
        reader, rows = self.parts[number]
        outer = self._tasks[reader].outer
        made = tuple(
            made_of(rows.places, x, layer, function)
            for x, layer, function in zip(rows.x, layers.first, self._hidden, strict=True)
        )
        hidden = np.concatenate([m.values for m in made], axis=2).reshape(len(rows.target), -1)
        second = layers.second[reader]
        now = np.asarray(hidden @ second.weight.T + second.bias, np.float32)
        if rows.shortcut is not None:
            now = now + rows.shortcut
        missing = np.asarray(clipped_target(rows.target, now, outer) - now, np.float32)
        open_ = np.maximum(outer.slope(rows.target), outer.slope(now))
        return _Pass(made, hidden, missing, open_)


@dataclass(frozen=True, slots=True)
class _Whitening:
    """``B⁻¹``, [D, D], and the mean diagonal of ``B``."""

    inverse: Floats
    variance: float


def _whitening(rows: _Parts, maker: int) -> _Whitening:
    """Of some of the places: it only has to be near."""
    inputs = [own.x[maker] for _, own in rows.parts]
    width = inputs[0].shape[1]
    step = max(1, sum(len(x) for x in inputs) // (_ROWS_PER_INPUT * width))

    def square(number: int) -> tuple[Floats, int]:
        some = inputs[number][::step]
        return some.T @ some, len(some)

    found = rows.each(square)
    count = np.float32(sum(n for _, n in found))
    own = np.asarray(sum(s for s, _ in found) / count, np.float32)
    return _Whitening(_inverted(own), float(np.trace(own)) / len(own))


def _inverted(matrix: Floats) -> Floats:
    wide = matrix.astype(np.float64)
    wide += damping(wide, RIDGE) * np.eye(len(wide))
    return np.asarray(np.linalg.inv(wide), np.float32)


Weights = tuple[Floats, ...]
"""Of the first layers: weight, bias, weight, bias..."""


def _first(rows: _Parts, layers: Layers, whitening: Sequence[_Whitening]) -> Layers:
    """One step of the first layers."""
    linear = _Linear(rows, layers)
    step = linear.step(whitening)

    def energy(tried: Layers, number: int) -> float:
        return rows.weight(number) * rows.run(number, tried).energy

    for part in _SHRINKS:
        moved = _plus([a for f in layers.first for a in (f.weight, f.bias)], step, part)
        first = tuple(Layer(w, b) for w, b in zip(moved[::2], moved[1::2], strict=True))
        tried = dataclasses.replace(layers, first=first)
        if sum(rows.each(functools.partial(energy, tried))) < linear.energy:
            return tried
    return layers


class _Linear:
    """The outputs as linear functions of small changes of the first layers.

    Args:
        rows: The rows.
        layers: The weights that are changed.
    """

    def __init__(self, rows: _Parts, layers: Layers) -> None:
        self._rows, self._layers = rows, layers
        self._found = rows.each(lambda number: rows.run(number, layers))
        bounds = [0, *np.cumsum([len(f.bias) for f in layers.first]).tolist()]
        self._spans = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        self._blocks = [s.weight.reshape(len(s.bias), -1, bounds[-1]) for s in layers.second]

    @property
    def energy(self) -> float:
        """What is missing now, as in :meth:`_Parts.error` but for the rows."""
        return sum(self._rows.weight(n) * f.energy for n, f in enumerate(self._found))

    def step(self, whitening: Sequence[_Whitening]) -> Weights:
        """``δ`` of the weights [H, D] and of the bias [H] of each first layer."""
        right = _summed(self._rows.each(self._right))
        curves = [self._curve(maker) for maker in range(len(self._spans))]
        means = [
            float(np.trace(curve)) / len(curve) * white.variance
            for curve, white in zip(curves, whitening, strict=True)
        ]
        # Where all units are clipped there is no curvature, and nothing to do.
        if not all(mean > 0 for mean in means):
            return tuple(np.zeros_like(a) for a in right)
        left = [_inverted(curve) for curve in curves]

        def product(direction: Weights) -> Weights:
            whole = _summed(self._rows.each(functools.partial(self._image, direction)))
            return tuple(
                a + np.float32(_DAMPING * means[i // 2]) * d
                for i, (a, d) in enumerate(zip(whole, direction, strict=True))
            )

        def precondition(rest: Weights) -> Weights:
            found: list[Floats] = []
            for own, white, weight, bias in zip(
                left, whitening, rest[::2], rest[1::2], strict=True
            ):
                found.append(np.asarray(own @ weight @ white.inverse, np.float32))
                found.append(np.asarray(own @ bias, np.float32))
            return tuple(found)

        return _conjugate_gradients(right, product, precondition)

    def _curve(self, maker: int) -> Floats:
        """``A`` of a first layer, [H, H]."""
        blocks = [b[:, :, self._spans[maker]] for b in self._blocks]
        products = [np.einsum("oth,otg->hg", b, b) / np.float32(b.shape[1]) for b in blocks]

        def part(number: int) -> Floats:
            reader, rows = self._rows.parts[number]
            states = self._found[number].made[maker].states(rows.places)
            weight = np.float32(self._rows.weight(number))
            return np.asarray(weight * products[reader] * states, np.float32)

        return np.asarray(sum(self._rows.each(part)), np.float32)

    def _right(self, number: int) -> Weights:
        """What a part says about ``δ``: the right side of the normal equations."""
        found = self._found[number]
        return self._gradient(number, found.missing * found.open)

    def _image(self, direction: Weights, number: int) -> Weights:
        """What a part adds to the normal equations' matrix times a direction."""
        reader, rows = self._rows.parts[number]
        found, hidden = self._found[number], []
        for x, made, weight, bias in zip(
            rows.x, found.made, direction[::2], direction[1::2], strict=True
        ):
            hidden.append(made.moved(rows.places, x @ weight.T + bias))
        flat = np.concatenate(hidden, axis=2).reshape(len(found.missing), -1)
        made_more = (flat @ self._layers.second[reader].weight.T) * found.open
        return self._gradient(number, np.asarray(made_more, np.float32))

    def _gradient(self, number: int, missing: Floats) -> Weights:
        """From the outputs of a part, [k, O], back to the first layers."""
        reader, rows = self._rows.parts[number]
        second = self._layers.second[reader].weight
        back = (missing @ second).reshape(*rows.places.read.shape[:2], -1)
        given: list[Floats] = []
        for x, made, span in zip(rows.x, self._found[number].made, self._spans, strict=True):
            hidden = made.returned(rows.places, back[..., span])
            given.append(np.asarray(hidden.T @ x, np.float32))
            given.append(hidden.sum(axis=0, dtype=np.float32))
        return tuple(np.float32(self._rows.weight(number)) * a for a in given)


def _conjugate_gradients(
    right: Weights,
    product: Callable[[Weights], Weights],
    precondition: Callable[[Weights], Weights],
) -> Weights:
    """A few turns towards the solution of ``P δ = right``, from zero."""
    found: Weights = tuple(np.zeros_like(a) for a in right)
    rest = right
    towards = precondition(rest)
    direction, length = towards, _inner(rest, towards)
    for _ in range(_SOLVES):
        if not length > 0:
            break
        image = product(direction)
        step = length / max(_inner(direction, image), 1e-30)
        found, rest = _plus(found, direction, step), _plus(rest, image, -step)
        towards = precondition(rest)
        longer = _inner(rest, towards)
        direction, length = _plus(towards, direction, longer / length), longer
    return found


def _inner(a: Weights, b: Weights) -> float:
    return sum(float(np.sum(p.astype(np.float64) * q)) for p, q in zip(a, b, strict=True))


def _plus(a: Sequence[Floats], b: Sequence[Floats], factor: float) -> Weights:
    return tuple(p + np.float32(factor) * q for p, q in zip(a, b, strict=True))


def _summed(parts: Sequence[Weights]) -> Weights:
    return tuple(np.sum(same, axis=0, dtype=np.float32) for same in zip(*parts, strict=True))


def _second(rows: _Parts, layers: Layers, ridges: Sequence[float]) -> Layers:
    """The second layers fitted to what the first ones make."""

    def moments(number: int) -> Moments:
        found, layer = rows.run(number, layers), layers.second[rows.parts[number][0]]
        target = found.hidden @ layer.weight.T + layer.bias + found.missing
        mean_x, mean_y = found.hidden.mean(axis=0), target.mean(axis=0)
        x, y = found.hidden - mean_x, target - mean_y
        return Moments(
            len(x),
            mean_x.astype(np.float64),
            mean_y.astype(np.float64),
            (x.T @ x).astype(np.float64) / len(x),
            (x.T @ y).astype(np.float64) / len(x),
        )

    each = rows.each(moments)
    second = []
    for reader, (layer, ridge) in enumerate(zip(layers.second, ridges, strict=True)):
        own = [m for m, (r, _) in zip(each, rows.parts, strict=True) if r == reader]
        prior = layer.weight.astype(np.float64)
        weight, bias = regress(functools.reduce(Moments.merge, own), prior, ridge)
        second.append(Layer(weight.astype(np.float32), bias.astype(np.float32)))
    return dataclasses.replace(layers, second=tuple(second))
