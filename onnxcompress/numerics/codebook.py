"""Codebooks: weights that take few different values, stored as indices into a table of them.

A weight matrix ``W`` [R, D] (rows are output channels) becomes

    Ŵ_rd = s_r · c_{q_rd}

with ``k`` *levels* ``c``, a code ``q`` of ``log₂ k`` bits for every weight and, where it helps, a
scale ``s`` for every row. What is minimized is the error of the layer's output on its inputs ``x``,

    E(W, Ŵ) = tr (W - Ŵ) H (W - Ŵ)ᵀ,     H = E[x xᵀ]       (the *H-norm*; H = I without data)

in turns, each of which cannot raise it or is undone:

- levels to start with: one-dimensional k-means of ``w/s`` weighted by ``s² H_dd``, exactly
  (:mod:`onnxcompress.numerics.kmeans`);
- codes: nearest level, then error feedback (:mod:`onnxcompress.numerics.feedback`), then descent on
  single codes (:func:`descend`);
- levels and scales again: least squares in the H-norm for the codes found.

Source: Han, Mao and Dally 2016, "Deep Compression"; Choi, El-Khamy and Lee 2017, "Towards the limit
of network quantization" (weighting by second derivatives); Frantar et al. 2023, "GPTQ".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.feedback import Factor, FloatArray, InputMoments, output_error
from onnxcompress.numerics.kmeans import may_repeat, nearest, optimal_levels

Codes: TypeAlias = npt.NDArray[np.uint8]
Float32: TypeAlias = npt.NDArray[np.float32]
Snap: TypeAlias = Callable[[FloatArray], FloatArray]
"""Moves levels to the nearest ones that can be stored (integers, half precision)."""

_CG_STEPS = 12
_CG_TOLERANCE = 1e-6
"""Share of the first residual's energy at which levels are good enough to assign codes again."""
_FITTED = 1 << 19
"""Weights that levels are fitted to at most; rows at even distances where there are more."""
_DAMP = 0.01
"""Damping of ``H`` relative to its mean diagonal, as in error feedback."""


# --- codebooks of matrices -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Coded:
    """A matrix of codes, and what they stand for: ``ŵ_rd = scale_r · levels[book_r, codes_rd]``.

    Attributes:
        codes: [R, D].
        levels: Ascending in each codebook, [B, k].
        scale: One factor per row, [R]; None where it is 1.
        rows: How many consecutive rows share a codebook; 0 for all.
    """

    codes: Codes
    levels: Float32
    scale: Float32 | None
    rows: int = 0

    @property
    def book(self) -> npt.NDArray[np.int64]:
        """The codebook of each row, [R]."""
        return np.arange(len(self.codes)) // (self.rows or max(len(self.codes), 1))

    def decoded(self) -> Float32:
        """``Ŵ``, [R, D], in the float32 arithmetic that onnxruntime uses at load."""
        values = self.levels[self.book[:, None], self.codes]
        return values if self.scale is None else values * self.scale[:, None]

    def error(self, weight: FloatArray, moments: InputMoments | None) -> FloatArray:
        """The output error of each row, [R]."""
        return output_error(weight - self.decoded(), moments)


@dataclass(frozen=True, slots=True)
class Fitting:
    """How to fit a codebook.

    Attributes:
        count: ``k``, 2 to 256.
        group: Rows that share a codebook; 0 for all.
        scales: Whether rows may have a scale of their own.
        feedback: Whether codes are assigned with error feedback; otherwise the nearest level.
        rounds: How often codes, scales and levels are fitted in turns.
        snap: The levels that can be stored; all when None.
        snap_scale: The scales that can be stored; all when None.
    """

    count: int
    group: int = 0
    scales: bool = True
    feedback: bool = True
    rounds: int = 3
    snap: Snap | None = None
    snap_scale: Snap | None = None


def fit(
    weight: Float32,
    moments: InputMoments | None,
    fitting: Fitting,
    *,
    scale: Float32 | None = None,
) -> Coded:
    """Fit codebooks to the rows of a matrix.

    A matrix of at most ``k`` different values is reproduced exactly.

    Args:
        weight: ``W``, finite, [R, D].
        moments: ``H``; None for the identity.
        fitting: How.
        scale: Scales that must stay, [R]; None to find them.

    Returns:
        The best of what was tried in the H-norm (``H`` damped by a hundredth of its mean diagonal).
    """
    rows = fitting.group or len(weight)
    parts = []
    for start in range(0, len(weight), rows):
        own = slice(start, min(start + rows, len(weight)))
        inputs = None if moments is None else moments.rows(own)
        fixed = None if scale is None else scale[own]
        parts.append(_fit_one(weight[own], inputs, fitting, fixed))
    if len(parts) == 1:
        return parts[0]
    scales = None
    if any(part.scale is not None for part in parts):
        scales = np.concatenate([_scale_of(part).astype(np.float32) for part in parts])
    return Coded(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.levels for part in parts]),
        scales,
        rows,
    )


def _fit_one(
    weight: Float32, moments: InputMoments | None, fitting: Fitting, scale: Float32 | None
) -> Coded:
    """One codebook, the best with and without scales."""
    exact = weight.astype(np.float64)
    if scale is not None:
        return _fit_from(exact, moments, fitting, scale.astype(np.float64), fixed=True)
    distinct = np.unique(weight) if may_repeat(weight, fitting.count) else None
    if distinct is not None and len(distinct) <= fitting.count:
        levels = np.pad(distinct, (0, fitting.count - len(distinct)), mode="edge")
        codes = np.searchsorted(distinct, weight).astype(np.uint8)
        return Coded(codes, levels.astype(np.float32)[None], None)
    unscaled = not fitting.scales or len(weight) == 1
    fits = []
    if unscaled or moments is None:  # without data a scale may cost more than it helps
        fits.append(_fit_from(exact, moments, fitting, None, fixed=True))
    if not unscaled:
        spread = np.sqrt(np.mean(exact**2, axis=1))
        start = np.where(spread > 0, spread, 1.0)
        start = start if fitting.snap_scale is None else fitting.snap_scale(start)
        fits.append(_fit_from(exact, moments, fitting, start, fixed=False))
    return min(fits, key=lambda coded: float(coded.error(exact, moments).sum()))


def _fit_from(
    weight: FloatArray,
    moments: InputMoments | None,
    fitting: Fitting,
    scale: FloatArray | None,
    *,
    fixed: bool,
) -> Coded:
    """One codebook from the scales ``scale``, which stay if ``fixed``."""
    variance = np.ones_like(weight) if moments is None else moments.diagonal()
    factors = np.ones(len(weight)) if scale is None else scale
    relative = weight / factors[:, None]
    importance = factors[:, None] ** 2 * variance
    levels = optimal_levels(relative.ravel(), importance.ravel(), fitting.count)
    levels = levels if fitting.snap is None else fitting.snap(levels)
    inputs = None if moments is None else damped(moments)
    best = _nearest(weight, levels, scale)
    best = _in_turns(weight, best, inputs, fitting, None, fixed=fixed)
    if fitting.feedback and moments is not None:
        best = _in_turns(weight, best, inputs, fitting, moments, fixed=fixed)
    return best


def _in_turns(
    weight: FloatArray,
    start: Coded,
    inputs: InputMoments | None,
    fitting: Fitting,
    moments: InputMoments | None,
    *,
    fixed: bool,
) -> Coded:
    """Codes, scales and levels in turns; the best on the way, ``start`` included.

    Args:
        weight: ``W``, [R, D].
        start: One codebook.
        inputs: The damped ``H`` that errors are measured in; None for the identity.
        fitting: How.
        moments: ``H`` for error feedback; None takes the nearest levels.
        fixed: Whether the scales must stay.
    """
    best = current = start
    least = float(best.error(weight, inputs).sum())
    factors = None if moments is None else factored(moments)
    for _ in range(fitting.rounds):
        steps = []
        if factors is not None and inputs is not None:
            current = descend(weight, with_feedback(weight, current, inputs, factors), inputs)
            steps.append(current)
        if not fixed:
            current = refit_scale(weight, current, inputs, snap=fitting.snap_scale)
        current = refit_levels(weight, current, inputs, snap=fitting.snap)
        steps.append(current)
        if moments is None:
            current = _nearest(weight, current.levels[0].astype(np.float64), current.scale)
            steps.append(current)
        before = least
        for step in steps:
            now = float(step.error(weight, inputs).sum())
            if now < least:
                best, least = step, now
        if not least < before * (1 - 1e-4):
            break
    return best


def _nearest(weight: FloatArray, levels: FloatArray, scale: FloatArray | Float32 | None) -> Coded:
    kept = np.sort(levels).astype(np.float32)
    factors = None if scale is None else np.asarray(scale, np.float32)
    relative = weight if factors is None else weight / factors[:, None].astype(np.float64)
    codes = nearest(relative, kept.astype(np.float64)).astype(np.uint8)
    return Coded(codes, kept[None], factors)


def _scale_of(coded: Coded) -> FloatArray:
    if coded.scale is None:
        return np.ones(len(coded.codes))
    return coded.scale.astype(np.float64)


def damped(moments: InputMoments) -> InputMoments:
    """``H`` with the damping that :func:`factored` has."""
    return moments.damped(_DAMP)


def factored(moments: InputMoments) -> list[tuple[slice, Factor]]:
    """The rows of each group of inputs with its factor, where there is signal."""
    found = ((rows, Factor.of(matrix, damp=_DAMP)) for rows, matrix in moments.parts())
    return [(rows, factor) for rows, factor in found if factor is not None]


def with_feedback(
    weight: FloatArray,
    start: Coded,
    damped: InputMoments,
    factors: Sequence[tuple[slice, Factor]],
) -> Coded:
    """Codes by error feedback on the levels of ``start``; rows that get worse keep theirs.

    Args:
        weight: ``W``, [R, D].
        start: One codebook.
        damped: ``H`` with damping.
        factors: Of ``H``, see :func:`factored`.
    """
    levels, scale = start.levels[0].astype(np.float64), _scale_of(start)[:, None]
    codes = start.codes.copy()
    for rows, factor in factors:
        found, own = codes[rows], scale[rows]

        def project(
            places: npt.NDArray[np.int64],
            columns: FloatArray,
            found: Codes = found,
            own: FloatArray = own,
        ) -> FloatArray:
            picked = nearest(columns / own, levels)
            found[:, places] = picked
            return np.asarray(levels[picked] * own)

        factor.replace(weight[rows], project)
    return _better(weight, start, codes, damped)


def descend(weight: FloatArray, start: Coded, moments: InputMoments, *, sweeps: int = 2) -> Coded:
    """Change single codes as long as that lowers the error.

    With ``G = (W - Ŵ) H``, the best value of one weight while all others stay is
    ``ŵ_rd + G_rd / H_dd``; the nearest level to it is taken, and ``G`` updated.

    Args:
        weight: ``W``, [R, D].
        start: One codebook and the codes to start from.
        moments: ``H``.
        sweeps: How often each column is looked at.
    """
    levels, scale = start.levels[0].astype(np.float64), _scale_of(start)
    codes = start.codes.copy()
    stored = levels[codes] * scale[:, None]
    gradient = moments.times(weight - stored)
    before = np.einsum("rd,rd->r", gradient, weight - stored)
    diagonal = moments.diagonal()
    for _ in range(sweeps):
        changed = False
        for d in np.flatnonzero((diagonal > 0).all(axis=0)):
            wanted = (stored[:, d] + gradient[:, d] / diagonal[:, d]) / scale
            found = nearest(wanted, levels)
            rows = np.flatnonzero(found != codes[:, d])
            if len(rows) == 0:
                continue
            changed = True
            moved = levels[found[rows]] * scale[rows]
            step = (moved - stored[rows, d])[:, None]
            if len(moments.matrices) == 1:
                gradient[rows] -= step * moments.matrices[0, d]
            else:
                gradient[rows] -= step * moments.matrices[moments.owner[rows], d]
            stored[rows, d] = moved
            codes[rows, d] = found[rows]
        if not changed:
            break
    wins = np.einsum("rd,rd->r", gradient, weight - stored) < before
    return dataclasses.replace(start, codes=np.where(wins[:, None], codes, start.codes))


def _better(weight: FloatArray, start: Coded, codes: Codes, moments: InputMoments) -> Coded:
    """Per row, the codes of less error."""
    other = dataclasses.replace(start, codes=codes)
    wins = other.error(weight, moments) < start.error(weight, moments)
    return dataclasses.replace(start, codes=np.where(wins[:, None], codes, start.codes))


def refit_scale(
    weight: FloatArray, start: Coded, moments: InputMoments | None, *, snap: Snap | None = None
) -> Coded:
    """The scales of least error for the codes: ``s_r = v_r H w_rᵀ / v_r H v_rᵀ``, ``v = c[q]``.

    Args:
        weight: ``W``, [R, D].
        start: Codes, levels and scales of one codebook.
        moments: ``H``; None for the identity.
        snap: The scales that can be stored; all when None.
    """
    if start.scale is None:
        return start
    values = start.levels[0].astype(np.float64)[start.codes]
    product = values if moments is None else moments.times(values)
    power = np.einsum("rd,rd->r", product, values)
    match = np.einsum("rd,rd->r", product, weight)
    good = (power > 0) & (match > 0)
    scale = np.where(good, match / np.where(good, power, 1), start.scale)
    scale = scale if snap is None else snap(scale)
    return dataclasses.replace(start, scale=scale.astype(np.float32))


def refit_levels(
    weight: FloatArray, start: Coded, moments: InputMoments | None, *, snap: Snap | None = None
) -> Coded:
    """The levels of least error for the codes, by preconditioned conjugate gradients.

    With ``Z_r`` [D, k] the one-hot codes of row ``r``,

        (Σ s_r² Z_rᵀ H Z_r) c = Σ s_r Z_rᵀ H w_r

    The codes are renumbered where the levels change places. Of more than 524,288 weights some rows
    speak for all.

    Args:
        weight: ``W``, [R, D].
        start: Codes, levels and scales of one codebook.
        moments: ``H``; None for the identity.
        snap: The levels that can be stored; all when None.
    """
    count = start.levels.shape[1]
    some = slice(None, None, -(-weight.size // _FITTED))
    weight, moments = weight[some], moments and moments.rows(some)
    codes, scale = start.codes[some], _scale_of(start)[some, None]
    flat = codes.ravel()

    def gather(values: FloatArray) -> FloatArray:
        product = values if moments is None else moments.times(values)
        return np.bincount(flat, (product * scale).ravel(), minlength=count).astype(np.float64)

    # The diagonal of the system for columns that are not correlated makes the steps few.
    weights = np.ones_like(weight) if moments is None else moments.diagonal()
    diagonal = np.bincount(flat, (scale**2 * weights).ravel(), minlength=count)
    inverse = np.where(diagonal > 0, 1 / np.where(diagonal > 0, diagonal, 1), 0.0)
    levels = start.levels[0].astype(np.float64)
    residual = gather(weight - levels[codes] * scale)
    direction = inverse * residual
    power = first = float(residual @ direction)
    for _ in range(min(count, _CG_STEPS)):
        if power <= _CG_TOLERANCE * first or power == 0.0:
            break
        image = gather(direction[codes] * scale)
        step = power / max(float(direction @ image), np.finfo(float).tiny)
        levels = levels + step * direction
        residual = residual - step * image
        before, power = power, float(residual @ (inverse * residual))
        direction = inverse * residual + power / before * direction
    if not np.isfinite(levels).all():
        return start
    levels = levels if snap is None else snap(levels)
    order = np.argsort(levels, kind="stable")
    renumbered = np.empty(count, np.uint8)
    renumbered[order] = np.arange(count)
    sorted_levels = levels[order].astype(np.float32)[None]
    return dataclasses.replace(start, codes=renumbered[start.codes], levels=sorted_levels)
