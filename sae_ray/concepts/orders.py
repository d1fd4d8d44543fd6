"""Names of neurons by the order of their top images (rank-reorder of CLIP-Dissect)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sae_ray.concepts.dissect import MIN_IMAGES, checked_similarities, same_images, top_firing

if TYPE_CHECKING:
    from jaxtyping import Float

_POWER = 3
_N_PERMUTATIONS = 5


def rank_reorder(
    activations: Any, similarities: Any, *, top_fraction: float = 0.05, seed: int = 0
) -> Float[np.ndarray, "neurons words"]:
    """How little a neuron's largest activations change if a word's similarities sort its top images.

    -(mean |activation - activation at the place that the word gives the image|³) / (the same for random places) /
    (mean similarity of the images)^½ (arXiv 2204.10965; Trustworthy-ML-Lab/CLIP-dissect at 21e7697, `similarity.py`).

    Args:
        activations: `[images, neurons]`; also a matrix of scipy.sparse.
        similarities: `[images, words]`, cosines of unit CLIP embeddings.
        top_fraction: share of the images that are a neuron's top images; fewer if it fires on fewer.
        seed: of the random places, five draws per neuron in turn. So a neuron's scores depend on its position, and
            blocks of neurons give others.

    Returns:
        Scores of at most 0, where nearer to 0 is better; NaN for a neuron that fires on fewer than 5 images or equally
        on all its top images, and for a word whose mean similarity is negative, since that has no root.

    Raises:
        UsageError: shapes do not fit, or values are not finite.
    """
    import torch

    similarities = checked_similarities(similarities)
    codes = same_images(activations, similarities).tocsc()
    generator = torch.Generator().manual_seed(seed)
    top = top_firing(codes, int(len(similarities) * top_fraction))
    scores = np.full((codes.shape[1], similarities.shape[1]), np.nan)
    for neuron, images in enumerate(top):
        images = images[images >= 0]
        if len(images) < MIN_IMAGES:
            continue
        falling = codes[:, [neuron]].toarray()[images, 0]
        rising = falling[::-1]
        shuffled = [rising[torch.randperm(len(rising), generator=generator).numpy()] for _ in range(_N_PERMUTATIONS)]
        by_chance = np.mean(np.abs(rising - np.stack(shuffled)) ** _POWER)
        shown = similarities[images]
        place = np.argsort(np.argsort(shown, axis=0, kind="stable"), axis=0, kind="stable")
        change = np.mean(np.abs(falling[:, None] - rising[place]) ** _POWER, axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            scores[neuron] = -change / by_chance / np.sqrt(shown.mean(axis=0))
    return scores
