"""Statistics of latents by the labels of images: sums per latent and concept, from which all scores by labels follow.

A `ClassStats` covers a range of latents. Blocks of images are added one after the other at a cost that grows with the
number of their codes above 0, not with images times latents; memory grows with latents times concepts, so ranges of
latents are chosen by it (`sae_ray.scores.statistics.neuron_blocks(n_latents, n_concepts)`).

Statistics of different images can be merged. Merging in any order gives the same up to rounding; adding blocks of
images, or merging their statistics, in one fixed order gives the same bits on any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_ray.concepts.inputs import SparseMatrix, sparse_codes
from sae_ray.concepts.labels import Labels, check_same_rows
from sae_ray.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class ClassStats:
    """Sums over the images added so far. Images of which no label is known are left out.

    `populations` is 1 if what is known of an image is known of all concepts. Otherwise it is the number of concepts:
    each one then has means of its own, over the images that are known to show it or not to show it.
    """

    def __init__(self, n_latents: int, n_concepts: int, n_populations: int = 1):
        """Starts without images."""
        self.n_images: Int[np.ndarray, " populations"] = np.zeros(n_populations, np.int64)
        """Number of images with a known label."""
        self.n_positive: Int[np.ndarray, " concepts"] = np.zeros(n_concepts, np.int64)
        """Number of images that show the concept."""
        self.n_firing: Int[np.ndarray, "latents populations"] = np.zeros((n_latents, n_populations), np.int64)
        """Number of images with a known label and a value above 0."""
        self.mean: Float[np.ndarray, "latents populations"] = np.zeros((n_latents, n_populations))
        self.squares: Float[np.ndarray, "latents populations"] = np.zeros((n_latents, n_populations))
        """Sum of the squared distances from the mean."""
        self.class_total: Float[np.ndarray, "latents concepts"] = np.zeros((n_latents, n_concepts))
        """Sum of the values on the images that show the concept."""
        self.class_firing: Int[np.ndarray, "latents concepts"] = np.zeros((n_latents, n_concepts), np.int32)
        """Number of images that show the concept and have a value above 0."""

    @classmethod
    def of(cls, codes: Any, labels: Any) -> ClassStats:
        """Of one block of images. Arguments and errors as in `add`, but labels may also be what `Labels.of` takes."""
        labels = Labels.of(labels)
        matrix = sparse_codes(codes)
        stats = cls(matrix.shape[1], labels.n_concepts, labels.known.shape[1])
        stats.add(matrix, labels)
        return stats

    def add(self, codes: Any, labels: Labels) -> None:
        """Adds a block of images.

        Args:
            codes: `[images, latents]`, as `sparse_codes` takes them.
            labels: of these images, `Labels.take` of those of all images.

        Raises:
            UsageError: the two differ in their number of images, or from the statistics in latents or concepts.
        """
        matrix = sparse_codes(codes)
        check_same_rows(matrix, labels)
        self._check_shape((matrix.shape[1], labels.n_concepts))
        if not labels.labelled.all():
            rows = np.flatnonzero(labels.labelled)
            matrix, labels = matrix[rows], labels.take(rows)

        firing = matrix.copy()
        firing.data = (matrix.data > 0).astype(np.float64)
        known = labels.known.astype(np.float64)
        self._join(known.sum(axis=0), *_moments(matrix, known))
        self.n_firing = self.n_firing + (firing.T @ known).astype(np.int64)
        self.n_positive += labels.n_positive
        for target, values in ((self.class_total, matrix), (self.class_firing, firing)):
            sums = (values.T @ labels.positive).tocoo()
            target[sums.coords] += sums.data.astype(target.dtype)

    def merge(self, other: ClassStats) -> None:
        """Adds the statistics of other images, for the same latents and concepts. Raises UsageError for others."""
        self._check_shape(other.class_total.shape)
        self._join(other.n_images, other.mean, other.squares)
        self.n_firing = self.n_firing + other.n_firing
        self.n_positive += other.n_positive
        self.class_total += other.class_total
        self.class_firing += other.class_firing

    def _check_shape(self, shape: tuple[int, int]) -> None:
        if shape != self.class_total.shape:
            raise UsageError(
                "the codes and labels are of {} latents and {} concepts, but the statistics of {} and {}; give blocks "
                "of the same latents and concepts".format(*shape, *self.class_total.shape)
            )

    def _join(self, n: np.ndarray, mean: np.ndarray, squares: np.ndarray) -> None:
        # Raw sums of squares would lose the spread of values far from 0 (Chan, Golub and LeVeque 1983, eq. 2.1).
        total = self.n_images + n.astype(np.int64)
        share = n / np.maximum(total, 1)
        distance = mean - self.mean
        self.squares = self.squares + squares + distance**2 * (self.n_images * share)
        self.mean = self.mean + distance * share
        self.n_images = total


def merged(parts: Iterable[ClassStats]) -> ClassStats:
    """One statistic of several, merged in the order in which they come: that of the images, for the same bits always.

    The first one grows; the others stay as they are. Raises UsageError if there are none.
    """
    parts = iter(parts)
    first = next(parts, None)
    if first is None:
        raise UsageError("there are no statistics to merge; give at least one")
    for part in parts:
        first.merge(part)
    return first


def _moments(
    matrix: Float[SparseMatrix, "images latents"], known: Float[np.ndarray, "images populations"]
) -> tuple[Float[np.ndarray, "latents populations"], Float[np.ndarray, "latents populations"]]:
    """Means and sums of squared distances from them, of the known images of one block."""
    n = known.sum(axis=0)
    shift = matrix.sum(axis=0) / max(1, matrix.shape[0])  # near every mean, so that little is cancelled below
    shifted, squared, listed = matrix.copy(), matrix.copy(), matrix.copy()
    shifted.data = matrix.data - shift[matrix.indices]
    squared.data = shifted.data**2
    listed.data = np.ones(len(matrix.data))
    n_zero = n - listed.T @ known
    first = shifted.T @ known - n_zero * shift[:, None]
    second = squared.T @ known + n_zero * shift[:, None] ** 2
    offset = first / np.maximum(n, 1)
    return np.where(n, shift[:, None] + offset, 0.0), np.maximum(second - first * offset, 0.0)
