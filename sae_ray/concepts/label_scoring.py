"""What labels say of each latent, and of an SAE as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_ray.concepts.correlations import correlation
from sae_ray.concepts.entropies import MIN_FIRING, entropy, entropy_of
from sae_ray.concepts.statistics import ClassStats

if TYPE_CHECKING:
    from jaxtyping import Float, Int

FOUND = 0.5
"""A concept is found if a latent correlates with it at least as much."""


class LabelScores(NamedTuple):
    """One value per latent. NaN (-1 for `best_concept`) where it fires on fewer than `MIN_FIRING` labelled images."""

    n_firing: Int[np.ndarray, " latents"]
    """Labelled images on which it is above 0."""
    best_concept: Int[np.ndarray, " latents"]
    """The concept that it correlates with most, by its place; the first one in a tie."""
    best_rho: Float[np.ndarray, " latents"]
    second_rho: Float[np.ndarray, " latents"]
    """With the concept after that one; NaN if there is only one."""
    entropy_mass: Float[np.ndarray, " latents"]
    entropy_balanced: Float[np.ndarray, " latents"]
    entropy_rho: Float[np.ndarray, " latents"]

    @property
    def gap(self) -> Float[np.ndarray, " latents"]:
        """How much the best concept is ahead of the second."""
        return self.best_rho - self.second_rho

    @classmethod
    def joined(cls, blocks: Sequence[LabelScores]) -> LabelScores:
        """Of consecutive ranges of latents, as those of all."""
        return cls(*map(np.concatenate, zip(*blocks, strict=True)))


class LabelSummary(NamedTuple):
    """An SAE by the labels of images; the same numbers for shuffled labels say what they are worth by chance."""

    n_live: int
    """Latents that fire on a labelled image."""
    n_measured: int
    """Latents that fire on at least `MIN_FIRING`."""
    share_rho_30: float
    """Share of the live latents that correlate with a concept by at least .3; NaN without any."""
    share_rho_50: float
    n_found_concepts: int
    """Concepts that are the best one of a latent which correlates with them by at least .5."""
    max_rho: float
    """The largest of all correlations. By chance it is about √(2 ln latents / images), not 0."""
    mean_entropy_balanced: float
    mean_entropy_rho: float
    """For raw neurons too, whose values below 0 rule out the other entropies."""


def label_scores(stats: ClassStats) -> LabelScores:
    """The scores of the latents of a statistic. Memory: two further arrays [latents, concepts] at a time."""
    rho = correlation(stats)
    rho[np.isnan(rho) | (stats.n_firing < MIN_FIRING)] = -np.inf
    entropy_rho = entropy_of(np.maximum(rho, 0), int(np.count_nonzero(stats.n_positive)))
    places = np.arange(len(rho))
    if rho.shape[1]:
        best = rho.argmax(axis=1)
        best_rho = rho[places, best]
        rho[places, best] = -np.inf
        second_rho = rho.max(axis=1)
    else:
        best, best_rho, second_rho = places, np.full(len(rho), -np.inf), np.full(len(rho), -np.inf)
    return LabelScores(
        n_firing=stats.n_firing.max(axis=1),
        best_concept=np.where(np.isfinite(best_rho), best, -1),
        best_rho=_null(best_rho),
        second_rho=_null(second_rho),
        entropy_mass=entropy(stats, "mass"),
        entropy_balanced=entropy(stats, "balanced"),
        entropy_rho=entropy_rho,
    )


def label_summary(scores: LabelScores) -> LabelSummary:
    """Of all latents of an SAE, or of raw neurons. Means are over the latents that have a value."""
    n_live = int(np.count_nonzero(scores.n_firing))
    rho = scores.best_rho
    return LabelSummary(
        n_live=n_live,
        n_measured=int(np.count_nonzero(~np.isnan(rho))),
        share_rho_30=int(np.count_nonzero(rho >= 0.3)) / n_live if n_live else np.nan,
        share_rho_50=int(np.count_nonzero(rho >= FOUND)) / n_live if n_live else np.nan,
        n_found_concepts=len(np.unique(scores.best_concept[rho >= FOUND])),
        max_rho=_mean(rho, np.max),
        mean_entropy_balanced=_mean(scores.entropy_balanced),
        mean_entropy_rho=_mean(scores.entropy_rho),
    )


def _null(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _mean(values: np.ndarray, of=np.mean) -> float:
    known = values[~np.isnan(values)]
    return float(of(known)) if len(known) else np.nan
