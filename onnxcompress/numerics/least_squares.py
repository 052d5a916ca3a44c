"""Least squares on streamed moments: the mathematics behind recovery without training.

A linear consumer ``y = W x + b`` sees inputs ``x`` with ``D`` entries (the unfolded columns of a
convolution, the features of a matrix product) and makes ``O`` outputs. Everything here needs only
the moments of ``x`` and ``y``, never the samples, so memory does not grow with their number:

    C = E[(x - x̄)(x - x̄)ᵀ]   [D, D]        X = E[(x - x̄)(y - ȳ)ᵀ]   [D, O]

Two questions are answered.

- *Which inputs can go?* :func:`eliminate` removes units (sets of inputs) one by one, each time the
  one whose loss the remaining weights can make up best, after Optimal Brain Surgeon in block form.
- *What are the best weights for the inputs that are left?* :func:`regress` fits them to a target,
  pulled towards the weights they had, so that directions the samples say nothing about keep their
  old value.

Source: Hassibi and Stork 1993, "Second order derivatives for network pruning: Optimal Brain
Surgeon"; Frantar and Alistarh 2022, "Optimal Brain Compression"; He et al. 2017, "Channel pruning
for accelerating very deep networks"; Hoerl and Kennard 1970, "Ridge regression".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxcompress.numerics.positive import cholesky

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

UNDERFLOW = float(np.finfo(np.float32).tiny)
"""Mean square below which a moment summed in float32 holds no signal."""
_PANEL = 32
"""Rows solved at a time in the triangular solves, by the inverse of so small a triangle."""
_CHUNKS = 16
"""A chunk of removals is this part of the units left."""


@dataclass(frozen=True, slots=True)
class Moments:
    """First and second moments of pairs ``(x, y)``, centred.

    Attributes:
        count: Number of rows (samples times positions) they were taken over.
        mean_x: ``x̄``, [D].
        mean_y: ``ȳ``, [O].
        covariance: ``C``, [D, D], divided by ``count``.
        cross: ``X``, [D, O], divided by ``count``.
    """

    count: int
    mean_x: Array
    mean_y: Array
    covariance: Array
    cross: Array

    def merge(self, other: Moments) -> Moments:
        """The moments over the rows of both.

        ``C = w₁C₁ + w₂C₂ + w₁w₂ δδᵀ`` with ``w`` the shares of the rows and ``δ`` the difference of
        the means.

        Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm".
        """
        total = self.count + other.count
        if total == 0:
            return self
        a, b = self.count / total, other.count / total
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        return Moments(
            count=total,
            mean_x=a * self.mean_x + b * other.mean_x,
            mean_y=a * self.mean_y + b * other.mean_y,
            covariance=a * self.covariance + b * other.covariance + a * b * np.outer(dx, dx),
            cross=a * self.cross + b * other.cross + a * b * np.outer(dx, dy),
        )

    def select(self, columns: Indices) -> Moments:
        """The moments of the inputs ``columns`` alone."""
        return Moments(
            count=self.count,
            mean_x=self.mean_x[columns],
            mean_y=self.mean_y,
            covariance=self.covariance[np.ix_(columns, columns)],
            cross=self.cross[columns],
        )

    def outputs(self, some: slice) -> Moments:
        """The moments with some of the outputs alone."""
        return dataclasses.replace(self, mean_y=self.mean_y[some], cross=self.cross[:, some])

    def uncentred(self) -> Moments:
        """The same moments about zero: what a consumer that has no bias must be fitted to."""
        return Moments(
            count=self.count,
            mean_x=np.zeros_like(self.mean_x),
            mean_y=np.zeros_like(self.mean_y),
            covariance=self.covariance + np.outer(self.mean_x, self.mean_x),
            cross=self.cross + np.outer(self.mean_x, self.mean_y),
        )


@dataclass(frozen=True, slots=True)
class Block:
    """One linear consumer of a group of units, as :func:`eliminate` sees it.

    Attributes:
        weight: ``W``, [O, D].
        moment: ``H``, second moment or covariance of the inputs, [D, D].
        columns: Row ``u`` holds the inputs that unit ``u`` owns, [units, m]. Inputs owned by no
            unit stay.
        scale: Factor on this block's error before the errors of several blocks are added.
    """

    weight: Array
    moment: Array
    columns: Indices
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Elimination:
    """The order in which units go, and what that costs.

    Attributes:
        order: Units in the order of their removal, [n].
        errors: ``errors[k]`` is the summed squared output error after the first ``k`` removals, [n
            + 1].
    """

    order: Indices
    errors: Array


def solve_positive_definite(matrix: Array, right: Array) -> Array:
    """Solve ``A Z = B`` for symmetric ``A``, positive definite but for rounding.

    Args:
        matrix: ``A``, [D, D].
        right: ``B``, [D, N].

    Returns:
        ``Z``, [D, N].

    Raises:
        numpy.linalg.LinAlgError: If ``A`` is not finite, or indefinite beyond rounding.
    """
    factor = cholesky(matrix)
    inverses = _inverses(factor)
    return _backward(factor, inverses, _forward(factor, inverses, right))


def solve_lower(factor: Array, right: Array) -> Array:
    """Solve ``L Z = B`` for a lower triangular ``L``.

    Args:
        factor: ``L``, [D, D].
        right: ``B``, [D, N].

    Returns:
        ``Z``, [D, N].
    """
    return _forward(factor, _inverses(factor), right)


def solve_transposed(factor: Array, right: Array) -> Array:
    """Solve ``Lᵀ Z = B`` for a lower triangular ``L``; shapes as in :func:`solve_lower`."""
    return _backward(factor, _inverses(factor), right)


def _inverses(factor: Array) -> list[Array]:
    """The inverses of the triangles on the diagonal of ``L``, from the first rows to the last."""
    rows = (slice(start, start + _PANEL) for start in range(0, len(factor), _PANEL))
    return [np.asarray(np.linalg.inv(factor[r, r]), np.float64) for r in rows]


def _forward(factor: Array, inverses: Sequence[Array], right: Array) -> Array:
    solution = right.copy()
    for number, inverse in enumerate(inverses):
        start = number * _PANEL
        rows = slice(start, start + _PANEL)
        solution[rows] = inverse @ (solution[rows] - factor[rows, :start] @ solution[:start])
    return solution


def _backward(factor: Array, inverses: Sequence[Array], right: Array) -> Array:
    solution = right.copy()
    for number in reversed(range(len(inverses))):
        end = (number + 1) * _PANEL
        rows, below = slice(end - _PANEL, end), slice(end, None)
        rest = solution[rows] - factor[below, rows].T @ solution[below]
        solution[rows] = inverses[number].T @ rest
    return solution


def damping(covariance: Array, ridge: float) -> float:
    """``ρ``: the relative ridge times the mean diagonal of ``covariance`` (1 without signal).

    Below the least normal float32, sums of products made in float32 have underflowed and may be
    indefinite by any amount: that is no signal.
    """
    mean = float(np.trace(covariance)) / max(len(covariance), 1)
    return ridge * (mean if mean > UNDERFLOW else 1.0)


def _raised(matrix: Array, rho: float) -> Array:
    """``A + ρI``."""
    raised = matrix.copy()
    np.einsum("ii->i", raised)[:] += rho
    return raised


def shrunk(covariance: Array, count: int) -> Array:
    """A covariance pulled towards its diagonal as far as too few rows make it unreliable.

    ``(1 - a) C + a diag(C)`` with ``a = D / (D + n)``. From few rows, ``C`` has directions without
    variance that the next sample would not spare: inputs look as if others could replace them.

    Args:
        covariance: ``C``, [D, D].
        count: Rows ``n`` it was taken over.

    Source: Schäfer and Strimmer 2005, "A shrinkage approach to large-scale covariance matrix
    estimation" (target D); the weight here is the simplest one with the right limits.
    """
    share = len(covariance) / (len(covariance) + count)
    result = (1 - share) * covariance
    np.fill_diagonal(result, covariance.diagonal())
    return result


def approximated(covariance: Array, count: int) -> Array:
    """A covariance pulled towards its diagonal, less where few directions hold most of it.

    ``(1 - a) C + a diag(C)`` with the share of the oracle-approximating estimator,

        a = ((1 - 2/D) tr(C²) + tr(C)²) / ((n + 1 - 2/D) (tr(C²) - tr(C)²/D))

    Where :func:`shrunk` is cautious for any data, this one trusts data whose spectrum falls fast,
    as truncation to few directions needs.

    Args:
        covariance: ``C``, [D, D].
        count: Rows ``n`` it was taken over.

    Source: Chen, Wiesel, Eldar and Hero 2010, "Shrinkage algorithms for MMSE covariance
    estimation".
    """
    size = len(covariance)
    squares, trace = float(np.sum(covariance**2)), float(np.trace(covariance))
    spread = (count + 1 - 2 / size) * (squares - trace**2 / size)
    share = 1.0
    if spread > 0:
        share = min(((1 - 2 / size) * squares + trace**2) / spread, 1.0)
    result = (1 - share) * covariance
    np.fill_diagonal(result, covariance.diagonal())
    return result


def regress(moments: Moments, prior: Array, ridge: float) -> tuple[Array, Array]:
    """Fit ``y ≈ W x + b``, pulled towards ``prior``.

    ``W = (Xᵀ + ρ W₀)(C + ρ I)⁻¹``, the minimum of ``E‖y - W x - b‖² + ρ‖W - W₀‖²``, and
    ``b = ȳ - W x̄``.

    Args:
        moments: Moments of ``x`` and ``y``.
        prior: ``W₀``, [O, D].
        ridge: ``ρ`` relative to the mean diagonal of ``C``; above 0.

    Returns:
        ``W`` [O, D] and ``b`` [O].
    """
    rho = damping(moments.covariance, ridge)
    damped = _raised(moments.covariance, rho)
    weight = solve_positive_definite(damped, moments.cross + rho * prior.T).T
    return weight, moments.mean_y - weight @ moments.mean_x


def residual_energy(moments: Moments, weight: Array, bias: Array) -> Array:
    """``E(yᵢ - Wᵢx - bᵢ)²`` of each output, less the constant ``Var yᵢ``.

    ``Wᵢ C Wᵢᵀ - 2 Wᵢ X_{:,i} + (ȳᵢ - Wᵢ x̄ - bᵢ)²``. The variance of ``y`` is the same for all
    weights, so differences of this value are differences of the error.

    Args:
        moments: Moments of ``x`` and ``y``.
        weight: [O, D].
        bias: [O].

    Returns:
        One value per output, [O]; negative where the weights explain something.
    """
    quadratic = np.einsum("od,od->o", weight @ moments.covariance, weight)
    linear = np.einsum("od,do->o", weight, moments.cross)
    offset = moments.mean_y - weight @ moments.mean_x - bias
    return np.asarray(quadratic - 2 * linear + offset**2)


def choose_ridge(
    fit: Moments, held_out: Moments, prior: Array, candidates: Sequence[float]
) -> tuple[float, float]:
    """The ridge whose weights, fitted on ``fit``, serve ``held_out`` best.

    Args:
        fit: Moments to fit on.
        held_out: Moments of samples that ``fit`` has not seen.
        prior: ``W₀``, [O, D].
        candidates: Relative ridges to try.

    Returns:
        The best ridge, and the sum over outputs of :func:`residual_energy` it leaves on
        ``held_out``.
    """
    scores = [
        (float(residual_energy(held_out, *regress(fit, prior, ridge)).sum()), ridge)
        for ridge in candidates
    ]
    energy, ridge = min(scores)
    return ridge, energy


def eliminate(
    blocks: Sequence[Block],
    *,
    damp: float = 1e-3,
    keep: int = 1,
    order: Indices | None = None,
    chunk: int | None = None,
) -> Elimination:
    """Remove units one after another, always the cheapest, while the rest makes up for them.

    With ``P = (H + λI)⁻¹`` over the inputs still there, taking out the inputs ``c`` of a unit and
    updating the others optimally raises the error ``E‖(W - W')x‖²`` by

        ``tr(W_c [P_cc]⁻¹ W_cᵀ)``,   with   ``W ← W - W_c [P_cc]⁻¹ P_{c,:}``,
        ``P ← P - P_{:,c} [P_cc]⁻¹ P_{c,:}``

    The error of a unit is the sum over all consumers. Large groups are treated in chunks: the exact
    greedy choice is made among the cheapest units, and the matrices are brought up to date once per
    chunk by one block downdate.

    Args:
        blocks: The consumers; all have the same number of units.
        damp: ``λ`` relative to the mean diagonal of each ``H``; above 0.
        keep: Number of units to stop at.
        order: Remove in this order instead of choosing (to learn what another criterion's order
            costs).
        chunk: Units per chunk; 1 is the exact greedy algorithm. By default one part in 16 of those
            left, which is exact up to 31 units.

    Returns:
        The order and the accumulated error. The error includes the damping term and is therefore an
        upper bound.
    """
    states = [_State.of(block, damp) for block in blocks]
    alive = np.arange(len(blocks[0].columns), dtype=np.int64)
    removed: list[int] = []
    errors = [0.0]
    queue = None if order is None else list(order)
    while len(alive) > keep:
        size = min(chunk or max(1, len(alive) // _CHUNKS), len(alive) - keep)
        if queue is None:
            candidates = _cheapest(states, 2 * size if size > 1 else 1)
        else:
            wanted, queue = queue[:size], queue[size:]
            size = len(wanted)
            candidates = np.searchsorted(alive, wanted)
        if size == 0:
            break
        chosen, costs = _greedy([s.restrict(candidates) for s in states], size, queue is not None)
        places = candidates[chosen]
        removed.extend(int(u) for u in alive[places])
        errors.extend(errors[-1] + np.cumsum(costs))
        states = [s.without(places) for s in states]
        alive = np.delete(alive, places)
    return Elimination(np.array(removed, np.int64), np.array(errors))


@dataclass(frozen=True, slots=True)
class _State:
    """``W``, ``P`` and who owns the inputs still there (shapes as in :class:`Block`)."""

    weight: Array
    inverse: Array
    columns: Indices
    scale: float

    @classmethod
    def of(cls, block: Block, damp: float) -> _State:
        weight = np.asarray(block.weight, np.float64)
        if len(weight) > weight.shape[1]:  # only WᵀW enters the error: keep its square root
            weight = np.asarray(np.linalg.qr(weight, mode="r"), np.float64)
        identity = np.eye(len(block.moment))
        damped = _raised(block.moment, damping(block.moment, damp))
        inverse = solve_positive_definite(damped, identity)
        return cls(weight, (inverse + inverse.T) / 2, block.columns, block.scale)

    def costs(self) -> Array:
        """What removing each unit alone would cost, [units]."""
        own = self.inverse[self.columns[:, :, None], self.columns[:, None, :]]  # [U, m, m]
        parts = np.moveaxis(self.weight[:, self.columns], 0, 2)  # [U, m, O]
        return self.scale * np.asarray(np.einsum("umo,umo->u", parts, np.linalg.solve(own, parts)))

    def restrict(self, units: Indices) -> _State:
        """The state of ``units`` alone; exact, for neither cost nor downdate looks further."""
        own = self.columns[units]
        flat = own.ravel()
        places = np.arange(flat.size, dtype=np.int64).reshape(own.shape)
        return _State(self.weight[:, flat], self.inverse[np.ix_(flat, flat)], places, self.scale)

    def without(self, units: Indices) -> _State:
        """The state after removing ``units`` and updating what is left."""
        gone = self.columns[units].ravel()
        stays = np.ones(len(self.inverse), bool)
        stays[gone] = False
        kept = np.flatnonzero(stays)
        own, mixed = self.inverse[np.ix_(gone, gone)], self.inverse[np.ix_(gone, kept)]
        spread = np.linalg.solve(own, mixed)  # [P_cc]⁻¹ P_{c,:}
        inverse = self.inverse[np.ix_(kept, kept)]
        inverse -= mixed.T @ spread
        weight = self.weight[:, kept] - self.weight[:, gone] @ spread
        renumber = np.cumsum(stays, dtype=np.int64) - 1
        columns = renumber[np.delete(self.columns, units, axis=0)]
        return _State(weight, inverse, columns, self.scale)


def _total(states: Sequence[_State]) -> Array:
    return np.asarray(np.sum([s.costs() for s in states], axis=0))


def _cheapest(states: Sequence[_State], count: int) -> Indices:
    return np.sort(np.argsort(_total(states), kind="stable")[:count]).astype(np.int64)


def _greedy(states: Sequence[_State], count: int, ordered: bool) -> tuple[Indices, Array]:
    """Remove ``count`` units from small states: the cheapest first, or the first if ``ordered``."""
    left = np.arange(len(states[0].columns), dtype=np.int64)
    chosen, costs = [], []
    for _ in range(count):
        total = _total(states)
        place = 0 if ordered else int(np.argmin(total))
        chosen.append(int(left[place]))
        costs.append(max(float(total[place]), 0.0))
        if len(chosen) < count:
            states = [s.without(np.array([place])) for s in states]
            left = np.delete(left, place)
    return np.array(chosen, np.int64), np.array(costs)


def removal_energy(blocks: Sequence[Block], order: Indices) -> Array:
    """The error of removing units in ``order`` and leaving all other weights as they are.

    ``Σ_blocks tr(W_R H_RR W_Rᵀ)`` for ``R`` the inputs of the first ``k`` units.

    Args:
        blocks: The consumers.
        order: Units in the order of their removal, [n].

    Returns:
        One value for each ``k`` from 0 to n, [n + 1].
    """
    energies = np.zeros(len(order) + 1)
    for block in blocks:
        flat = block.columns[order].ravel()
        gram = (block.weight.T @ block.weight)[np.ix_(flat, flat)] * block.moment[
            np.ix_(flat, flat)
        ]
        corners = np.cumsum(np.cumsum(gram, axis=0), axis=1).diagonal()
        width = block.columns.shape[1]
        energies[1:] += block.scale * corners[width - 1 :: width]
    return energies


def best_fit(moment: Array, weight: Array, kept: Indices, *, damp: float = 1e-3) -> Array:
    """The weights on the inputs ``kept`` that best imitate ``weight`` on all inputs.

    ``W' = (W H_{:,S} + λ W_S)(H_SS + λI)⁻¹``: :func:`regress` on the target ``W x`` itself.

    Args:
        moment: ``H``, [D, D].
        weight: ``W``, [O, D].
        kept: ``S``, [s].
        damp: ``λ`` relative to the mean diagonal of ``H``.

    Returns:
        ``W'``, [O, s].
    """
    rho = damping(moment, damp)
    own = _raised(moment[np.ix_(kept, kept)], rho)
    right = moment[kept] @ weight.T + rho * weight[:, kept].T
    return solve_positive_definite(own, right).T
