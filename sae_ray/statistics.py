"""Mergeable statistics of neurons over images: one pass gives MonoSemanticity scores, frequencies, maxima, top images.

A `NeuronStats` covers a range of neurons over a set of images. Two over disjoint images merge by adding sums and
keeping extremes; merged in image order, blocks of fixed size give the same bits whoever computed them. Cost and memory
follow the number of entries, never images times neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_ray.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

BLOCK_BYTES = 64 * 2**20
"""Largest `weighted_embeddings` of one block of neurons; part of the format, since blocks decide the order of sums."""
IMAGES_PER_BLOCK = 4096
"""Images that one block covers (whole parts, so a little more or less); part of the format for the same reason."""
HISTOGRAM_EDGES = 2.0 ** (np.arange(-32, 33) / 2)
"""Half octaves from 2⁻¹⁶ to 2¹⁶: the edges of the bins in which values above 0 are counted. What lies outside goes to
the first or the last bin."""


class Entries(NamedTuple):
    """Image-level activations as a sparse matrix; what is not listed is 0. Sorted by (`neuron`, `image`)."""

    image: Int[np.ndarray, " entries"]
    """Position of the image within the block."""
    neuron: Int[np.ndarray, " entries"]
    value: Float[np.ndarray, " entries"]
    """Mean over the image's tokens, float64."""
    token_max: Float[np.ndarray, " entries"]
    """Largest value over the image's tokens, float64."""


def pool_tokens(
    row_image: Int[np.ndarray, " rows"],
    row: Int[np.ndarray, " entries"],
    neuron: Int[np.ndarray, " entries"],
    value: Float[np.ndarray, " entries"],
) -> Entries:
    """Averages codes over the tokens of each image (codes, not activations: METHODS.md, MonoSemanticity score).

    Args:
        row_image: image position of every token row, ascending.
        row, neuron, value: the codes, one entry per nonzero; `row` indexes `row_image`.
    """
    image = row_image[row]
    order = np.lexsort((row, image, neuron))
    image, neuron, value = image[order], neuron[order], value[order].astype(np.float64)
    if not len(value):
        return Entries(image, neuron, value, value)
    starts = np.flatnonzero(np.r_[True, (np.diff(neuron) != 0) | (np.diff(image) != 0)])
    n_tokens = np.bincount(row_image)
    sums = np.add.reduceat(value, starts)
    listed = np.diff(np.r_[starts, len(value)])
    largest = np.maximum.reduceat(value, starts)
    image, neuron = image[starts], neuron[starts]
    # A token that is not listed is 0, which is the maximum where all listed ones are negative.
    largest = np.where(listed < n_tokens[image], np.maximum(largest, 0.0), largest)
    return Entries(image, neuron, sums / n_tokens[image], largest)


@dataclass(frozen=True)
class NeuronStats:
    """Sums and extremes of a range of neurons over some images. Arrays have one row per neuron."""

    n_images: int
    minimum: Float[np.ndarray, " neurons"]
    n_min: Int[np.ndarray, " neurons"]
    """Images whose value equals the minimum."""
    n_firing: Int[np.ndarray, " neurons"]
    """Images with a value above 0."""
    total: Float[np.ndarray, " neurons"]
    total_squares: Float[np.ndarray, " neurons"]
    total_firing: Float[np.ndarray, " neurons"]
    """Sum of the values above 0."""
    max_image: Float[np.ndarray, " neurons"]
    max_token: Float[np.ndarray, " neurons"]
    top_value: Float[np.ndarray, "neurons top"]
    """Largest values, descending; -inf where there are fewer."""
    top_image: Int[np.ndarray, "neurons top"]
    """Their `image_index`; ties by the lower index; -1 where there are fewer."""
    histogram: Int[np.ndarray, "neurons bins"]
    """Images with a value in `[HISTOGRAM_EDGES[i], HISTOGRAM_EDGES[i + 1])`; a row sums to `n_firing`."""
    embedding_sum: Float[np.ndarray, " d"]
    """Sum of the judge's unit embeddings; `d` is 0 where there is no judge."""
    weighted_embeddings: Float[np.ndarray, "neurons d"]
    """Sum over images of value times unit embedding."""

    @classmethod
    def of_block(
        cls,
        entries: Entries,
        neurons: range,
        image_index: Int[np.ndarray, " images"],
        embeddings: Float[np.ndarray, "images d"] | None,
        n_top: int,
    ) -> NeuronStats:
        """Statistics of one block of images for one range of neurons.

        Args:
            entries: of the whole block, sorted by (neuron, image).
            neurons: the range that is covered.
            image_index: of every image of the block, ascending.
            embeddings: the judge's, any length; normalised here. None without a judge.
            n_top: top images kept per neuron.
        """
        first, last = np.searchsorted(entries.neuron, (neurons.start, neurons.stop))
        image, value, token_max = (column[first:last] for column in (entries.image, entries.value, entries.token_max))
        neuron = entries.neuron[first:last] - neurons.start
        n_images, n_neurons = len(image_index), len(neurons)

        listed = np.bincount(neuron, minlength=n_neurons)
        has_zero = listed < n_images
        minimum = np.where(has_zero, 0.0, np.inf)
        np.minimum.at(minimum, neuron, value)
        n_min = np.bincount(neuron, weights=value == minimum[neuron], minlength=n_neurons).astype(np.int64)
        n_min += np.where(minimum == 0, n_images - listed, 0)
        max_image, max_token = (np.where(has_zero, 0.0, -np.inf) for _ in range(2))
        np.maximum.at(max_image, neuron, value)
        np.maximum.at(max_token, neuron, token_max)

        def summed(weights: np.ndarray) -> np.ndarray:
            return np.bincount(neuron, weights=weights, minlength=n_neurons)

        firing = value > 0
        top_value, top_image = _top(neuron, value, image_index[image], n_neurons, n_top)
        unit = _unit(embeddings) if embeddings is not None else np.zeros((n_images, 0))
        return cls(
            n_images=n_images,
            minimum=minimum,
            n_min=n_min,
            n_firing=summed(firing).astype(np.int64),
            total=summed(value),
            total_squares=summed(value**2),
            total_firing=summed(np.where(firing, value, 0.0)),
            max_image=max_image,
            max_token=max_token,
            top_value=top_value,
            top_image=top_image,
            histogram=_histogram(neuron[firing], value[firing], n_neurons),
            embedding_sum=unit.sum(axis=0),
            weighted_embeddings=_sparse_dense(neuron, image, value, n_neurons, unit),
        )

    def merge(self, later: NeuronStats) -> NeuronStats:
        """Statistics over both sets of images. `later` must come from images with higher indices, for stable ties."""
        minimum = np.minimum(self.minimum, later.minimum)
        n_min = self.n_min * (self.minimum == minimum) + later.n_min * (later.minimum == minimum)
        n_top = self.top_value.shape[1]
        values = np.concatenate([self.top_value, later.top_value], axis=1)
        images = np.concatenate([self.top_image, later.top_image], axis=1)
        order = np.lexsort((images, -values), axis=1)[:, :n_top]
        return NeuronStats(
            n_images=self.n_images + later.n_images,
            minimum=minimum,
            n_min=n_min,
            n_firing=self.n_firing + later.n_firing,
            total=self.total + later.total,
            total_squares=self.total_squares + later.total_squares,
            total_firing=self.total_firing + later.total_firing,
            max_image=np.maximum(self.max_image, later.max_image),
            max_token=np.maximum(self.max_token, later.max_token),
            top_value=np.take_along_axis(values, order, axis=1),
            top_image=np.take_along_axis(images, order, axis=1),
            histogram=self.histogram + later.histogram,
            embedding_sum=self.embedding_sum + later.embedding_sum,
            weighted_embeddings=self.weighted_embeddings + later.weighted_embeddings,
        )

    @property
    def n_active(self) -> Int[np.ndarray, " neurons"]:
        """Images above the minimum: the support of the score."""
        return self.n_images - self.n_min

    def monosemanticity(self) -> Float[np.ndarray, " neurons"]:
        """MonoSemanticity score of every neuron, in [-1, 1]; NaN where fewer than two images are above the minimum.

        Equals the similarity of all image pairs, weighted by the product of their min-max scaled activations (Pach et
        al., arXiv 2504.02821, eq. 5-9), without forming the pairs: the maximum cancels, and a sum over pairs is the
        square of a sum less its diagonal.
        """
        if not self.embedding_sum.size:
            return np.full(len(self.total), np.nan)
        alive = self.n_active >= 2
        low = np.where(alive, self.minimum, 0.0)
        shifted = self.weighted_embeddings - low[:, None] * self.embedding_sum
        total = self.total - self.n_images * low
        squares = self.total_squares - 2 * low * self.total + self.n_images * low**2
        denominator = np.where(alive, total**2 - squares, 1.0)
        return np.where(alive, (np.square(shifted).sum(axis=1) - squares) / denominator, np.nan)


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


def neuron_blocks(n_neurons: int, embedding_width: int) -> Iterator[range]:
    """Ranges of neurons whose `weighted_embeddings` stay within `BLOCK_BYTES`."""
    size = max(1, BLOCK_BYTES // (8 * max(1, embedding_width)))
    for start in range(0, n_neurons, size):
        yield range(start, min(start + size, n_neurons))


def _top(
    neuron: np.ndarray, value: np.ndarray, image_index: np.ndarray, n_neurons: int, n_top: int
) -> tuple[np.ndarray, np.ndarray]:
    top_value = np.full((n_neurons, n_top), -np.inf)
    top_image = np.full((n_neurons, n_top), -1, dtype=np.int64)
    order = np.lexsort((image_index, -value, neuron))
    neuron, value, image_index = neuron[order], value[order], image_index[order]
    first_of_neuron = np.searchsorted(neuron, np.arange(n_neurons))
    rank = np.arange(len(neuron)) - first_of_neuron[neuron]
    kept = rank < n_top
    top_value[neuron[kept], rank[kept]] = value[kept]
    top_image[neuron[kept], rank[kept]] = image_index[kept]
    return top_value, top_image


def _histogram(neuron: np.ndarray, value: np.ndarray, n_neurons: int) -> np.ndarray:
    n_bins = len(HISTOGRAM_EDGES) - 1
    bins = np.clip(np.searchsorted(HISTOGRAM_EDGES, value, side="right") - 1, 0, n_bins - 1)
    counts = np.bincount(neuron * n_bins + bins, minlength=n_neurons * n_bins)
    return counts.reshape(n_neurons, n_bins).astype(np.int32)


def _unit(embeddings: np.ndarray) -> np.ndarray:
    embeddings = embeddings.astype(np.float64)
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def _sparse_dense(
    neuron: np.ndarray, image: np.ndarray, value: np.ndarray, n_neurons: int, unit: np.ndarray
) -> np.ndarray:
    import warnings

    import torch

    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
    starts = np.searchsorted(neuron, np.arange(n_neurons + 1))
    matrix = torch.sparse_csr_tensor(
        torch.from_numpy(starts),
        torch.from_numpy(np.ascontiguousarray(image, dtype=np.int64)),
        torch.from_numpy(np.ascontiguousarray(value)),
        size=(n_neurons, len(unit)),
        check_invariants=False,
    )
    return (matrix @ torch.from_numpy(unit)).numpy()
