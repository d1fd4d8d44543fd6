"""Correlation of latents with concepts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sae_ray.concepts.statistics import ClassStats

if TYPE_CHECKING:
    from jaxtyping import Float

CONSTANT = 1e-13
"""A latent whose values differ by less than this share of their mean is constant but for rounding."""


def label_correlation(codes: Any, labels: Any) -> Float[np.ndarray, "neurons concepts"]:
    """Pearson's correlation of each neuron's values with each concept's labels (0 or 1), in [-1, 1].

    As in the analysis of MedSAE (arXiv 2510.26411), over the images whose label is known. To work in blocks of images,
    or of neurons, collect `ClassStats` and call `correlation`.

    Args:
        codes: `[rows, neurons]`: torch, numpy or scipy.sparse.
        labels: `[rows, concepts]` of 0, 1 and NaN for unknown; `[rows]` classes (negative for none); or `Labels`.

    Returns:
        NaN for a constant neuron, and for a concept that no image shows or all show.

    Raises:
        UsageError: the two have different numbers of rows, or values that are not finite, or no labels.
    """
    return correlation(ClassStats.of(codes, labels))


def correlation(stats: ClassStats) -> Float[np.ndarray, "latents concepts"]:
    """As `label_correlation`, of the latents of the statistics."""
    n, shown = stats.n_images, stats.n_positive
    found = stats.class_total - shown * stats.mean
    constant = stats.squares <= n * (CONSTANT * stats.mean) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        found /= np.where(constant, np.nan, np.sqrt(stats.squares))
        found /= np.sqrt(shown * (1 - shown / n))
    found[:, (shown == 0) | (shown == n)] = np.nan
    return np.clip(found, -1, 1, out=found)
