"""Triangular factors of matrices that are positive definite but for rounding."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_ROUNDING = 1e-3
"""Least eigenvalues further below 0 than this share of the largest come from no rounding."""

_MARGIN = 2.0
"""How far beyond its least eigenvalue an indefinite matrix is lifted."""


def cholesky(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``L``, lower triangular, with ``L Lᵀ = A``, or ``A + μI`` where ``A`` is indefinite.

    Sums of products made in float32 are off by about 1e-7 of the largest eigenvalue, which may
    exceed the least eigenvalue and the ridge on it. ``μ`` is then twice the magnitude of the least
    eigenvalue, plus the rounding of float64: within that noise, and nothing where ``A`` factors.

    Args:
        matrix: ``A``, symmetric, [..., D, D].

    Returns:
        ``L``, [..., D, D].

    Raises:
        numpy.linalg.LinAlgError: If ``A`` is not finite, or indefinite beyond rounding.
    """
    try:
        return np.asarray(np.linalg.cholesky(matrix), np.float64)
    except np.linalg.LinAlgError:
        if not np.isfinite(matrix).all():
            raise
    size = matrix.shape[-1]
    values = np.linalg.eigvalsh(matrix)
    largest = np.abs(values).max(axis=-1, initial=0.0)
    noise = size * np.finfo(np.float64).eps * largest + np.finfo(np.float64).tiny
    if (values[..., 0] < -_ROUNDING * largest).any():
        raise np.linalg.LinAlgError("the matrix is not positive definite")
    lift = np.where(values[..., 0] < noise, _MARGIN * np.abs(values[..., 0]) + noise, 0.0)
    lifted = matrix + lift[..., None, None] * np.eye(size)
    return np.asarray(np.linalg.cholesky(lifted), np.float64)
