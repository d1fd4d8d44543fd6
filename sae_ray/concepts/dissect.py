"""Names of neurons from a vocabulary, by the CLIP similarities of their top images to its words (CLIP-Dissect).

Oikarinen and Weng, arXiv 2204.10965; Trustworthy-ML-Lab/CLIP-dissect at 21e7697, `similarity.py`. A name is good if the
neuron's top images are likely to show it, and if they do not show it just as well for every neuron.

`soft_wpmi` and `wpmi` do the whole computation for what fits in memory. For more, cut by words: with a block of words
and all neurons, `word_probabilities` (which needs `log_total` over all words), `log_likelihood` and `Prior` give that
block's final scores, of which `BestWords` keeps the best. Neurons may be cut as well: their parts of a `Prior` merge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np

from sae_ray.concepts.inputs import as_numpy, sparse_codes
from sae_ray.errors import UsageError
from sae_ray.scores.statistics import BlockImages, Entries, NeuronStats

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jaxtyping import Float, Int

MIN_IMAGES = 5
"""A neuron that fires on fewer images gets no names."""
MIN_FULL = 16
"""The prior is that of the neurons with `top_k` images; if there are fewer of those, that of all."""
_FLOOR = 1e-7
_P_START, _P_END = 0.998, 0.97
_FACTORS = 40
"""Factors multiplied before their logarithm is taken: as none is below 1e-7, no product underflows."""
_CHUNK = 2**18
"""Numbers that are worked on at once, so that they stay in a processor's cache."""


def soft_wpmi(
    activations: Any,
    similarities: Any,
    *,
    top_k: int = 100,
    a: float = 10.0,
    lam: float = 1.0,
    top_images: Any = None,
) -> Float[np.ndarray, "neurons words"]:
    """SoftWPMI: how much likelier a neuron's top images are to show a word than those of the other neurons.

    With Q = softmax over the words of `a` times the similarities, and a neuron's top images in order i = 0, 1, …:
    l = Σᵢ log(1 + wᵢ (Qᵢ - 1) + 1e-7), wᵢ = .998 - .028 i / top_k, and the score is
    l - lam (logsumexp of l over the neurons - log of their number).

    Args:
        activations: `[images, neurons]`, one value per image and neuron; also a matrix of scipy.sparse.
        similarities: `[images, words]`, cosines of unit CLIP embeddings.
        top_k: number of top images.
        a: inverse temperature of the softmax.
        lam: weight of the prior.
        top_images: `[top_k, neurons]`, positions of images, best first, -1 in unused places. They are read instead of
            those that the activations choose: the images with the largest values above 0, ties by lower position.

    A neuron with n < `top_k` images has its l multiplied by `top_k` / n, and does not count for the prior (all count if
    fewer than 16 neurons have `top_k` images).

    Returns:
        Scores in nats, comparable between neurons and words of one call; they depend on the vocabulary and on which
        neurons are scored. NaN for a neuron with fewer than 5 images.

    Raises:
        UsageError: shapes do not fit, or values are not finite.
    """
    return _scores(activations, similarities, a, lam, top_images, soft_wpmi_weights(top_k))


def soft_wpmi_weights(top_k: int) -> Float[np.ndarray, " top_k"]:
    """Of the ranks of top images: from .998 towards .97."""
    return _P_START - np.arange(top_k) / top_k * (_P_START - _P_END)


def wpmi(
    activations: Any,
    similarities: Any,
    *,
    top_k: int = 28,
    a: float = 2.0,
    lam: float = 0.6,
    top_images: Any = None,
) -> Float[np.ndarray, "neurons words"]:
    """WPMI: as `soft_wpmi`, with l = Σᵢ log(Qᵢ + 1e-7), so that all top images count alike."""
    return _scores(activations, similarities, a, lam, top_images, np.ones(top_k))


def _scores(
    activations: Any, similarities: Any, a: float, lam: float, top_images: Any, weights: Float[np.ndarray, " top_k"]
) -> Float[np.ndarray, "neurons words"]:
    similarities = checked_similarities(similarities)
    if top_images is None:
        codes = same_images(activations, similarities)
        chosen = top_firing(codes, len(weights))
    else:
        chosen = as_numpy(top_images).T
        if chosen.ndim != 2 or chosen.shape[1] != len(weights) or chosen.max(initial=-1) >= len(similarities):
            raise UsageError(
                f"top_images has the shape {chosen.T.shape}; give [top_k, neurons] = [{len(weights)}, neurons] "
                f"positions below {len(similarities)}, the number of images"
            )
    log_likelihoods = log_likelihood(chosen, word_probabilities(similarities, a), weights)
    prior = Prior.of(log_likelihoods, (chosen >= 0).sum(axis=1), len(weights))
    return log_likelihoods - lam * prior.log_mean()


def checked_similarities(similarities: Any) -> Float[np.ndarray, "images words"]:
    """As float64. Raises UsageError if they are no matrix, or not finite."""
    values = as_numpy(similarities)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise UsageError(f"similarities has the shape {values.shape}; give a matrix [images, words] of finite values")
    return values.astype(np.float64, copy=False)


def same_images(activations: Any, similarities: Float[np.ndarray, "images words"]) -> Any:
    """The activations as a CSR matrix. Raises UsageError unless they are of as many images."""
    codes: Any = sparse_codes(activations)
    if codes.shape[0] != len(similarities):
        raise UsageError(
            f"activations has {codes.shape[0]} rows and similarities has {len(similarities)}; "
            "give both for the same images"
        )
    return codes


def top_firing(activations: Any, n: int) -> Int[np.ndarray, "neurons n"]:
    """Positions of the n images on which each neuron is largest and above 0, ties by lower position; -1 for none.

    `NeuronStats.top_image` holds the same for images in blocks.
    """
    columns: Any = sparse_codes(activations).tocsc()
    columns.sort_indices()
    neuron = np.repeat(np.arange(columns.shape[1]), np.diff(columns.indptr))
    firing = columns.data > 0
    image, neuron, value = columns.indices[firing], neuron[firing], columns.data[firing]
    stats = NeuronStats(columns.shape[1], 0, n)
    stats.add(Entries(image, neuron, value, value), BlockImages.unjudged(np.arange(columns.shape[0])))
    return stats.top_image


def log_total(similarities: Float[np.ndarray, "images words"], a: float) -> Float[np.ndarray, " images"]:
    """log Σ exp(a similarity) over words. Blocks of words merge by `np.logaddexp`."""
    from scipy.special import logsumexp

    return np.asarray(logsumexp(a * similarities, axis=1))


def word_probabilities(
    similarities: Float[np.ndarray, "images words"], a: float, total: Float[np.ndarray, " images"] | None = None
) -> Float[np.ndarray, "images words"]:
    """Q, the softmax over words of a times the similarities.

    Args:
        total: `log_total` over all words, if these are only some of them.
    """
    return np.exp(a * similarities - (log_total(similarities, a) if total is None else total)[:, None])


def log_likelihood(
    top_images: Int[np.ndarray, "neurons top_k"],
    probabilities: Float[np.ndarray, "images words"],
    weights: Float[np.ndarray, " top_k"],
) -> Float[np.ndarray, "neurons words"]:
    """l of any block of neurons and any block of words, as in `soft_wpmi`; NaN for neurons with too few images.

    Takes neurons x `top_k` x words multiplications and about a fortieth as many logarithms.

    Args:
        top_images: positions of images, best first, -1 in unused places, which are the last.
        probabilities: `word_probabilities` of these words.
        weights: of the ranks of top images; all 1 for WPMI.
    """
    n_images = (top_images >= 0).sum(axis=1)
    offsets = 1 - weights + _FLOOR
    found = np.full((len(top_images), probabilities.shape[1]), np.nan)
    enough = np.flatnonzero(n_images >= min(MIN_IMAGES, len(weights)))
    # Neurons with as many images go together: every rank is then one operation on a block.
    enough = enough[np.argsort(n_images[enough], kind="stable")]
    rows = max(1, _CHUNK // max(1, probabilities.shape[1]))
    for start in range(0, len(enough), rows):
        neurons = enough[start : start + rows]
        found[neurons] = _sum_of_logs(top_images[neurons], n_images[neurons], probabilities, offsets, weights)
    found[enough] *= (len(weights) / n_images[enough])[:, None]
    return found


def _sum_of_logs(
    top_images: Int[np.ndarray, "neurons top_k"],
    n_images: Int[np.ndarray, " neurons"],
    probabilities: Float[np.ndarray, "images words"],
    offsets: Float[np.ndarray, " top_k"],
    weights: Float[np.ndarray, " top_k"],
) -> Float[np.ndarray, "neurons words"]:
    """Of neurons in ascending order of their numbers of images."""
    total = np.zeros((len(top_images), probabilities.shape[1]))
    product = np.ones_like(total)
    for rank in range(n_images[-1]):
        first = np.searchsorted(n_images, rank, side="right")
        factor = probabilities[top_images[first:, rank]]
        factor *= weights[rank]
        factor += offsets[rank]
        product[first:] *= factor
        if (rank + 1) % _FACTORS == 0:
            total += np.log(product)
            product[:] = 1
    return total + np.log(product)


class Prior:
    """The mean likelihood of each word over neurons; parts of different neurons merge."""

    def __init__(self, n_words: int):
        """Starts without neurons."""
        self.n = np.zeros(2, np.int64)
        """Number of neurons: those with `top_k` images, and all that have names."""
        self.log_sum: Float[np.ndarray, "2 words"] = np.full((2, n_words), -np.inf)
        """Over the same two, the logarithm of the sum of likelihoods."""

    @classmethod
    def of(
        cls, log_likelihoods: Float[np.ndarray, "neurons words"], n_images: Int[np.ndarray, " neurons"], top_k: int
    ) -> Self:
        """Of a block of neurons.

        Args:
            log_likelihoods: as `log_likelihood` gives them; neurons with NaN do not count.
            n_images: number of each neuron's top images.
        """
        from scipy.special import logsumexp

        prior = cls(log_likelihoods.shape[1])
        named = n_images >= min(MIN_IMAGES, top_k)
        for place, chosen in enumerate((named & (n_images >= top_k), named)):
            if chosen.any():
                prior.n[place] = chosen.sum()
                prior.log_sum[place] = logsumexp(log_likelihoods[chosen], axis=0)
        return prior

    @classmethod
    def merged(cls, parts: Iterable[Self]) -> Self:
        """Of all neurons, from parts for the same words."""
        first, *rest = parts
        whole = cls(first.log_sum.shape[1])
        for part in (first, *rest):
            whole.n = whole.n + part.n
            whole.log_sum = np.logaddexp(whole.log_sum, part.log_sum)
        return whole

    def log_mean(self) -> Float[np.ndarray, " words"]:
        """What is subtracted from log likelihoods, times lam; NaN without neurons."""
        place = 0 if self.n[0] >= MIN_FULL else 1
        if not self.n[place]:
            return np.full(self.log_sum.shape[1], np.nan)
        return self.log_sum[place] - np.log(self.n[place])
