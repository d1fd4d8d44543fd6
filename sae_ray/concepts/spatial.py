"""Whether a latent's values on the patches of an image hang together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sae_ray.concepts.inputs import as_numpy
from sae_ray.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float


def morans_i(maps: Any) -> Float[np.ndarray, "..."]:
    """Moran's I of each map (Moran 1950, "Notes on continuous stochastic phenomena", Biometrika 37).

    The correlation of patches with their neighbours above, below, left and right: towards 1 where the latent marks
    regions, `−1 / (patches − 1)` on average where it is thrown at random, below that where neighbours differ.

    Args:
        maps: `[..., height, width]`: a latent's value on each patch. Maps are independent.

    Returns:
        `[...]`; NaN for a map that is the same everywhere.

    Raises:
        UsageError: there is no second patch.
    """
    values = as_numpy(maps).astype(np.float64)
    if values.ndim < 2 or values.shape[-1] * values.shape[-2] < 2:
        raise UsageError(f"maps has the shape {values.shape}; give [..., height, width] with at least two patches")
    height, width = values.shape[-2:]
    away = values - values.mean(axis=(-2, -1), keepdims=True)
    products = (away[..., 1:, :] * away[..., :-1, :]).sum(axis=(-2, -1)) + (away[..., 1:] * away[..., :-1]).sum(
        axis=(-2, -1)
    )
    n_pairs = (height - 1) * width + height * (width - 1)
    spread = (away**2).mean(axis=(-2, -1))
    constant = values.max(axis=(-2, -1)) == values.min(axis=(-2, -1))
    return np.where(constant, np.nan, products / n_pairs / np.where(constant, 1, spread))
