"""Balanced steering: a push along a latent's decoder row, as long as the token lets it be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def pushed(
    x: Float[Tensor, "tokens d_in"],
    present: Float[Tensor, " tokens"],
    direction: Float[Tensor, " d_in"],
    strength: float,
    entries: int | None = None,
) -> Float[Tensor, "tokens d_in"]:
    """What is added to tokens: `strength * w * |x| / (|direction| + 1e-8) * direction` (Härle et al. 2025, arXiv
    2506.19382).

    The weight w is what the strength leaves to do: how far the concept is absent from the token for a strength above 0,
    how far it is present for others.

    Args:
        present: how far the concept is in each token, from 0 to 1.
        entries: the direction is cut to as many of its largest entries, its length stays that of the whole, and w is 1.
    """
    length = torch.linalg.vector_norm(x, dim=1) / (torch.linalg.vector_norm(direction) + 1e-8)
    if entries is None:
        weight = present if strength <= 0 else 1 - present
        return (strength * weight * length).unsqueeze(1) * direction
    largest = direction.abs().topk(entries).indices
    cut = torch.zeros_like(direction).index_copy_(0, largest, direction[largest])
    return (strength * length).unsqueeze(1) * cut
