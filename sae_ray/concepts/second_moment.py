"""The atomic inner product: the geometry in which activations have no preferred direction (arXiv 2509.20784)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sae_ray.concepts.inputs import as_numpy, unit
from sae_ray.sae.second_moment import RIDGE, whitening
from sae_ray.sae.second_moment import SecondMoment as SecondMoment

if TYPE_CHECKING:
    from jaxtyping import Float


def aip_cosines(
    vectors: Any, others: Any, second_moment: Any, ridge: float = RIDGE
) -> Float[np.ndarray, "vectors others"]:
    """Cosines of all pairs under the atomic inner product: u S vᵀ / √(u S uᵀ · v S vᵀ) (arXiv 2509.20784).

    Compare only what was measured with one second moment. Arguments and errors as in `whitening`; NaN for vectors of
    length zero.

    Args:
        vectors: `[vectors, d]`: decoder rows, class means, coordinates (the identity), …
        others: `[others, d]`.
    """
    matrix = whitening(as_numpy(second_moment), ridge).matrix
    return unit(as_numpy(vectors) @ matrix) @ unit(as_numpy(others) @ matrix).T


def mean_angle(rows: Any) -> float:
    """Mean angle of all pairs of rows in degrees; NaN for fewer than two. For some thousand rows: it forms the pairs.

    With whitened rows (`rows @ whitening(…).matrix`) it is the angle under the atomic inner product: near 90 degrees,
    whatever the rows are, if the second moment is theirs.
    """
    directions = unit(as_numpy(rows))
    above = np.triu_indices(len(directions), 1)
    cosines = (directions @ directions.T)[above]
    return float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).mean()) if len(cosines) else float("nan")
