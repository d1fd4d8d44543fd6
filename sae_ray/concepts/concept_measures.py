"""How well a few neurons tell each concept: probes, sparse probing and FMS, fitted on one half, judged on the other."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_ray.concepts.feature_monosemanticity import FMS, fms
from sae_ray.concepts.inputs import SparseMatrix
from sae_ray.concepts.labels import Labels
from sae_ray.concepts.logistic_probes import JudgedProbes, best_probes, judge_probes, latent_probes
from sae_ray.concepts.sparse_probes import sparse_probing
from sae_ray.concepts.splits import Halves, balanced_rows
from sae_ray.seeds import derived_seed

if TYPE_CHECKING:
    from jaxtyping import Float, Int

KS = (1, 2, 5)
"""Numbers of neurons of the sparse probes."""
MOST_POSITIVES = 1000
"""Images of a concept that sparse probing and FMS draw at most; as many others are added."""
POSITIVES_IN_ALL = 20_000
"""Over all drawn concepts, or 100 of each if that is more: trees of a thousand raw neurons and 2,000 images take
seconds."""


class ConceptMeasures(NamedTuple):
    """Of all concepts; NaN, or -1 for numbers, for those that were not drawn or have too few images."""

    probe_neuron: Int[np.ndarray, " concepts"]
    probes: JudgedProbes
    n_rows: Int[np.ndarray, " concepts"]
    """Balanced images that sparse probing and FMS divide into two halves."""
    sparse: Float[np.ndarray, "concepts ks"]
    """Held-out accuracies for `KS`."""
    heldout: list[FMS | None]
    fitted: list[FMS | None]

    def fms(self, evaluation: str, p: int) -> Float[np.ndarray, " concepts"]:
        """FMS@p under one of the two evaluations, `heldout` or `fitted`."""
        return np.array([np.nan if one is None else one.fms[p - 1] for one in getattr(self, evaluation)])

    def of_trees(self, value: Callable[[FMS], float], missing: float = np.nan) -> np.ndarray:
        """Something of the held-out FMS of each concept."""
        return np.array([missing if one is None else value(one) for one in self.heldout])


def drawn_concepts(labels: Labels, n: int, seed: int) -> Int[np.ndarray, " drawn"]:
    """At most n concepts, ascending: the same ones for every SAE, whatever other concepts there are."""
    order = sorted(range(labels.n_concepts), key=lambda one: derived_seed(seed, f"drawn: {labels.names[one]}"))
    return np.array(sorted(order[:n]), np.int64)


def concept_measures(
    codes: SparseMatrix,
    labels: Labels,
    split: Halves,
    candidates: Int[np.ndarray, "concepts n"],
    drawn: Int[np.ndarray, " drawn"],
    seed: int,
    measures: Collection[str] = ("probes", "sparse_probing", "fms"),
    evaluations: Collection[str] = ("heldout", "fitted"),
) -> ConceptMeasures:
    """Measures the drawn concepts one after the other.

    Args:
        codes: `[images, neurons]`, CSC of float64.
        labels: of the same images.
        split: `halves` of the labels.
        candidates: the neurons whose probes are compared, -1 in unused places.
        drawn: the concepts to measure.
        seed: the study's.
        measures: some of the three.
        evaluations: of FMS.
    """
    n = labels.n_concepts
    rows_of = codes.tocsr()
    found = ConceptMeasures(
        probe_neuron=np.full(n, -1),
        probes=JudgedProbes(*(np.full(n, np.nan) for _ in JudgedProbes._fields)),
        n_rows=np.full(n, -1),
        sparse=np.full((n, len(KS)), np.nan),
        heldout=[None] * n,
        fitted=[None] * n,
    )
    in_fitted = np.zeros(labels.n_images, bool)
    in_fitted[split.fitted] = True
    max_positives = min(MOST_POSITIVES, max(100, POSITIVES_IN_ALL // max(1, len(drawn))))
    for concept in drawn.tolist():
        shown = labels.of_concept(concept)
        if "probes" in measures:
            _probe(found, concept, codes, shown, split, candidates[concept])
        rows = balanced_rows(labels, concept, seed, max_positives=max_positives)
        if rows is None or not {"sparse_probing", "fms"} & set(measures):
            continue
        found.n_rows[concept] = len(rows)
        chosen, truth = rows_of[rows], shown[rows]
        fitted, judged = np.flatnonzero(in_fitted[rows]), np.flatnonzero(~in_fitted[rows])
        if "sparse_probing" in measures and len(np.unique(truth[fitted])) == 2 and len(judged):
            probed = sparse_probing(chosen, truth, fitted, judged, ks=KS)
            found.sparse[concept] = [one.accuracy for one in probed]
        if "fms" in measures:
            own_seed = derived_seed(seed, labels.names[concept])
            if "heldout" in evaluations:
                found.heldout[concept] = fms(chosen, truth, evaluation="heldout", seed=own_seed)
            if "fitted" in evaluations:
                found.fitted[concept] = fms(chosen, truth, evaluation="fitted")
    return found


def _probe(
    found: ConceptMeasures,
    concept: int,
    codes: SparseMatrix,
    shown: Float[np.ndarray, " images"],
    split: Halves,
    candidates: Int[np.ndarray, " n"],
) -> None:
    candidates = np.sort(candidates[candidates >= 0])
    if not len(candidates):
        return
    columns, labels = codes[:, candidates].tocsr(), Labels.of(shown[:, None])
    known = labels.take(split.fitted)
    best = best_probes([latent_probes(columns[split.fitted], known)], known)
    if best.latent[0] >= 0:
        found.probe_neuron[concept] = candidates[best.latent[0]]
        judged = judge_probes(best, columns[split.judged], labels.take(split.judged))
        for target, value in zip(found.probes, judged, strict=True):
            target[concept] = value[0]
