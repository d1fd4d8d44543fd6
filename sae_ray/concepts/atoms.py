"""Atoms: how alike the directions of a dictionary are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae_ray.concepts.inputs import as_numpy, unit
from sae_ray.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

DOUBLE_ATOMS = 16_384
"""Up to so many atoms cosines are computed in double precision, beyond in single (within 1e-6) for its speed."""
_BLOCK = 2048


class Coherence(NamedTuple):
    """Per atom the largest absolute cosine with another atom."""

    coherence: Float[np.ndarray, " atoms"]
    """In [0, 1]; 0 for a single atom, NaN for an atom of length zero."""
    nearest: Int[np.ndarray, " atoms"]
    """The other atom, the lower one in ties; -1 where there is none."""
    pairs: Int[np.ndarray, " ks"]
    """Number of pairs of atoms by the largest k, from 0, for which their |cosine| is below 1 / (2 k - 1). The last
    place is that of all larger k, too."""


def coherence(atoms: Any, max_k: int = 0) -> Coherence:
    """Compares every atom with every other, in blocks: their Gram matrix is never formed.

    Takes atoms² x d / 2 multiplications. For the atomic inner product, give the atoms times `whitening(…).matrix`.

    Args:
        atoms: `[atoms, d]`, of any length.
        max_k: the last place of `pairs`; more than 0 takes about twice as long.

    Raises:
        UsageError: it is no matrix, or has values that are not finite.
    """
    import torch

    values = as_numpy(atoms)
    directions, n = _directions(values), len(values)
    largest = torch.full((n,), -1.0, dtype=directions.dtype)
    nearest = torch.full((n,), -1, dtype=torch.int64)
    pairs = torch.zeros(max_k + 1, dtype=torch.int64)
    pairs[0] = 0 if max_k else n * (n - 1) // 2
    bounds = torch.tensor([1 / (2 * k - 1) for k in range(max_k, 0, -1)], dtype=directions.dtype)

    def meet(atoms: slice, cosines: Any, first_other: int) -> None:
        # The others come in ascending order, so that ties stay with the lower.
        found, other = cosines.max(dim=1)
        better = found > largest[atoms]
        largest[atoms] = torch.where(better, found, largest[atoms])
        nearest[atoms] = torch.where(better, other + first_other, nearest[atoms])

    for start in range(0, n, _BLOCK):
        rows = slice(start, min(start + _BLOCK, n))
        for first in range(start, n, _BLOCK):
            columns = slice(first, min(first + _BLOCK, n))
            cosines = (directions[rows] @ directions[columns].T).abs_()
            if first == start:
                cosines.fill_diagonal_(-1)
            if max_k:
                counted = cosines[tuple(np.triu_indices(len(cosines), 1))] if first == start else cosines
                places = torch.bucketize(counted.flatten(), bounds, right=True)
                pairs += torch.bincount(places, minlength=max_k + 1).flip(0)
            meet(rows, cosines, first)
            if first > start:
                meet(columns, cosines.T, start)
    degenerate = ~values.any(axis=1)
    found = np.clip(largest.double().numpy(), 0, 1)
    found[degenerate] = np.nan
    return Coherence(found, np.where(degenerate, -1, nearest.numpy()), pairs.numpy())


def largest_cosines(atoms: Any, chosen: Int[np.ndarray, " chosen"]) -> Float[np.ndarray, " chosen"]:
    """`coherence(atoms).coherence` of some atoms: their largest absolute cosine with any other atom.

    Takes chosen x atoms x d multiplications. Arguments and errors as in `coherence`.
    """
    import torch

    values = as_numpy(atoms)
    directions, chosen = _directions(values), np.asarray(chosen)
    found = np.zeros(len(chosen))
    for start in range(0, len(chosen), _BLOCK):
        rows = chosen[start : start + _BLOCK]
        largest = torch.zeros(len(rows), dtype=directions.dtype)
        for first in range(0, len(values), _BLOCK):
            cosines = (directions[torch.from_numpy(rows)] @ directions[first : first + _BLOCK].T).abs_()
            own = np.flatnonzero((rows >= first) & (rows < first + _BLOCK))
            cosines[torch.from_numpy(own), torch.from_numpy(rows[own] - first)] = -1
            largest = torch.maximum(largest, cosines.amax(dim=1))
        found[start : start + len(rows)] = largest.double().numpy()
    found = np.clip(found, 0, 1)
    found[~values[chosen].any(axis=1)] = np.nan
    return found


def _directions(values: np.ndarray) -> Any:
    """Unit vectors as a torch tensor; zeros for those of length zero."""
    import torch

    if values.ndim != 2 or not np.isfinite(values).all():
        raise UsageError(f"atoms has the shape {values.shape}; give a matrix [atoms, d] of finite values")
    directions = torch.from_numpy(np.nan_to_num(unit(values)))
    return directions.to(torch.float64 if len(values) <= DOUBLE_ATOMS else torch.float32)
