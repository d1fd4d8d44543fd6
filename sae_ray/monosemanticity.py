"""The MonoSemanticity score (MS) on tensors; the distributed pass in `jobs/score.py` uses the same statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sae_ray.errors import UsageError
from sae_ray.statistics import Entries, NeuronStats, neuron_blocks

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def monosemanticity(
    activations: Float[Tensor, "images neurons"], embeddings: Float[Tensor, "images d"]
) -> Float[Tensor, " neurons"]:
    """MonoSemanticity score of every neuron (Pach et al., arXiv 2504.02821, eq. 5-9).

    Args:
        activations: one value per image and neuron, any scale and sign.
        embeddings: of the same images by a judge (DINOv2, say); normalised to unit length here.

    Returns:
        Scores in [-1, 1], float64: how similar the images are on which a neuron is active. NaN for a neuron that has
        fewer than two images above its minimum.

    Raises:
        UsageError: the two do not have the same number of rows, hold values that are not finite, or an embedding is
            zero.
    """
    import torch

    if activations.ndim != 2 or embeddings.ndim != 2 or len(activations) != len(embeddings):
        raise UsageError(
            f"activations {tuple(activations.shape)} and embeddings {tuple(embeddings.shape)} must be two matrices "
            "with one row per image"
        )
    values, judged = (tensor.detach().to("cpu", torch.float64).numpy() for tensor in (activations, embeddings))
    if not (np.isfinite(values).all() and np.isfinite(judged).all()):
        raise UsageError("activations and embeddings must be finite; remove the rows with NaN or inf")
    if not judged.any(axis=1).all():
        raise UsageError("an embedding that is zero has no direction; remove its row from both matrices")
    scores = np.empty(values.shape[1])
    for block in neuron_blocks(values.shape[1], judged.shape[1]):
        scores[block] = _block_scores(values[:, block], judged)
    return torch.from_numpy(scores)


def _block_scores(values: np.ndarray, judged: np.ndarray) -> np.ndarray:
    # Scaled to [0, 1] as the paper has it, which changes no score: the sums of values far from 0 would cancel.
    low, high = values.min(axis=0, initial=np.inf), values.max(axis=0, initial=-np.inf)
    values = (values - low) / np.where(high > low, high - low, 1.0)
    neuron, image = np.nonzero(values.T)
    value = values[image, neuron]
    stats = NeuronStats.of_block(
        Entries(image, neuron, value, value), range(values.shape[1]), np.arange(len(values)), judged, n_top=1
    )
    return stats.monosemanticity()
