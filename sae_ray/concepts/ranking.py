"""Average precision of many latents at once, each for a concept of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sae_ray.concepts.inputs import sparse_codes
from sae_ray.concepts.labels import Labels, check_same_rows

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def average_precisions(
    codes: Any, labels: Labels, concept: Int[np.ndarray, " latents"]
) -> Float[np.ndarray, " latents"]:
    """How well each latent's value ranks the images that show its concept before the others.

    Images with the same value count as one step, as in scikit-learn's `average_precision_score`: most codes are 0, and
    an order among these would be made up. Takes time for the codes that are not 0.

    Args:
        codes: `[images, latents]`, as `sparse_codes` takes them.
        labels: of the same images.
        concept: of each latent; -1 for none.

    Returns:
        In [0, 1]; NaN for a latent without a concept, or with one that no known image shows, or all show.
    """
    matrix = sparse_codes(codes)
    check_same_rows(matrix, labels)
    columns = matrix.tocsc()
    n_latents, populations = len(concept), labels.known.shape[1]
    place = np.maximum(concept, 0)
    latent = np.repeat(np.arange(n_latents), np.diff(columns.indptr))
    image, value = columns.indices, columns.data
    if populations == 1:
        counted = (concept[latent] >= 0) & labels.known[image, 0]
    else:
        counted = (concept[latent] >= 0) & labels.known[image, place[latent]]
    latent, image, value = latent[counted], image[counted], value[counted]
    shown = _shows(labels, image, concept[latent])

    # The images without a code are one step of its own, at 0.
    n_known = np.broadcast_to(labels.known.sum(axis=0), labels.n_positive.shape)[place]
    n_positive = labels.n_positive[place]
    n_zero = n_known - np.bincount(latent, minlength=n_latents)
    zero_shown = n_positive - np.bincount(latent, weights=shown, minlength=n_latents)
    latent = np.concatenate([latent, np.arange(n_latents)])
    value = np.concatenate([value, np.zeros(n_latents)])
    weight = np.concatenate([np.ones(len(image)), n_zero])
    shown = np.concatenate([shown, zero_shown])
    order = np.lexsort((-value, latent))
    latent, value, weight, shown = latent[order], value[order], weight[order], shown[order]

    starts = np.flatnonzero(np.r_[True, latent[1:] != latent[:-1]])[latent]

    def so_far(values: np.ndarray) -> np.ndarray:
        """Sums over the entries of a latent up to each."""
        total = values.cumsum()
        return total - (total - values)[starts]

    seen, hits = so_far(weight), so_far(shown)
    last = np.flatnonzero(np.r_[(latent[1:] != latent[:-1]) | (value[1:] != value[:-1]), True])  # of a step
    latent, seen, hits = latent[last], seen[last], hits[last]
    before = np.where(np.r_[True, latent[1:] != latent[:-1]], 0, np.r_[0, hits[:-1]])
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.nan_to_num(hits / seen)
        found = np.bincount(latent, weights=(hits - before) * precision, minlength=n_latents) / n_positive
    defined = (concept >= 0) & (n_positive > 0) & (n_positive < n_known)
    return np.where(defined, found, np.nan)


def _shows(labels: Labels, image: np.ndarray, concept: np.ndarray) -> Float[np.ndarray, " pairs"]:
    """Whether each image shows the concept beside it."""
    positive = labels.positive.tocoo()
    keys = np.sort(positive.coords[0].astype(np.int64) * labels.n_concepts + positive.coords[1])
    wanted = image.astype(np.int64) * labels.n_concepts + concept
    if not len(keys):
        return np.zeros(len(wanted))
    found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return (keys[found] == wanted).astype(np.float64)
