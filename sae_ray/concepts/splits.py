"""Which images a score is fitted on, which ones it is judged on, and what it is compared with.

Every choice is drawn with a seed from the study's seed and the concept's name, so it is the same for every SAE, and
adding a concept to a file with one class per image moves no other one's images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_ray.concepts.labels import Labels
from sae_ray.seeds import derived_seed

if TYPE_CHECKING:
    from jaxtyping import Int

MIN_POSITIVES = 10
"""Fewer images of a concept are too few to fit anything."""


class Halves(NamedTuple):
    """Positions of the labelled images, ascending."""

    fitted: Int[np.ndarray, " half"]
    """To fit trees, probes, thresholds and names on."""
    judged: Int[np.ndarray, " half"]
    """To judge them on."""


def halves(labels: Labels, seed: int) -> Halves:
    """Splits the labelled images in two, and with them the images of every concept.

    Concepts take their turns, the one with the fewest images first. The images that show it and have no half yet are
    shuffled and dealt out so that as many of its images are in both halves, or one more in the fitted one (after
    Sechidis et al. 2011, "On the stratification of multi-label data"). With one class per image this is exact for every
    class. Images that show nothing are dealt out last.

    Args:
        seed: The study's.
    """
    in_fitted = np.zeros(labels.n_images, bool)
    free = labels.labelled.copy()
    for concept in sorted(range(labels.n_concepts), key=lambda one: (labels.n_positive[one], labels.names[one])):
        images = labels.showing(concept)
        waiting = images[free[images]]
        wanted = (len(images) + 1) // 2 - int(in_fitted[images].sum())
        _deal(in_fitted, waiting, wanted, derived_seed(seed, f"halves: {labels.names[concept]}"))
        free[waiting] = False
    rest = np.flatnonzero(free)
    _deal(in_fitted, rest, (len(rest) + 1) // 2, derived_seed(seed, "halves"))
    return Halves(np.flatnonzero(in_fitted), np.flatnonzero(labels.labelled & ~in_fitted))


def _deal(in_fitted: np.ndarray, images: np.ndarray, wanted: int, seed: int) -> None:
    shuffled = np.random.default_rng(seed).permutation(images)
    in_fitted[shuffled[: np.clip(wanted, 0, len(images))]] = True


def shuffled_labels(labels: Labels, seed: int) -> Labels:
    """The labels dealt out anew among the labelled images: what a score is worth by chance.

    All that is known of an image moves together, so concepts keep their numbers of images and how they go together.

    Args:
        seed: The study's.
    """
    order = np.arange(labels.n_images)
    images = np.flatnonzero(labels.labelled)
    order[images] = np.random.default_rng(derived_seed(seed, "shuffled labels")).permutation(images)
    return labels.take(order)


def balanced_rows(
    labels: Labels, concept: int, seed: int, *, max_positives: int = 1000
) -> Int[np.ndarray, " chosen"] | None:
    """As many images that show a concept as known others, drawn without replacement.

    A score of an unbalanced concept says little: a tree that finds 11.5 % of positives without fail can lose at most
    .115 of its accuracy with its latent.

    Args:
        labels: Of the images to draw from.
        seed: The study's.
        max_positives: At most as many images that show the concept.

    Returns:
        Their positions, ascending; None if fewer than 10 images show the concept, or fewer than 10 do not.
    """
    values = labels.of_concept(concept)
    positives, negatives = np.flatnonzero(values == 1), np.flatnonzero(values == 0)
    n = min(len(positives), len(negatives), max_positives)
    if n < MIN_POSITIVES:
        return None
    rng = np.random.default_rng(derived_seed(seed, f"balanced rows: {labels.names[concept]}"))
    chosen = [rng.choice(group, n, replace=False) for group in (positives, negatives)]
    return np.sort(np.concatenate(chosen))
