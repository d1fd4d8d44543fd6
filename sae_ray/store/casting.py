"""From what an encoder computes to what is stored, on the device of the vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sae_ray.errors import SaeRayError
from sae_ray.store.activations import Rows

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class Cast(NamedTuple):
    """Vectors in the stored dtype, and what tells whether they are good."""

    stored: Float[Tensor, "rows d"]
    norm: Float[Tensor, " rows"]
    """float64; not finite where a stored value is not."""
    largest: Float[Tensor, " rows"]
    """The largest absolute value before the cast; not finite where a value is not."""


def cast(vectors: Float[Tensor, "rows d"], store_dtype: str) -> Cast:
    """Casts vectors. A row at a time is reduced, so that the result does not depend on how many come together."""
    stored = vectors.to(getattr(torch, store_dtype))
    norm = torch.linalg.vector_norm(stored, dim=1, dtype=torch.float64)
    return Cast(stored, norm, torch.linalg.vector_norm(vectors, ord=torch.inf, dim=1))


def checked_rows(
    image_index: Int[np.ndarray, " rows"], token: Int[np.ndarray, " rows"], vectors: Cast, store_dtype: str
) -> Rows:
    """The rows of a part.

    Args:
        vectors: on the CPU.

    Raises:
        SaeRayError: a value is not finite, or does not fit into `store_dtype`.
    """
    if not torch.isfinite(vectors.largest).all():
        raise SaeRayError('the encoder returned a value that is not finite; try encoder.dtype = "float32"')
    if not torch.isfinite(vectors.norm).all():
        raise SaeRayError(
            f"an activation of {vectors.largest.max().item():.3g} does not fit into extraction.store_dtype = "
            f'"{store_dtype}"; set store_dtype = "float32"'
        )
    return Rows(image_index, token, vectors.stored.numpy(), np.square(vectors.norm.numpy()))


def stored_rows(
    image_index: Int[np.ndarray, " rows"],
    token: Int[np.ndarray, " rows"],
    activation: Float[np.ndarray, "rows d"],
    store_dtype: str,
) -> Rows:
    """The rows of a part from vectors in memory. Raises as `checked_rows`."""
    return checked_rows(image_index, token, cast(torch.from_numpy(activation), store_dtype), store_dtype)
