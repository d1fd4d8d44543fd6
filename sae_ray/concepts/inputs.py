"""What a notebook or a stage hands over, torch or numpy, in the form that the functions of this room compute with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sae_ray.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float

SparseMatrix = Any
"""A matrix of scipy.sparse, whose own types do not tell its shape."""


def as_numpy(values: Any) -> np.ndarray:
    """A torch tensor, a numpy array or nested lists as a numpy array; floats become float64."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
        values = values.numpy()
    values = np.asanyarray(values)  # a masked array keeps its mask
    return values.astype(np.float64) if values.dtype.kind == "f" else values


def sparse_codes(codes: Any) -> Float[SparseMatrix, "rows latents"]:
    """Codes as a CSR matrix of float64 with sorted indices.

    Args:
        codes: one value per row and latent: any matrix of scipy.sparse, a numpy array or a torch tensor, dense,
            COO or CSR.

    Raises:
        UsageError: it is no matrix, or has values that are not finite.
    """
    from scipy.sparse import coo_array, csr_array, issparse

    if getattr(codes, "is_sparse", False) or getattr(codes, "is_sparse_csr", False):  # of torch
        listed = codes.detach().cpu().to_sparse_coo().coalesce()
        codes = coo_array((listed.values().double().numpy(), tuple(listed.indices().numpy())), shape=tuple(codes.shape))
    matrix = codes if issparse(codes) else as_numpy(codes)
    if matrix.ndim != 2:
        raise UsageError(f"codes has the shape {matrix.shape}; give a matrix with one row per image")
    found = csr_array(matrix, dtype=np.float64)
    if not found.has_canonical_format:
        found = found.copy()  # it may share its arrays with the given matrix
        found.sum_duplicates()
    if not np.isfinite(found.data).all():
        raise UsageError("codes must be finite; remove the rows with NaN or inf")
    return found


def unit(vectors: Float[np.ndarray, "rows d"]) -> Float[np.ndarray, "rows d"]:
    """Rows with length 1, as float64; NaN for rows of length zero."""
    with np.errstate(invalid="ignore"):
        return vectors / np.linalg.norm(vectors.astype(np.float64, copy=False), axis=1, keepdims=True)
