"""Uniqueness: whether different neurons have different top images (Pach et al., arXiv 2504.02821)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae_ray.concepts.inputs import as_numpy
from sae_ray.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

THRESHOLDS = np.arange(10)
"""Tenths of the Jaccard index that pairs are counted above."""
MAX_PAIRS = 20_000_000
"""Pairs that are listed, 12 bytes each. Where more share an image, those that share the most."""
_BLOCK_ENTRIES = 4_000_000
"""Entries of the incidence matrix times its transpose that are in memory at once, 8 to 16 bytes each."""


class Pairs(NamedTuple):
    """Pairs of live neurons that share a top image, `neuron_a` below `neuron_b`, sorted by both."""

    neuron_a: Int[np.ndarray, " pairs"]
    neuron_b: Int[np.ndarray, " pairs"]
    shared: Int[np.ndarray, " pairs"]
    """Number of images that are among the top images of both."""
    either: Int[np.ndarray, " pairs"]
    """Number of images that are among the top images of either."""

    @property
    def jaccard(self) -> Float[np.ndarray, " pairs"]:
        return self.shared / self.either


_NONE = Pairs(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int16), np.empty(0, np.int16))


class Uniqueness(NamedTuple):
    """What `uniqueness` finds."""

    counts: Int[np.ndarray, " 10"]
    """Number of pairs with a Jaccard index above 0, .1, … .9."""
    n_live: int
    n_pairs: int
    """All pairs of live neurons."""
    pairs: Pairs
    """Those that share `least_shared` images or more."""
    least_shared: int
    """1, unless more than `MAX_PAIRS` pairs share an image. `counts` are of all pairs in any case."""

    @property
    def shares(self) -> Float[np.ndarray, " 10"]:
        """`counts` by `n_pairs`; NaN without pairs."""
        return self.counts / self.n_pairs if self.n_pairs else np.full(len(self.counts), np.nan)


def uniqueness(top_images: Any, live: Any = None) -> Uniqueness:
    """Jaccard indices of the sets of top images, over all pairs of live neurons (ExplainableML/sae-for-vlm at 69e211d,
    `uniqueness.py`).

    Pairs that share no image, which are nearly all, take no time and no memory: a sparse matrix of neurons and images
    is multiplied by its transpose, in blocks of neurons. `shared_pairs` gives the blocks, which are independent.

    Args:
        top_images: `[neurons, n]`, different images of each neuron (any numbers that identify them), -1 in unused
            places.
        live: which neurons count, as a mask `[neurons]` or as their numbers. By default those with n images: one that
            fires on fewer has not shown what it stands for.

    Raises:
        UsageError: shapes do not fit, or an image appears twice for a neuron.
    """
    counts = np.zeros(len(THRESHOLDS), np.int64)
    kept: list[Pairs] = []
    least = 1
    incidence, neurons = _incidence(top_images, live)
    for pairs in _blocks(incidence, neurons):
        counts += count_above(pairs)
        kept.append(_at_least(pairs, least))
        while sum(len(one.shared) for one in kept) > MAX_PAIRS:
            least += 1
            kept = [_at_least(one, least) for one in kept]
    joined = Pairs(*(np.concatenate(column) for column in zip(_NONE, *kept, strict=True)))
    n_live = len(neurons)
    return Uniqueness(counts, n_live, n_live * (n_live - 1) // 2, joined, least)


def shared_pairs(top_images: Any, live: Any = None) -> Iterator[Pairs]:
    """All pairs that share an image, in blocks of `neuron_a`, ascending. Arguments as in `uniqueness`."""
    yield from _blocks(*_incidence(top_images, live))


def count_above(pairs: Pairs) -> Int[np.ndarray, " 10"]:
    """Number of pairs with a Jaccard index above 0, .1, … .9; blocks add up.

    In whole numbers: shared / either > t / 10 if 10 shared > t either.
    """
    # Few numbers of images occur, so pairs are counted by these first.
    width = int(pairs.either.max(initial=0)) + 1
    of_both = np.bincount(pairs.shared.astype(np.int64) * width + pairs.either)
    shared, either = np.divmod(np.arange(len(of_both)), width)
    return np.array([of_both[10 * shared > tenth * either].sum() for tenth in THRESHOLDS], np.int64)


def live_neurons(top_images: Int[np.ndarray, "neurons n"], live: Any) -> Bool[np.ndarray, " neurons"]:
    """A mask of the neurons that count: those given as a mask or as numbers, or by default those without a -1.

    Raises UsageError if there are neither as many values as neurons nor numbers of neurons.
    """
    if live is None:
        return np.asarray((top_images >= 0).all(axis=1))
    given = as_numpy(live)
    if given.dtype == bool and given.shape == (len(top_images),):
        return given
    mask = np.zeros(len(top_images), bool)
    if given.dtype.kind not in "iu" or given.min(initial=0) < 0 or given.max(initial=-1) >= len(mask):
        raise UsageError(
            f"live has the shape {given.shape} and the type {given.dtype}; give one truth value for each of the "
            f"{len(mask)} neurons, or numbers of neurons"
        )
    mask[given] = True
    return mask


def checked_top_images(top_images: Any) -> Int[np.ndarray, "neurons n"]:
    """Raises UsageError unless it is a matrix of whole numbers."""
    values = as_numpy(top_images)
    if values.ndim != 2 or values.dtype.kind not in "iu":
        raise UsageError(
            f"top_images has the shape {values.shape} and the type {values.dtype}; give whole numbers [neurons, n]"
        )
    return values


def _incidence(top_images: Any, live: Any) -> tuple[Any, Int[np.ndarray, " live"]]:
    """Which live neuron has which top image, as a CSR matrix of ones, and the numbers of its neurons."""
    from scipy.sparse import csr_array

    top = checked_top_images(top_images)
    neurons = np.flatnonzero(live_neurons(top, live))
    row, rank = np.nonzero(top[neurons] >= 0)
    images, column = np.unique(top[neurons][row, rank], return_inverse=True)
    shape = (len(neurons), len(images))
    incidence = csr_array((np.ones(len(row), np.int32), (row, column)), shape=shape)
    if incidence.nnz < len(row):
        twice = neurons[np.flatnonzero(incidence.sum(axis=1) > np.diff(incidence.indptr))[0]]
        raise UsageError(f"top_images lists an image twice for neuron {twice}; list every image once")
    return incidence, neurons


def _blocks(incidence: Any, neurons: Int[np.ndarray, " live"]) -> Iterator[Pairs]:
    transposed = incidence.T.tocsr()
    sizes = np.diff(incidence.indptr)
    # How many entries a row of the product has at most: the neurons of each of its images.
    entries = np.cumsum(incidence @ np.diff(transposed.indptr).astype(np.int64))
    start = 0
    while start < len(neurons):
        before = entries[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(entries, before + _BLOCK_ENTRIES, side="right")))
        product = incidence[start:end] @ transposed
        product.sort_indices()
        product = product.tocoo()
        a, b = product.coords[0] + start, product.coords[1]
        above = b > a
        a, b, shared = a[above], b[above], product.data[above]
        either = sizes[a] + sizes[b] - shared
        yield Pairs(
            neurons[a].astype(np.int32), neurons[b].astype(np.int32), shared.astype(np.int16), either.astype(np.int16)
        )
        start = end


def _at_least(pairs: Pairs, shared: int) -> Pairs:
    if shared == 1:
        return pairs
    kept = pairs.shared >= shared
    return Pairs(*(column[kept] for column in pairs))
