"""Exploration bonuses on linear features: how little the pairs seen so far say about a response."""

from __future__ import annotations

import math

import numpy as np

from alignbench.errors import ConfigError, DataError


class Precision:
    """The inverse of `ridge * I + sum d d^T` over feature differences d, kept up to date one difference at a time.

    A preference says something about the *difference* of two responses' scores, so in a linear model of the score
    the differences of their features are the regressors, this matrix is the inverse of the regularised design, and
    `norm(phi)` is the width of the score's confidence interval at phi, up to a factor.

    Source: online PD-DPO (arXiv 2510.05703), Sigma_k and the bonus alpha ||phi||_{Sigma_k^{-1}}; the update is
        Sherman and Morrison's formula for a rank-one change.

    Args:
        dimension: d, length of a feature vector, >= 1.
        ridge: gamma > 0, in squared units of the features; it bounds the bonus by ||phi|| / sqrt(ridge).

    Raises:
        ConfigError: the dimension is below 1, or the ridge is not a finite number > 0.
    """

    def __init__(self, dimension: int, ridge: float) -> None:
        if dimension < 1:
            raise ConfigError(f"dimension is {dimension}", where="Precision", mend="at least 1")
        if not (math.isfinite(ridge) and ridge > 0):
            raise ConfigError(f"ridge is {ridge}", where="Precision", mend="a finite number > 0; without it no inverse")
        self._inverse = np.eye(dimension) / ridge
        self._count = 0

    @property
    def inverse(self) -> np.ndarray:
        """Sigma^{-1}, a copy, float64 (d, d), symmetric and positive definite."""
        return self._inverse.copy()

    @property
    def count(self) -> int:
        """Differences added so far."""
        return self._count

    def add(self, difference: np.ndarray) -> None:
        """Add one feature difference of shape (d,); its sign does not matter.

        Raises:
            ConfigError: another shape.
            DataError: a value that is not finite; nothing is added.
        """
        self.add_all(self._checked(difference, 1)[None, :])

    def add_all(self, differences: np.ndarray) -> None:
        """Add feature differences of shape (n, d), one rank-one update each.

        Raises:
            ConfigError: another shape.
            DataError: a value that is not finite; none of them is added.
        """
        for difference in self._checked(differences, 2):
            shrunk = self._inverse @ difference
            # outer(v, v) is symmetric to the last bit, so the matrix stays so whatever the number of updates
            self._inverse -= np.outer(shrunk, shrunk) / (1.0 + difference @ shrunk)
            self._count += 1

    def norm(self, features: np.ndarray) -> np.ndarray:
        """`sqrt(phi^T Sigma^{-1} phi)` of every row of `features` (n, d): float64 (n,), without unit, >= 0.

        Raises:
            ConfigError: another shape.
            DataError: a value that is not finite.
        """
        phi = self._checked(features, 2)
        # rounding can leave a tiny negative number where phi is all but zero
        return np.sqrt(np.maximum(np.einsum("nd,nd->n", phi @ self._inverse, phi), 0.0))

    def _checked(self, values: np.ndarray, axes: int) -> np.ndarray:
        values = np.asarray(values, dtype=np.float64)
        if values.ndim != axes or values.shape[-1] != len(self._inverse):
            wanted = f"({'n, ' if axes == 2 else ''}{len(self._inverse)})"
            raise ConfigError(f"features of shape {values.shape}", where="Precision", mend=f"pass the shape {wanted}")
        if not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).sum())
            raise DataError(f"{bad} feature value(s) are not finite", where="Precision", mend="mend the features")
        return values
