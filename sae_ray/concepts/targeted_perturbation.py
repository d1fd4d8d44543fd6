"""TPP, targeted probe perturbation: do a concept's latents take its probe down, and no other one's?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae_ray.concepts.inputs import SparseMatrix, as_numpy, sparse_codes
from sae_ray.concepts.labels import Labels, check_same_rows
from sae_ray.concepts.splits import Halves, balanced_rows
from sae_ray.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

NS = (2, 5, 10, 20, 50, 100, 500)


class TPP(NamedTuple):
    """What is lost of the accuracy of linear probes on activations, for each number of latents set to 0."""

    ns: tuple[int, ...]
    concepts: Int[np.ndarray, " probed"]
    """The concepts that have enough images."""
    accuracy: Float[np.ndarray, " probed"]
    """Of the probes, before."""
    intended: Float[np.ndarray, " ns"]
    """Mean drop of the probe of the concept whose latents were set to 0."""
    unintended: Float[np.ndarray, " ns"]
    """Mean drop of the other probes. NaN if there are none."""

    @property
    def tpp(self) -> Float[np.ndarray, " ns"]:
        return self.intended - self.unintended


def tpp(
    activations: Any,
    codes: Any,
    decoder: Any,
    labels: Any,
    split: Halves,
    *,
    ns: Sequence[int] = NS,
    seed: int = 0,
    effects: Float[np.ndarray, "concepts latents"] | None = None,
) -> TPP:
    """Targeted probe perturbation of an SAE (adamkarvonen/SAEBench at 8042bb3; Karvonen et al., arXiv 2411.18895).

    Each concept has a linear probe, fitted on as many of its images as others. A latent's effect on it is its
    difference of means, if above 0, times the product of its decoder row and the probe. The n latents of the largest
    effects above 0 are set to 0, and what the SAE does not reconstruct is kept: `x − Σ code · decoder row`, as the
    intervention `ablate` with `error="keep"` does. Accuracies are those of the judged half, of as many images of either
    kind. A perfect SAE reaches 1/2.

    All probes are tried against all concepts' latents, so the cost grows with the square of the number of concepts;
    choose some of a thousand.

    Args:
        activations: `[images, d]`, as the SAE takes them.
        codes: `[images, latents]` of the same images: torch, numpy or scipy.sparse.
        decoder: `[latents, d]`.
        labels: `[images, concepts]`, `[images]` classes, or `Labels`.
        split: Which images probes and effects are fitted on, and which ones are judged (`halves`).
        ns: Numbers of latents.
        seed: The study's; draws the images that do not show the concept.
        effects: In place of those of the formula: random numbers above 0, for what an unchosen set of latents does.

    Raises:
        UsageError: sizes do not fit, or no concept has enough images in both halves.
    """
    from scipy.sparse import csr_array
    from sklearn.linear_model import LogisticRegression

    inputs, matrix, rows_out = as_numpy(activations), sparse_codes(codes), as_numpy(decoder)
    labels = Labels.of(labels)
    check_same_rows(matrix, labels)
    if inputs.shape[:1] != matrix.shape[:1] or rows_out.shape != (matrix.shape[1], inputs.shape[-1]):
        raise UsageError(
            f"activations {inputs.shape}, codes {matrix.shape} and decoder {rows_out.shape} do not fit; they must be "
            "[images, d], [images, latents] and [latents, d]"
        )
    drawn: dict[int, Halves] = {}
    for concept in range(labels.n_concepts):
        places = [balanced_rows(labels.take(half), concept, seed) for half in split]
        if places[0] is not None and places[1] is not None:
            drawn[concept] = Halves(split.fitted[places[0]], split.judged[places[1]])
    if not drawn:
        raise UsageError("no concept has at least 10 images, and 10 others, in both halves; give more labelled images")
    shown = {concept: labels.of_concept(concept) == 1 for concept in drawn}

    probes, chosen = [], []
    for concept, (fitted, _) in drawn.items():
        probe = LogisticRegression(C=1.0, max_iter=1000).fit(inputs[fitted], shown[concept][fitted])
        probes.append((probe.coef_[0], probe.intercept_[0]))
        effect = (
            effects[concept]
            if effects is not None
            else _effects(matrix[fitted], shown[concept][fitted], rows_out @ probe.coef_[0])
        )
        ranked = np.argsort(-effect, kind="stable")
        chosen += [ranked[: min(n, np.count_nonzero(effect > 0))] for n in ns]

    # One column for each concept and number of latents.
    column = np.repeat(np.arange(len(chosen)), [len(latents) for latents in chosen])
    shape = (matrix.shape[1], len(chosen))
    switched_off = csr_array((np.ones(len(column)), (np.concatenate(chosen), column)), shape=shape)
    accuracy, drop = np.empty(len(drawn)), np.empty((len(drawn), len(drawn), len(ns)))  # probe, concept, n
    for place, (concept, (_, judged)) in enumerate(drawn.items()):
        weight, bias = probes[place]
        logit = inputs[judged] @ weight + bias
        share = matrix[judged].copy()
        share.data = share.data * (rows_out @ weight)[share.indices]
        without = logit[:, None] - (share @ switched_off).toarray()
        truth = shown[concept][judged]
        accuracy[place] = ((logit > 0) == truth).mean()
        drop[place] = (accuracy[place] - ((without > 0) == truth[:, None]).mean(axis=0)).reshape(len(drawn), len(ns))
    own = np.eye(len(drawn), dtype=bool)
    unintended = drop[~own].mean(axis=0) if len(drawn) > 1 else np.full(len(ns), np.nan)
    return TPP(tuple(ns), np.array(list(drawn)), accuracy, drop[own].mean(axis=0), unintended)


def _effects(codes: SparseMatrix, shown: np.ndarray, products: np.ndarray) -> Float[np.ndarray, " latents"]:
    return np.maximum(codes[shown].mean(axis=0) - codes[~shown].mean(axis=0), 0) * products
