"""How a latent's activation is spread over concepts: 0 for one concept, 1 for all alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, assert_never, get_args

import numpy as np

from sae_ray.concepts.correlations import correlation
from sae_ray.concepts.statistics import ClassStats
from sae_ray.errors import check

if TYPE_CHECKING:
    from jaxtyping import Float

Variant = Literal["mass", "balanced", "rho"]
MIN_FIRING = 10
"""A latent that fires on fewer labelled images says too little of the concepts."""


def label_entropy(
    codes: Any, labels: Any, *, variant: Variant = "balanced", min_firing: int = MIN_FIRING
) -> Float[np.ndarray, " neurons"]:
    """Entropy of each neuron's activation over the concepts, divided by the logarithm of their number: in [0, 1].

    To work in blocks of images, or of neurons, collect `ClassStats` and call `entropy`.

    Args:
        codes: `[rows, neurons]`: torch, numpy or scipy.sparse.
        labels: `[rows, concepts]` of 0, 1 and NaN for unknown; `[rows]` classes (negative for none); or `Labels`.
        variant: The distribution over concepts. `mass`: the share of the activation that falls on the images of each
            concept, as in PatchSAE (arXiv 2412.05276), which does not divide and looks at top images only. A neuron
            that ignores the concepts has the entropy of their frequencies. `balanced`: the same with the mean over the
            concept's images in place of the sum, so that such a neuron has 1. `rho`: the correlations above 0.
        min_firing: With fewer labelled images above 0 a neuron's entropy is NaN.

    Returns:
        NaN also for a neuron whose sum over the images of a concept is below 0 (but for `rho`), and where images show
        fewer than two concepts. The number of concepts is that of concepts which images show.

    Raises:
        UsageError: as in `label_correlation`, or there is no such variant.
    """
    return entropy(ClassStats.of(codes, labels), variant, min_firing)


def entropy(
    stats: ClassStats, variant: Variant = "balanced", min_firing: int = MIN_FIRING
) -> Float[np.ndarray, " latents"]:
    """As `label_entropy`, of the latents of the statistics."""
    check(variant in get_args(Variant), "variant", variant, f"it must be one of {', '.join(get_args(Variant))}")
    match variant:
        case "mass":
            weight = stats.class_total
        case "balanced":
            weight = stats.class_total / np.maximum(stats.n_positive, 1)
        case "rho":
            weight = np.maximum(np.nan_to_num(correlation(stats)), 0)
        case _:
            assert_never(variant)
    found = entropy_of(weight, int(np.count_nonzero(stats.n_positive)))
    return np.where(stats.n_firing.max(axis=1) >= min_firing, found, np.nan)


def entropy_of(weight: Float[np.ndarray, "rows concepts"], n_concepts: int) -> Float[np.ndarray, " rows"]:
    """Entropy of the shares of weights in their row's sum, divided by the logarithm of a number of concepts.

    NaN for a row without a weight above 0, or with one below. Costs the weights that are not 0.
    """
    row, concept = np.nonzero(weight)
    value = weight[row, concept]
    total = np.bincount(row, weights=value, minlength=len(weight))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = value / total[row]
        found = -np.bincount(row, weights=share * np.log(share), minlength=len(weight)) / np.log(n_concepts)
    defined = (total > 0) & ~(np.bincount(row, weights=value < 0, minlength=len(weight)) > 0)
    return np.where(defined, np.clip(found, 0, 1), np.nan)
