"""The second moment of activations, and what whitens them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae_ray.errors import SaeRayError, UsageError, check

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Float

    from sae_ray.store.activations import ActivationStore

RIDGE = 1e-6
"""What is added to every eigenvalue of the second moment, in parts of their mean."""
ROWS_PER_DIMENSION = 20
"""With fewer rows the smallest eigenvalues, which count most in the inverse, are noise."""
MOMENT_ROWS = 2**17
"""Activations that the second moment is of, at most, evenly spread over the store."""


class SecondMoment:
    """Sums of x and x xᵀ over rows, float64. Parts merge: blocks of a fixed order give the same bits on any cluster."""

    def __init__(self, d: int):
        """Starts without rows."""
        self.n_rows = 0
        self.total: Float[np.ndarray, " d"] = np.zeros(d)
        self.products: Float[np.ndarray, "d d"] = np.zeros((d, d))

    def add(self, rows: Any) -> None:
        """Adds a block of rows `[rows, d]`: an array, or a tensor on the CPU."""
        values = np.asarray(rows).astype(np.float64, copy=False)
        self.n_rows += len(values)
        self.total += values.sum(axis=0)
        self.products += values.T @ values

    @classmethod
    def merged(cls, parts: Iterable[SecondMoment]) -> SecondMoment:
        """Of all rows, from parts of one width."""
        first, *rest = parts
        whole = cls(len(first.total))
        for part in (first, *rest):
            whole.n_rows += part.n_rows
            whole.total += part.total
            whole.products += part.products
        return whole

    @classmethod
    def of_store(cls, store: ActivationStore) -> SecondMoment:
        """Of at most about `MOMENT_ROWS` activations of a store, evenly spread. All of it is read."""
        stride = -(-store.n_rows // MOMENT_ROWS) or 1
        moment, n_rows = cls(store.d), 0
        for number in store.parts:
            for images in store.pieces(number):
                rows = store.read(number, images)[2]
                moment.add(rows[-n_rows % stride :: stride])
                n_rows += len(rows)
        return moment

    @property
    def variances(self) -> Float[np.ndarray, " d"]:
        """Of every coordinate."""
        n = max(1, self.n_rows)
        return np.maximum(np.diag(self.products) / n - np.square(self.total / n), 0.0)

    def matrix(self, centred: bool = False) -> Float[np.ndarray, "d d"]:
        """E[x xᵀ], or with `centred` the covariance.

        Centring is not what the paper does, and it hurts where codes are not negative: a fixed number of active atoms
        then looks like a constraint, and the atoms no longer look orthogonal.

        Raises:
            SaeRayError: there are fewer than 20 rows per dimension.
        """
        d = len(self.total)
        if self.n_rows < ROWS_PER_DIMENSION * d:
            raise SaeRayError(
                f"the second moment has {self.n_rows} rows for activations of width {d}; its inverse needs "
                f"{ROWS_PER_DIMENSION * d} or more: extract more images or more tokens of each"
            )
        mean = self.total / self.n_rows
        return self.products / self.n_rows - (np.outer(mean, mean) if centred else 0)


class Whitening(NamedTuple):
    """The square root of the inverse of a second moment with its ridge."""

    matrix: Float[np.ndarray, "d d"]
    """S^½, symmetric, where S = (E[x xᵀ] + ridge)⁻¹."""
    ridge: float
    """What was added to the eigenvalues."""
    condition: float
    """The largest eigenvalue by the smallest, the ridge included. If it is as large as 1 / 1e-6, results depend on the
    ridge: compare them with those for ten times the ridge and for a tenth."""


def whitening(second_moment: Any, ridge: float = RIDGE) -> Whitening:
    """What turns the atomic inner product into the ordinary one: u S vᵀ = (u S^½) · (v S^½).

    Args:
        second_moment: `[d, d]`, of the activations of the model; never of the dictionary that is judged, which becomes
            orthonormal by construction if it has at most d atoms.
        ridge: in parts of the mean eigenvalue.

    Raises:
        UsageError: the matrix is not square and finite, the ridge is negative, or an eigenvalue with the ridge is not
            above 0.
    """
    values = np.asarray(second_moment, np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not np.isfinite(values).all():
        raise UsageError(f"second_moment has the shape {values.shape}; give a square matrix [d, d] of finite values")
    check(ridge >= 0, "ridge", ridge, "make it 0 or more")
    eigenvalues, vectors = np.linalg.eigh(values)
    added = ridge * np.trace(values) / len(values)
    shifted = eigenvalues + added
    check(shifted[0] > 0, "ridge", ridge, "make it larger: the second moment has directions without any variance")
    matrix = (vectors / np.sqrt(shifted)) @ vectors.T
    return Whitening(matrix, float(added), float(shifted[-1] / shifted[0]))
