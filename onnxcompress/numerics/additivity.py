"""How far losses that were measured one by one add up, learned from measurements of their sums.

Changing one part ``f`` of a network costs ``l_f`` when nothing else changes. Changed together,
parts cost more or less than the sum: some losses are repaired by what follows, others grow.
With one unknown factor for each part, the error of version ``p`` is

    ln e_p = a + ln Σ_f c_f l_pf + ε,    ln c_f ~ N(m_f, τ_f²),    ε ~ N(0, σ²)

with ``a`` free: what all versions have in common says nothing about which of them is best. The most
probable factors, after a few versions, tell which version to try next; factors drawn from what is
still possible try what is not known yet.

Source: Thompson 1933, "On the likelihood that one unknown probability exceeds another"; the
posterior is the Gaussian around the most probable factors (Laplace).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_NOISE = 0.15
"""``σ``: so far factors alone explain what versions leave."""
_FREE = 1e-6
"""Weight of the prior on ``a``."""
_STEPS = 50
_SETTLED = 1e-6


@dataclass(frozen=True, slots=True)
class Factors:
    """What is known about the factors.

    Attributes:
        logs: The most probable ``ln c``, [F].
        root: ``R`` with ``R Rᵀ`` the covariance of ``ln c``, [F, F].
    """

    logs: Array
    root: Array

    @property
    def likely(self) -> Array:
        """The most probable factors, [F]."""
        return np.asarray(np.exp(self.logs))

    def drawn(self, rng: np.random.Generator, width: Array) -> Array:
        """Factors at random, ``width`` times as far from the most probable ones as is usual.

        Args:
            rng: Source of randomness.
            width: Of each factor, [F]; 1 draws from the posterior.

        Returns:
            [F].
        """
        step = width * (self.root @ rng.normal(size=len(self.logs)))
        return np.asarray(np.exp(self.logs + step))


def learned(losses: Array, errors: Array, prior: Array, spread: Array) -> Factors:
    """The factors that explain errors best, pulled towards those believed before.

    Args:
        losses: ``l``, [P, F]; a version without any loss says nothing and is left out.
        errors: ``e``, [P].
        prior: ``m``, [F].
        spread: ``τ``, [F]: how much is believed to be usual either way.
    """
    tells = (losses.sum(axis=1) > 0) & (errors > 0)
    parts, wanted = losses[tells], np.log(errors[tells])
    pull = np.append((_NOISE / spread) ** 2, _FREE)
    believed = np.append(prior, 0.0)
    found = believed.copy()
    if len(parts):
        found[-1] = np.median(wanted - np.log(parts @ np.exp(prior)))
    curvature = np.diag(pull)
    for _ in range(_STEPS):  # Gauss-Newton
        shares = parts * np.exp(found[:-1])
        sums = shares.sum(axis=1)
        slopes = np.column_stack([shares / sums[:, np.newaxis], np.ones(len(parts))])
        left = wanted - np.log(sums) - found[-1]
        curvature = slopes.T @ slopes + np.diag(pull)
        step = np.linalg.solve(curvature, slopes.T @ left - pull * (found - believed))
        found = found + np.clip(step, -1.0, 1.0)
        if np.abs(step).max(initial=0.0) < _SETTLED:
            break
    covariance = _NOISE**2 * np.linalg.inv(curvature)[:-1, :-1]
    return Factors(found[:-1], np.asarray(np.linalg.cholesky(covariance), np.float64))
