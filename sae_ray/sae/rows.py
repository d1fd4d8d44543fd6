"""Rows brought to mean 0 and standard deviation 1, as some architectures read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

_EPSILON = 1e-5
"""Added to the standard deviation that is divided by."""


class StandardRows(NamedTuple):
    """Rows, and what they were."""

    values: Float[Tensor, "... d"]
    mean: Float[Tensor, "... 1"]
    spread: Float[Tensor, "... 1"]
    """The standard deviation, with d - 1 in the denominator."""


def standardised(x: Float[Tensor, "... d"]) -> StandardRows:
    """`(x - mean) / (spread + 1e-5)` of each row, as the reference of G-SAE has it (arXiv 2506.19382)."""
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    spread = centred.norm(dim=-1, keepdim=True) / max(1, x.shape[-1] - 1) ** 0.5
    return StandardRows(centred / (spread + _EPSILON), mean, spread)
