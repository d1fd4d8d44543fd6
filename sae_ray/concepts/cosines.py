"""Names of neurons by cosines: of their activations with a word's similarities over images, or of their decoder rows
with its embedding. Every score depends on one neuron and one word, so blocks of either give the same scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sae_ray.concepts.dissect import checked_similarities, same_images
from sae_ray.concepts.inputs import as_numpy, unit
from sae_ray.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float

_MIN_NORM = 1e-3


def cosine(activations: Any, similarities: Any) -> Float[np.ndarray, "neurons words"]:
    """Cosine over images of a neuron's activations and a word's similarities (`cos_similarity` of CLIP-Dissect).

    Args:
        activations: `[images, neurons]`; also a matrix of scipy.sparse.
        similarities: `[images, words]`, cosines of unit CLIP embeddings.

    Returns:
        Cosines in [-1, 1]; NaN for a neuron that never fires.

    Raises:
        UsageError: shapes do not fit, or values are not finite.
    """
    similarities = checked_similarities(similarities)
    codes = same_images(activations, similarities)
    lengths = np.sqrt(codes.power(2).sum(axis=0))
    with np.errstate(invalid="ignore"):
        return codes.T @ similarities / lengths[:, None] / np.linalg.norm(similarities, axis=0)


def cosine_cubed(activations: Any, similarities: Any) -> Float[np.ndarray, "neurons words"]:
    """As `cosine`, of activations and similarities less their means over images, cubed (arXiv 2204.10965, appendix).

    Cubes let the images with extreme values decide. Norms below 1e-3 count as 1e-3, as in the reference
    (`cos_similarity_cubed` of CLIP-Dissect), so neurons with tiny activations score near 0. Constant neurons are NaN.
    """
    similarities = checked_similarities(similarities)
    codes = same_images(activations, similarities)
    n_images, n_neurons = codes.shape
    mean = np.asarray(codes.mean(axis=0))
    words = (similarities - similarities.mean(axis=0)) ** 3
    words /= np.maximum(np.linalg.norm(words, axis=0), _MIN_NORM)

    # Where a code is 0, its centred cube is -mean³. What is above that stays sparse.
    above, sixth = codes.copy(), codes.copy()
    of_entry = mean[codes.indices]
    above.data = (codes.data - of_entry) ** 3 + of_entry**3
    sixth.data = (codes.data - of_entry) ** 6
    n_listed = np.bincount(codes.indices, minlength=n_neurons)
    squares = np.asarray(sixth.sum(axis=0)) + (n_images - n_listed) * mean**6
    products = above.T @ words - (mean**3)[:, None] * words.sum(axis=0)
    scores = products / np.maximum(np.sqrt(squares), _MIN_NORM)[:, None]
    scores[_constant(codes)] = np.nan
    return scores


def _constant(codes: Any) -> np.ndarray:
    low, high = (np.asarray(side.todense()).ravel() for side in (codes.min(axis=0), codes.max(axis=0)))
    return low == high


def decoder_cosine(decoder: Any, texts: Any, *, centre: Any = None) -> Float[np.ndarray, "neurons words"]:
    """Cosine of a neuron's decoder row and a word's text embedding (DN-CBM, Rao et al., arXiv 2407.14499).

    It has a meaning only for an SAE that was trained on the image embeddings (the projection) of the very CLIP model
    that embeds the words.

    Args:
        decoder: `W_dec [neurons, d]`, rows of any length.
        texts: `[words, d]`, embeddings of any length.
        centre: `[d]`, the mean of the unit image embeddings. With it, it is subtracted from the unit decoder rows, and
            the mean text from the unit texts, before the cosine is taken. CLIP keeps images and texts in two separate
            cones, which can make one word the nearest of many neurons.

    Returns:
        Cosines in [-1, 1]; NaN for a decoder row of length zero.

    Raises:
        UsageError: the widths differ.
    """
    rows, words = as_numpy(decoder), as_numpy(texts)
    if rows.ndim != 2 or words.ndim != 2 or rows.shape[1] != words.shape[1]:
        raise UsageError(
            f"decoder {rows.shape} and texts {words.shape} must be two matrices of one width; take the text embeddings "
            "of the CLIP model whose projection the SAE was trained on"
        )
    rows, words = unit(rows), unit(words)
    if centre is not None:
        rows, words = unit(rows - as_numpy(centre)), unit(words - words.mean(axis=0))
    return rows @ words.T
