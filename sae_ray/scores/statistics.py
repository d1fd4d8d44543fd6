"""Statistics of neurons over images: one pass gives MonoSemanticity scores, frequencies, maxima and top images.

A `NeuronStats` covers a range of neurons. Blocks of images are added in order; since blocks have a fixed size, results
are bit-identical for any number of workers. The cost of a block grows with the number of its entries, not with images
times neurons, and memory grows only with the number of neurons.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.host import to_host

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_ray.sae.sparse import SparseCodes

BLOCK_BYTES = 64 * 2**20
"""Maximum size of `weighted_embeddings` for one range of neurons, which a task keeps and passes on."""
IMAGES_PER_BLOCK = 4096
"""Images per block (in whole parts, so a little more or less). Part of the format, since blocks determine the order of
sums."""
HISTOGRAM_EDGES = 2.0 ** (np.arange(-32, 33) / 2)
"""Half octaves from 2⁻¹⁶ to 2¹⁶: the bin edges of the histogram of values above 0. Values outside are counted in the
first or the last bin."""


class Entries(NamedTuple):
    """Image-level activations as a sparse matrix, sorted by (`neuron`, `image`). Values that are not listed are 0."""

    image: Int[np.ndarray, " entries"]
    """Position of the image within the block."""
    neuron: Int[np.ndarray, " entries"]
    value: Float[np.ndarray, " entries"]
    """Mean over the image's tokens, float64."""
    token_max: Float[np.ndarray, " entries"]
    """Largest value over the image's tokens, float64."""

    def of_range(self, neurons: range) -> Entries:
        """The entries of a range of neurons, with neurons counted from its start."""
        kept = slice(*np.searchsorted(self.neuron, (neurons.start, neurons.stop)))
        image, neuron, value, token_max = (column[kept] for column in self)
        return Entries(image, neuron - neurons.start, value, token_max)


class BlockImages(NamedTuple):
    """The images of one block."""

    image_index: Int[np.ndarray, " images"]
    """Ascending, and higher than in earlier blocks."""
    unit: Float[np.ndarray, "images d"]
    """The judge's embeddings as float64 unit vectors; `d` is 0 without a judge."""

    @classmethod
    def of(
        cls,
        image_index: Int[np.ndarray, " images"],
        embeddings: Float[np.ndarray, "images d"],
        judge: str = "the judge",
    ) -> BlockImages:
        """From embeddings of any length but zero.

        Raises SaeRayError, which names the judge and the image, if an embedding has length zero.
        """
        embeddings = embeddings.astype(np.float64)
        lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
        if not lengths.all():
            raise SaeRayError(
                f"{judge} gives the image with image_index {image_index[lengths[:, 0] == 0][0]} an embedding of length "
                "zero, which has no direction; remove the image or choose another judge"
            )
        return cls(image_index, embeddings / lengths)

    @classmethod
    def unjudged(cls, image_index: Int[np.ndarray, " images"]) -> BlockImages:
        """Without a judge."""
        return cls(image_index, np.zeros((len(image_index), 0)))


def pool_tokens(
    row_image: Int[np.ndarray, " rows"],
    row: Int[np.ndarray, " entries"],
    neuron: Int[np.ndarray, " entries"],
    value: Float[np.ndarray, " entries"],
) -> Entries:
    """Averages codes over the tokens of each image (codes, not activations: METHODS.md, MonoSemanticity score).

    Args:
        row_image: image position of each token row, ascending.
        row, neuron, value: the codes, one entry per nonzero; `row` indexes `row_image`.

    A sum adds its tokens one after the other, in float64; `pool_codes` does the same.
    """
    image = row_image[row]
    order = np.lexsort((row, image, neuron))
    image, neuron, value = image[order], neuron[order], value[order].astype(np.float64)
    if not len(value):
        return Entries(image, neuron, value, value)
    starts = np.flatnonzero(np.r_[True, (np.diff(neuron) != 0) | (np.diff(image) != 0)])
    n_tokens = np.bincount(row_image)
    listed = np.diff(np.r_[starts, len(value)])
    sums = np.bincount(np.repeat(np.arange(len(starts)), listed), weights=value)  # in order, unlike reduceat
    largest = np.maximum.reduceat(value, starts)
    image, neuron = image[starts], neuron[starts]
    # Tokens that are not listed are 0, which is the maximum if all listed values are negative.
    largest = np.where(listed < n_tokens[image], np.maximum(largest, 0.0), largest)
    return Entries(image, neuron, sums / n_tokens[image], largest)


def pool_codes(row_image: Int[np.ndarray, " rows"], codes: SparseCodes) -> Entries:
    """As `pool_tokens`, with the same bits, but computed where the codes are.

    Args:
        row_image: image position of each row of the codes, ascending.
    """
    import torch

    if not len(codes.values):  # segments cannot be none at all on every device
        return pool_tokens(row_image, *(column.numpy() for column in to_host(codes.rows, codes.latents, codes.values)))
    device, n_tokens = codes.values.device, torch.from_numpy(np.bincount(row_image))
    key = codes.latents * len(n_tokens) + torch.from_numpy(row_image).to(device)[codes.rows]
    key, order = key.sort(stable=True)
    key, listed = torch.unique_consecutive(key, return_counts=True)
    neuron, image = key // len(n_tokens), key % len(n_tokens)
    # As a matrix of one column: such a segment is added in order.
    value = codes.values[order].double().unsqueeze(1)
    sums, largest = (
        torch.segment_reduce(value, reduce, lengths=listed, unsafe=True).squeeze(1) for reduce in ("sum", "max")
    )
    means = sums / n_tokens.to(device)[image]
    return Entries(*(column.numpy() for column in to_host(image, neuron, means, largest)))


def pool_dense(row_image: Int[np.ndarray, " rows"], activation: Float[np.ndarray, "rows neurons"]) -> Entries:
    """As `pool_tokens`, for activations of which most are not 0.

    Args:
        row_image: image position of each token row, ascending from 0 without gaps.
    """
    rows = np.searchsorted(row_image, np.arange(row_image.max(initial=-1) + 2))
    shape = (len(rows) - 1, activation.shape[1])
    mean, largest, listed = np.empty(shape), np.empty(shape), np.empty(shape, bool)
    for image, (start, end) in enumerate(itertools.pairwise(rows)):
        tokens = activation[start:end].astype(np.float64)  # one image at a time: all would take four times the store
        mean[image] = tokens.sum(axis=0) / (end - start)
        largest[image] = tokens.max(axis=0)
        listed[image] = tokens.any(axis=0)
    neuron, image = np.nonzero(listed.T)
    return Entries(image, neuron, mean[image, neuron], largest[image, neuron])


class NeuronStats:
    """Sums and extremes of a range of neurons over the images added so far. Arrays have one row per neuron."""

    def __init__(self, n_neurons: int, width: int, n_top: int):
        """Starts without images.

        Args:
            width: width of the judge's embeddings; 0 without a judge.
            n_top: number of top images per neuron.
        """
        self.n_images = 0
        self.n_listed: Int[np.ndarray, " neurons"] = np.zeros(n_neurons, np.int64)
        """Number of images with an entry; the value on the others is 0."""
        self.listed_min: Float[np.ndarray, " neurons"] = np.full(n_neurons, np.inf)
        """Smallest value of the entries; the next three are also computed from entries only."""
        self.n_listed_min: Int[np.ndarray, " neurons"] = np.zeros(n_neurons, np.int64)
        self.listed_max: Float[np.ndarray, " neurons"] = np.full(n_neurons, -np.inf)
        self.listed_max_token: Float[np.ndarray, " neurons"] = np.full(n_neurons, -np.inf)
        self.n_firing: Int[np.ndarray, " neurons"] = np.zeros(n_neurons, np.int64)
        """Number of images with a value above 0."""
        self.total: Float[np.ndarray, " neurons"] = np.zeros(n_neurons)
        self.total_squares: Float[np.ndarray, " neurons"] = np.zeros(n_neurons)
        self.total_firing: Float[np.ndarray, " neurons"] = np.zeros(n_neurons)
        """Sum of the values above 0."""
        self.top_value: Float[np.ndarray, "neurons top"] = np.full((n_neurons, n_top), -np.inf)
        """Largest values, descending; -inf in unused places."""
        self.top_image: Int[np.ndarray, "neurons top"] = np.full((n_neurons, n_top), -1, np.int64)
        """Their `image_index`, lower index first in ties; -1 in unused places."""
        self.histogram: Int[np.ndarray, "neurons bins"] = np.zeros((n_neurons, len(HISTOGRAM_EDGES) - 1), np.int32)
        """Number of images with a value in `[HISTOGRAM_EDGES[i], HISTOGRAM_EDGES[i + 1])`; rows sum to `n_firing`."""
        self.embedding_sum: Float[np.ndarray, " d"] = np.zeros(width)
        """Sum of the judge's unit embeddings."""
        self.weighted_embeddings: Float[np.ndarray, "neurons d"] = np.zeros((n_neurons, width))
        """Sum over images of value times unit embedding."""

    def add(self, entries: Entries, images: BlockImages) -> None:
        """Adds a block of images. Only the rows of neurons with an entry are updated.

        Args:
            entries: entries of these neurons, counted from 0.
            images: must have higher indices than all images added before, so that ties go to the lower index.
        """
        self.n_images += len(images.image_index)
        self.embedding_sum += images.unit.sum(axis=0)
        image, neuron, value, token_max = entries
        if not len(neuron):
            return
        starts = np.flatnonzero(np.r_[True, neuron[1:] != neuron[:-1]])
        touched, listed = neuron[starts], np.diff(np.r_[starts, len(neuron)])

        low = np.minimum.reduceat(value, starts)
        n_low = np.add.reduceat(value == np.repeat(low, listed), starts, dtype=np.int64)
        before = self.listed_min[touched]
        lowest = np.minimum(before, low)
        self.listed_min[touched] = lowest
        self.n_listed_min[touched] = self.n_listed_min[touched] * (before == lowest) + n_low * (low == lowest)
        for maximum, column in ((self.listed_max, value), (self.listed_max_token, token_max)):
            maximum[touched] = np.maximum(maximum[touched], np.maximum.reduceat(column, starts))

        firing = value > 0
        self.n_listed[touched] += listed
        self.n_firing[touched] += np.add.reduceat(firing, starts, dtype=np.int64)
        self.total[touched] += np.add.reduceat(value, starts)
        self.total_squares[touched] += np.add.reduceat(np.square(value), starts)
        self.total_firing[touched] += np.add.reduceat(np.where(firing, value, 0.0), starts)

        bins = np.searchsorted(HISTOGRAM_EDGES, value[firing], side="right") - 1
        n_bins = self.histogram.shape[1]
        np.add.at(self.histogram.reshape(-1), neuron[firing] * n_bins + np.clip(bins, 0, n_bins - 1), np.int32(1))
        self._add_top(neuron, value, images.image_index[image])
        if images.unit.shape[1]:
            offsets = np.searchsorted(neuron, np.arange(len(self.total) + 1))
            _add_product(self.weighted_embeddings, offsets, image, value, images.unit)

    def _add_top(self, neuron: np.ndarray, value: np.ndarray, image_index: np.ndarray) -> None:
        n_top = self.top_value.shape[1]
        if not n_top:
            return
        rising = value > self.top_value[neuron, -1]
        neuron, value, image_index = neuron[rising], value[rising], image_index[rising]
        order = np.lexsort((-value, neuron))  # stable: ties stay in the order of the images
        neuron, value, image_index = neuron[order], value[order], image_index[order]
        touched, first, row = np.unique(neuron, return_index=True, return_inverse=True)
        rank = np.arange(len(neuron)) - first[row]
        kept = rank < n_top
        values = np.full((len(touched), 2 * n_top), -np.inf)
        images = np.full((len(touched), 2 * n_top), -1, np.int64)
        values[:, :n_top], images[:, :n_top] = self.top_value[touched], self.top_image[touched]
        values[row[kept], n_top + rank[kept]] = value[kept]
        images[row[kept], n_top + rank[kept]] = image_index[kept]
        best = np.argsort(-values, axis=1, kind="stable")[:, :n_top]
        self.top_value[touched] = np.take_along_axis(values, best, axis=1)
        self.top_image[touched] = np.take_along_axis(images, best, axis=1)

    @property
    def minimum(self) -> Float[np.ndarray, " neurons"]:
        return np.where(self._has_zero, np.minimum(self.listed_min, 0.0), self.listed_min)

    @property
    def max_image(self) -> Float[np.ndarray, " neurons"]:
        return np.where(self._has_zero, np.maximum(self.listed_max, 0.0), self.listed_max)

    @property
    def max_token(self) -> Float[np.ndarray, " neurons"]:
        return np.where(self._has_zero, np.maximum(self.listed_max_token, 0.0), self.listed_max_token)

    @property
    def n_active(self) -> Int[np.ndarray, " neurons"]:
        """Images above the minimum: the support of the score."""
        minimum = self.minimum
        at_minimum = np.where(minimum == self.listed_min, self.n_listed_min, 0)
        return self.n_images - at_minimum - np.where(minimum == 0, self.n_images - self.n_listed, 0)

    @property
    def _has_zero(self) -> Bool[np.ndarray, " neurons"]:
        """Whether at least one image has no entry."""
        return self.n_listed < self.n_images

    def monosemanticity(self) -> Float[np.ndarray, " neurons"]:
        """MonoSemanticity score of each neuron, in [-1, 1]; NaN if fewer than two images are above the minimum.

        Equals the similarity of all image pairs, weighted by the product of their min-max scaled activations (Pach et
        al., arXiv 2504.02821, eq. 5-9), without forming the pairs: the maximum cancels, and a sum over pairs is the
        square of a sum less its diagonal.
        """
        if not self.embedding_sum.size:
            return np.full(len(self.total), np.nan)
        alive = self.n_active >= 2
        low = np.where(alive, self.minimum, 0.0)
        lengths = np.einsum("nd,nd->n", self.weighted_embeddings, self.weighted_embeddings)
        shifted = np.flatnonzero(low)  # in an SAE, only latents that fire on every image
        moved = self.weighted_embeddings[shifted] - low[shifted, None] * self.embedding_sum
        lengths[shifted] = np.einsum("nd,nd->n", moved, moved)
        total = self.total - self.n_images * low
        squares = self.total_squares - 2 * low * self.total + self.n_images * low**2
        denominator = np.where(alive, total**2 - squares, 1.0)
        return np.where(alive, (lengths - squares) / denominator, np.nan)


def monosemanticity(
    activations: Float[Tensor | np.ndarray, "images neurons"], embeddings: Float[Tensor | np.ndarray, "images d"]
) -> Float[Tensor, " neurons"]:
    """MonoSemanticity score of each neuron (Pach et al., arXiv 2504.02821, eq. 5-9).

    Args:
        activations: one value per image and neuron, any scale and sign; a tensor or an array, like the embeddings.
        embeddings: of the same images by a judge (DINOv2, say); normalised to unit length here.

    Returns:
        Scores in [-1, 1], float64: how similar the images are on which a neuron is active. NaN for a neuron with fewer
        than two images above its minimum.

    Raises:
        UsageError: the two have different numbers of rows, or contain values that are not finite.
        SaeRayError: an embedding has length zero.
    """
    import torch

    from sae_ray.store.tensors import as_tensor

    activations, embeddings = as_tensor(activations), as_tensor(embeddings)
    if activations.ndim != 2 or embeddings.ndim != 2 or len(activations) != len(embeddings):
        raise UsageError(
            f"activations {tuple(activations.shape)} and embeddings {tuple(embeddings.shape)} must be two matrices "
            "with one row per image"
        )
    values, judged = (tensor.detach().to("cpu", torch.float64).numpy() for tensor in (activations, embeddings))
    if not (np.isfinite(values).all() and np.isfinite(judged).all()):
        raise UsageError("activations and embeddings must be finite; remove the rows with NaN or inf")
    images = BlockImages.of(np.arange(len(judged)), judged)
    scores = np.empty(values.shape[1])
    for block in neuron_blocks(values.shape[1], judged.shape[1]):
        scores[block] = _block_scores(values[:, block], images)
    return torch.from_numpy(scores)


def _block_scores(values: np.ndarray, images: BlockImages) -> np.ndarray:
    # Scaled to [0, 1] as in the paper. Scores do not change, but sums of values far from 0 would lose precision.
    low, high = values.min(axis=0, initial=np.inf), values.max(axis=0, initial=-np.inf)
    values = (values - low) / np.where(high > low, high - low, 1.0)
    neuron, image = np.nonzero(values.T)
    value = values[image, neuron]
    stats = NeuronStats(values.shape[1], images.unit.shape[1], n_top=0)
    stats.add(Entries(image, neuron, value, value), images)
    return stats.monosemanticity()


def neuron_blocks(n_neurons: int, embedding_width: int) -> Iterator[range]:
    """Ranges of neurons whose `weighted_embeddings` stay within `BLOCK_BYTES`."""
    size = max(1, BLOCK_BYTES // (8 * max(1, embedding_width)))
    for start in range(0, n_neurons, size):
        yield range(start, min(start + size, n_neurons))


def _add_product(
    target: Float[np.ndarray, "rows d"],
    offsets: Int[np.ndarray, " rows+1"],
    image: Int[np.ndarray, " entries"],
    value: Float[np.ndarray, " entries"],
    unit: Float[np.ndarray, "images d"],
) -> None:
    """Adds to `target` the product of a sparse matrix, with rows delimited by `offsets`, and a dense one."""
    import warnings

    import torch

    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
    columns = [torch.from_numpy(np.ascontiguousarray(column)) for column in (offsets, image, value)]
    matrix = torch.sparse_csr_tensor(*columns, size=(len(target), len(unit)), check_invariants=False)
    total = torch.from_numpy(target)
    torch.addmm(total, matrix, torch.from_numpy(unit), out=total)
