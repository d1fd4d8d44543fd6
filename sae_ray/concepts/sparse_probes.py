"""Probes on a few latents, and the share of a neuron's top images that one class has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae_ray.concepts.inputs import as_numpy, sparse_codes
from sae_ray.errors import UsageError
from sae_ray.scores.scoring import majority

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class SparseProbe(NamedTuple):
    """A probe on the latents that differ most."""

    latents: Int[np.ndarray, " k"]
    """Ascending; fewer than k if there are fewer."""
    accuracy: float
    """On the judged rows."""


def sparse_probing(
    codes: Any,
    labels: Any,
    fitted: Int[np.ndarray, " fitted"],
    judged: Int[np.ndarray, " judged"],
    *,
    ks: Sequence[int] = (1, 2, 5),
) -> list[SparseProbe]:
    """Held-out accuracy of a logistic probe of one concept on k latents, for each k.

    The latents are those whose mean differs most, in absolute value, between rows that show the concept and others. The
    probe has an L2 penalty (scikit-learn, C = 1, 1,000 iterations). As in the sparse probing of SAEBench
    (adamkarvonen/SAEBench at 8042bb3; Gurnee et al., arXiv 2305.01610). Concepts are independent. Draw as many rows of
    either label (`balanced_rows`), and give the raw activations in place of the codes for a comparison with as many raw
    coordinates.

    Args:
        codes: `[rows, latents]`: torch, numpy or scipy.sparse.
        labels: `[rows]` of 0 and 1.
        fitted: The rows to choose latents by and fit the probe on.
        judged: The rows that the accuracy is of.
        ks: Numbers of latents.

    Raises:
        UsageError: codes and labels have different numbers of rows, or the fitted rows are all of one label.
    """
    from sklearn.linear_model import LogisticRegression

    matrix, shown = sparse_codes(codes), as_numpy(labels).astype(bool)
    if shown.shape != matrix.shape[:1]:
        raise UsageError(f"labels has the shape {shown.shape} for {matrix.shape[0]} rows of codes; give one per row")
    known, known_shown = matrix[fitted], shown[fitted]
    if known_shown.all() or not known_shown.any():
        raise UsageError("the fitted rows are all of one label; give rows of both")
    difference = known[known_shown].mean(axis=0) - known[~known_shown].mean(axis=0)
    ranked = np.argsort(-np.abs(difference), kind="stable")
    found = []
    for k in ks:
        latents = np.sort(ranked[:k])
        probe = LogisticRegression(C=1.0, max_iter=1000)
        probe.fit(known[:, latents].toarray(), known_shown)
        accuracy = probe.score(matrix[judged][:, latents].toarray(), shown[judged])
        found.append(SparseProbe(latents, float(accuracy)))
    return found


def purity(
    top_images: Int[np.ndarray, "neurons k"], classes: Int[np.ndarray, " images"]
) -> Float[np.ndarray, " neurons"]:
    """Share of the commonest class in the k top images of each neuron (purity@k).

    Args:
        top_images: Their positions; -1 in unused places, which do not count.
        classes: Class of each image; negative for none.

    Returns:
        NaN for a neuron without top images.
    """
    neuron, rank = np.nonzero(top_images >= 0)
    _, share = majority(neuron, classes[top_images[neuron, rank]], len(top_images))
    return np.where((top_images >= 0).any(axis=1), share, np.nan)
