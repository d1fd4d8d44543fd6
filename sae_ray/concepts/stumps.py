"""The best decision tree of depth 1 on each latent, in closed form from sparse columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_ray.concepts.inputs import SparseMatrix

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

GAIN_DECIMALS = 12
"""Gains that agree to so many decimals are tied; they are ratios of numbers of rows, so the rest is rounding."""


class Stumps(NamedTuple):
    """Trees of one split, the best one of each latent that can split the rows: best first, lower latents first in ties.

    A tree that may use all latents begins with the first one, and without its latent with the second one, since what a
    latent gains does not depend on the others.
    """

    latent: Int[np.ndarray, " stumps"]
    gain: Float[np.ndarray, " stumps"]
    """Decrease of the Gini impurity."""
    threshold: Float[np.ndarray, " stumps"]
    """Values up to it go left. Midway between two neighbouring values."""
    left: Int[np.ndarray, "stumps 2"]
    """Number of rows on the left with label 0 and 1."""
    right: Int[np.ndarray, "stumps 2"]

    @property
    def n_tied(self) -> int:
        """How many latents gain as much as the first one."""
        return int(np.count_nonzero(self.gain == self.gain[:1]))


def best_stumps(codes: Float[SparseMatrix, "rows latents"], labels: Bool[np.ndarray, " rows"]) -> Stumps:
    """Of one concept. Costs the sorting of the codes that are not 0. Of thresholds that gain as much, the lowest is
    taken, as by scikit-learn."""
    entries = codes.tocoo()
    n_rows, n_latents = codes.shape
    n_listed = np.bincount(entries.col, minlength=n_latents)
    shown_listed = np.bincount(entries.col, weights=labels[entries.row], minlength=n_latents).astype(np.int64)
    zeros = np.flatnonzero((n_listed > 0) & (n_listed < n_rows))  # without an entry there is nothing to split

    # The rows that are not listed stand as one entry of value 0.
    latent = np.concatenate([entries.col, zeros])
    value = np.concatenate([entries.data, np.zeros(len(zeros))])
    n = np.concatenate([np.ones(len(entries.col), np.int64), n_rows - n_listed[zeros]])
    shown = np.concatenate([labels[entries.row].astype(np.int64), labels.sum() - shown_listed[zeros]])
    order = np.lexsort((value, latent))
    latent, value, n, shown = latent[order], value[order], n[order], shown[order]

    # A split follows the last entry of each value, but for a latent's highest.
    split = np.flatnonzero((latent[1:] == latent[:-1]) & (value[1:] != value[:-1]))
    start = np.searchsorted(latent, latent[split])
    n_left, shown_left = (np.r_[0, column.cumsum()][[split + 1, start]] for column in (n, shown))
    n_left, shown_left = n_left[0] - n_left[1], shown_left[0] - shown_left[1]
    left = np.stack([n_left - shown_left, shown_left], axis=1)
    total = np.array([n_rows - labels.sum(), labels.sum()])
    purity = _purity(left) + _purity(total - left) - _purity(total[None])
    gain = np.round(purity / n_rows, GAIN_DECIMALS)

    ranked = np.lexsort((split, -gain, latent[split]))
    _, first = np.unique(latent[split][ranked], return_index=True)
    best = ranked[first]
    best = best[np.lexsort((latent[split[best]], -gain[best]))]
    low, high = value[split[best]], value[split[best] + 1]
    middle = low / 2 + high / 2
    return Stumps(
        latent=latent[split[best]],
        gain=gain[best],
        threshold=np.where(middle < high, middle, low),
        left=left[best],
        right=total - left[best],
    )


def _purity(counts: Int[np.ndarray, "nodes 2"]) -> Float[np.ndarray, " nodes"]:
    """1 less the Gini impurity, times the rows; the same bits whichever label is which."""
    squares = counts.astype(np.float64) ** 2
    return squares.sum(axis=1) / counts.sum(axis=1)
