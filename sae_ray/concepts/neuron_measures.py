"""What labels say of every neuron, in blocks of neurons, and which neurons stand out for each concept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_ray.concepts.correlations import correlation
from sae_ray.concepts.dissect import top_firing
from sae_ray.concepts.entropies import MIN_FIRING
from sae_ray.concepts.inputs import SparseMatrix
from sae_ray.concepts.label_scoring import LabelScores, label_scores
from sae_ray.concepts.labels import Labels
from sae_ray.concepts.ranking import average_precisions
from sae_ray.concepts.splits import Halves
from sae_ray.concepts.statistics import ClassStats, merged
from sae_ray.scores.statistics import neuron_blocks

if TYPE_CHECKING:
    from jaxtyping import Float, Int

LISTED = 16
"""Neurons listed for each concept."""
CANDIDATES = 32
"""Neurons that a concept's probe is chosen among: those that correlate with it most, with either sign."""


BLOCK_ENTRIES = 2**22
"""Codes of a block of neurons, which raw neurons have many of: 50 MB, held about ten times."""


class Leading(NamedTuple):
    """The neurons with the largest values of each concept, largest first."""

    neuron: Int[np.ndarray, "concepts n"]
    """-1 in unused places."""
    value: Float[np.ndarray, "concepts n"]
    """-inf in unused places."""

    @classmethod
    def of(cls, values: Float[np.ndarray, "neurons concepts"], n: int, first: int = 0) -> Leading:
        """Of a block of neurons, the first of which has the number `first`; the lower neuron first in ties.

        -inf stands for no value.
        """
        n = min(n, len(values))
        if not n:
            return cls(np.zeros((values.shape[1], 0), np.int64), np.zeros((values.shape[1], 0)))
        least = np.partition(values, len(values) - n, axis=0)[len(values) - n]
        larger, tied = values > least, values == least
        chosen = larger | (tied & (tied.cumsum(axis=0) <= n - larger.sum(axis=0)))  # n of each concept
        neuron = np.nonzero(chosen.T)[1].reshape(-1, n)
        value = np.take_along_axis(values.T, neuron, axis=1)
        return cls.merged([cls(np.where(np.isfinite(value), neuron + first, -1), value)], n)

    @classmethod
    def merged(cls, parts: Sequence[Leading], n: int) -> Leading:
        """Of all neurons; the lower neuron first in ties."""
        neuron, value = (np.concatenate(column, axis=1) for column in zip(*parts, strict=True))
        order = np.lexsort((neuron, -value), axis=1)[:, :n]
        return cls(np.take_along_axis(neuron, order, axis=1), np.take_along_axis(value, order, axis=1))


class NeuronMeasures(NamedTuple):
    """Of all neurons. NaN, or -1 for a concept, where a neuron fires on fewer than `MIN_FIRING` labelled images."""

    scores: LabelScores
    """On all labelled images."""
    judged_rho: Float[np.ndarray, " neurons"]
    """The correlation, on the judged half, with the concept that is best on the fitted half."""
    average_precision: Float[np.ndarray, " neurons"]
    """On the judged half, for the same concept."""
    listed: Leading
    """By the correlation on all labelled images."""
    candidates: Leading
    """By the absolute correlation on the fitted half."""
    best: Leading
    """One neuron per concept, by the correlation on the fitted half."""
    best_rho: Float[np.ndarray, " concepts"]
    """Its correlation on the judged half; NaN without one."""


def neuron_measures(codes: SparseMatrix, labels: Labels, split: Halves) -> NeuronMeasures:
    """Scores of all neurons by labels, in blocks of neurons that fit in 64 MB times a few.

    Args:
        codes: `[images, neurons]`, CSC of float64.
        labels: of the same images.
        split: `halves` of the labels: what is chosen is chosen on one and judged on the other.
    """
    blocks = list(_blocks(codes, labels, split))
    listed, candidates, best = (
        Leading.merged([getattr(block, name) for block in blocks], n)
        for name, n in (("listed", LISTED), ("candidates", CANDIDATES), ("best", 1))
    )
    judged_rho, average_precision = (
        np.concatenate([getattr(block, name) for block in blocks]) for name in ("judged_rho", "average_precision")
    )
    # Of the block that the best neuron is in.
    of_block = np.stack([block.best_rho for block in blocks])
    holds = np.stack([block.best.neuron[:, 0] == best.neuron[:, 0] for block in blocks])
    best_rho = np.where(best.neuron[:, 0] >= 0, of_block[holds.argmax(axis=0), np.arange(of_block.shape[1])], np.nan)
    scores = LabelScores.joined([block.scores for block in blocks])
    return NeuronMeasures(scores, judged_rho, average_precision, listed, candidates, best, best_rho)


def _blocks(codes: SparseMatrix, labels: Labels, split: Halves) -> Iterator[NeuronMeasures]:
    of_half = [labels.take(half) for half in split]
    for neurons in blocks_of(codes, labels.n_concepts):
        rows = codes[:, neurons.start : neurons.stop].tocsr()
        parts = [rows[half] for half in split]
        fitted, judged = (ClassStats.of(part, own) for part, own in zip(parts, of_half, strict=True))
        rho, judged_rho = correlation(fitted), correlation(judged)
        whole = merged([fitted, judged])
        rho[np.isnan(rho) | (whole.n_firing < MIN_FIRING)] = -np.inf
        concept = np.where(np.isfinite(rho.max(axis=1)), rho.argmax(axis=1), -1)
        places = np.arange(len(rho))
        best = Leading.of(rho, 1, neurons.start)
        chosen = np.maximum(best.neuron[:, 0] - neurons.start, 0)
        overall = correlation(whole)
        overall[np.isnan(overall) | (whole.n_firing < MIN_FIRING)] = -np.inf
        yield NeuronMeasures(
            scores=label_scores(whole),
            judged_rho=np.where(concept >= 0, judged_rho[places, concept], np.nan),
            average_precision=average_precisions(parts[1], of_half[1], concept),
            listed=Leading.of(overall, LISTED, neurons.start),
            candidates=Leading.of(np.where(np.isfinite(rho), np.abs(rho), -np.inf), CANDIDATES, neurons.start),
            best=best,
            best_rho=judged_rho[chosen, np.arange(rho.shape[1])],
        )


def top_positions(codes: SparseMatrix, n: int) -> Int[np.ndarray, "neurons n"]:
    """As `top_firing`, in blocks of neurons. Codes are CSC."""
    return np.concatenate([top_firing(codes[:, one.start : one.stop], n) for one in blocks_of(codes, 4 * n)])


def blocks_of(codes: SparseMatrix, width: int) -> Iterator[range]:
    """Ranges of neurons of CSC codes, for work that holds their codes several times and `width` numbers of each."""
    for neurons in neuron_blocks(codes.shape[1], width):
        start = neurons.start
        while start < neurons.stop:
            last = np.searchsorted(codes.indptr, codes.indptr[start] + BLOCK_ENTRIES, side="right") - 1
            end = min(neurons.stop, max(start + 1, int(last)))
            yield range(start, end)
            start = end


def concept_purity(top_images: Int[np.ndarray, "neurons k"], labels: Labels) -> Float[np.ndarray, " neurons"]:
    """Share of the commonest concept in the top images of each neuron, as `purity`, also of several concepts per image.

    NaN for a neuron without top images.
    """
    from scipy.sparse import csr_array

    found = []
    for neurons in neuron_blocks(len(top_images), labels.n_concepts):
        top = top_images[neurons.start : neurons.stop]
        row, rank = np.nonzero(top >= 0)
        incidence = csr_array((np.ones(len(row)), (row, top[row, rank])), shape=(len(top), labels.n_images))
        shown = (incidence @ labels.positive).max(axis=1).toarray()
        n = (top >= 0).sum(axis=1)
        found.append(np.where(n > 0, shown / np.maximum(n, 1), np.nan))
    return np.concatenate(found)
