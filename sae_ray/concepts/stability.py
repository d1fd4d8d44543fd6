"""Stability: whether two SAEs that differ in their seeds have the same latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae_ray.concepts.inputs import as_numpy, unit
from sae_ray.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

EXACT = 4096
"""Latents up to which the best assignment is found: 128 MB, and a time that grows with their cube."""
_BLOCK = 2048
_LEAST_SHARE = 0.01
"""A round of mutual neighbours that pairs a smaller share of the latents is the last one."""


class Matching(NamedTuple):
    """What `matched_cosine` finds."""

    mean: float
    """Mean cosine of the pairs."""
    cosine: Float[np.ndarray, " latents"]
    """Of each latent of the first dictionary and its partner; NaN without one."""
    partner: Int[np.ndarray, " latents"]
    """Number of a latent of the second dictionary, each at most once; -1 where the second has too few."""
    exact: bool
    """Whether the assignment is the one with the largest mean."""


def matched_cosine(decoder: Any, other: Any) -> Matching:
    """Pairs the latents of two dictionaries one to one so that the mean cosine is largest (the Hungarian method; 1 less
    the mean of `cosine_hungarian_loss` in KempnerInstitute/overcomplete at a1781af).

    Cosines keep their sign: a latent and its negative are different. Compare SAEs whose start *and* order of data
    differ, and print what one dictionary gets with random directions beside it: with many latents in few dimensions
    these match well, too.

    With more than 4096 latents on a side, mutual nearest neighbours among those left are paired first, in rounds, until
    4096 are left. Such a matching is one that takes the largest cosine first; its mean is at most that
    of the best. Cosines are then computed in single precision and in blocks, so that memory grows with latents only.

    Args:
        decoder: `W_dec [latents, d]`, of any length but 0: leave out dead latents.
        other: `[others, d]`.

    Raises:
        UsageError: the widths differ, or a row is 0 or not finite.
    """
    first, second = _directions(decoder, "decoder"), _directions(other, "other")
    if first.shape[1] != second.shape[1]:
        raise UsageError(
            f"decoder has width {first.shape[1]} and other has {second.shape[1]}; compare SAEs of one site"
        )
    partner = np.full(len(first), -1)
    free, others = np.arange(len(first)), np.arange(len(second))
    exact = max(len(free), len(others)) <= EXACT
    progress = 1.0
    while max(len(free), len(others)) > EXACT and min(len(free), len(others)) and progress >= _LEAST_SHARE:
        mine, theirs = _mutual(first[free], second[others])
        progress = len(mine) / min(len(free), len(others))
        partner[free[mine]] = others[theirs]
        free, others = np.delete(free, mine), np.delete(others, theirs)
    # One piece, unless hardly anything but ties is left, which any piece pairs as well as another.
    for start in range(0, min(len(free), len(others)), EXACT):
        rows, columns = free[start : start + EXACT], others[start : start + EXACT]
        mine, theirs = _assigned(first[rows], second[columns])
        partner[rows[mine]] = columns[theirs]

    cosine = np.full(len(first), np.nan)
    paired = partner >= 0
    cosine[paired] = np.einsum("nd,nd->n", first[paired], second[partner[paired]])
    mean = float(cosine[paired].mean()) if paired.any() else float("nan")
    return Matching(mean, cosine, partner, exact)


def _directions(decoder: Any, field: str) -> Float[np.ndarray, "latents d"]:
    rows = as_numpy(decoder)
    if rows.ndim != 2 or not np.isfinite(rows).all() or not rows.any(axis=1).all():
        raise UsageError(
            f"{field} has the shape {rows.shape}; give a matrix [latents, d] of finite rows that are not 0, without "
            "dead latents"
        )
    return unit(rows)


def _assigned(
    first: Float[np.ndarray, "some d"], second: Float[np.ndarray, "others d"]
) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(first @ second.T, maximize=True)


def _mutual(
    first: Float[np.ndarray, "some d"], second: Float[np.ndarray, "others d"]
) -> tuple[Int[np.ndarray, " pairs"], Int[np.ndarray, " pairs"]]:
    """Pairs of which each is the nearest of the other, the lower number in ties."""
    import torch

    rows, columns = (torch.from_numpy(side).float() for side in (first, second))
    forth = torch.empty(len(rows), dtype=torch.int64)
    best, back = torch.full((len(columns),), -2.0), torch.zeros(len(columns), dtype=torch.int64)
    for start in range(0, len(rows), _BLOCK):
        cosines = rows[start : start + _BLOCK] @ columns.T
        forth[start : start + _BLOCK] = cosines.argmax(dim=1)
        found, place = cosines.max(dim=0)
        better = found > best
        best, back = torch.where(better, found, best), torch.where(better, place + start, back)
    mine = torch.nonzero(back[forth] == torch.arange(len(rows)))[:, 0]
    return mine.numpy(), forth[mine].numpy()
