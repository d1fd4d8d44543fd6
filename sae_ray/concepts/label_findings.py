"""What labels say of the neurons of an SAE and of the concepts, beside what they say when they are shuffled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae_ray.concepts.concept_measures import KS, ConceptMeasures, concept_measures, drawn_concepts
from sae_ray.concepts.config import Concepts
from sae_ray.concepts.findings import Findings, mean
from sae_ray.concepts.image_codes import ImageCodes
from sae_ray.concepts.label_scoring import label_summary
from sae_ray.concepts.labels import Labels
from sae_ray.concepts.neuron_measures import NeuronMeasures, concept_purity, neuron_measures
from sae_ray.concepts.splits import Halves, halves, shuffled_labels
from sae_ray.concepts.targeted_perturbation import tpp
from sae_ray.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

PS = (1, 5)
"""Of FMS@p."""
MOST_PERTURBED = 20
"""Concepts of TPP, whose cost grows with their square."""


class _ByLabels(NamedTuple):
    neurons: NeuronMeasures
    concepts: ConceptMeasures

    @property
    def columns(self) -> dict[str, Float[np.ndarray, " concepts"]]:
        """Scores of the concepts that also exist for shuffled labels."""
        return {
            "rho": self.neurons.best_rho,
            "probe_r": self.concepts.probes.r,
            "average_precision": self.concepts.probes.average_precision,
            **{f"sparse_{k}": self.concepts.sparse[:, place] for place, k in enumerate(KS)},
            **{f"fms_{p}": self.concepts.fms("heldout", p) for p in PS},
        }

    @property
    def figures(self) -> dict[str, Any]:
        figures = label_summary(self.neurons.scores)._asdict()
        del figures["n_live"]  # of the labelled images alone
        figures |= {name: mean(values) for name, values in self.columns.items()}
        probes = self.concepts.probes
        return figures | {"probe_r": probes.probe_r, "coverage": probes.coverage()}


def usable_labels(labels: Labels, min_images: int) -> Labels | None:
    """Those of the concepts that at least `min_images` images show, and as many do not; None if there is none."""
    n_known = np.broadcast_to(labels.known.sum(axis=0), labels.n_positive.shape)
    enough = np.minimum(labels.n_positive, n_known - labels.n_positive) >= min_images
    return some_concepts(labels, np.flatnonzero(enough)) if enough.any() else None


def some_concepts(labels: Labels, chosen: Int[np.ndarray, " chosen"]) -> Labels:
    """The labels of some concepts. Images that show none of them stay known."""
    known = labels.known if labels.known.shape[1] == 1 else labels.known[:, chosen]
    return Labels(tuple(labels.names[place] for place in chosen), labels.positive[:, chosen], known)


def add_labels(
    found: Findings,
    images: ImageCodes,
    top_images: Int[np.ndarray, "neurons n"],
    labels: Labels,
    split: Halves,
    settings: Concepts,
    seed: int,
) -> None:
    """All scores by labels. What is fitted or chosen is so on one half and judged on the other.

    Args:
        found: what to add them to.
        images: the codes.
        top_images: positions of the images on which each neuron is largest, -1 in unused places.
        labels: of these images, usable ones.
        split: their `halves`.
        settings: what is measured.
        seed: the study's.
    """
    drawn = drawn_concepts(labels, settings.max_concepts, seed)
    shuffled = shuffled_labels(labels, seed)
    real = _by_labels(images, labels, split, drawn, settings, seed, ("heldout", "fitted"))
    twin = _by_labels(images, shuffled, halves(shuffled, seed), drawn, settings, seed, ("heldout",))

    scores, concepts = real.neurons.scores, real.concepts
    names = np.array([*labels.names, None], object)  # the last one is that of -1
    found.neurons |= {
        "n_firing": scores.n_firing,
        "concept": names[scores.best_concept],
        "rho": scores.best_rho,
        "second_rho": scores.second_rho,
        "margin": scores.gap,
        "shuffled_rho": twin.neurons.scores.best_rho,
        "judged_rho": real.neurons.judged_rho,
        "average_precision": real.neurons.average_precision,
        "entropy_mass": scores.entropy_mass,
        "entropy_balanced": scores.entropy_balanced,
        "entropy_rho": scores.entropy_rho,
    }
    found.concepts |= {
        "concept": labels.names,
        "n_images": labels.n_positive,
        "n_known": np.broadcast_to(labels.known.sum(axis=0), labels.n_positive.shape),
        "neuron": real.neurons.best.neuron[:, 0],
        **real.columns,
        **{f"shuffled_{name}": values for name, values in twin.columns.items()},
        "probe_neuron": concepts.probe_neuron,
        "n_rows": concepts.n_rows,
        "fms_neuron": concepts.of_trees(lambda one: one.root, -1),
        "fms_tied": concepts.of_trees(lambda one: one.n_tied_roots, -1),
        "fms_accuracy": concepts.of_trees(lambda one: one.accs[0]),
        "fms_local_1": concepts.of_trees(lambda one: one.local[0]),
        "fms_global": concepts.of_trees(lambda one: one.global_),
        **{f"fitted_fms_{p}": concepts.fms("fitted", p) for p in PS},
    }
    listed = real.neurons.listed
    row, rank = np.nonzero(listed.neuron >= 0)
    found.correlations |= {
        "concept": names[row],
        "rank": rank,
        "neuron": listed.neuron[row, rank],
        "rho": listed.value[row, rank],
    }
    found.counts |= {"labelled": int(labels.labelled.sum()), "concepts": labels.n_concepts, "drawn": len(drawn)}
    found.counts |= real.figures | {f"fitted_fms_{p}": mean(concepts.fms("fitted", p)) for p in PS}
    found.counts["shuffled"] = twin.figures
    found.neurons["purity"] = concept_purity(top_images, labels)
    found.counts |= _purities(found.neurons["purity"], top_images)
    found.counts["shuffled"] |= _purities(concept_purity(top_images, shuffled), top_images)


def _purities(purity: Float[np.ndarray, " neurons"], top_images: Int[np.ndarray, "neurons n"]) -> dict[str, float]:
    """Means over the neurons that fire, and over those with all top images: few images are pure by chance."""
    return {"purity": mean(purity), "purity_16": mean(purity[(top_images >= 0).all(axis=1)])}


def _by_labels(
    images: ImageCodes,
    labels: Labels,
    split: Halves,
    drawn: Int[np.ndarray, " drawn"],
    settings: Concepts,
    seed: int,
    evaluations: Sequence[str],
) -> _ByLabels:
    neurons = neuron_measures(images.codes, labels, split)
    candidates = neurons.candidates.neuron
    return _ByLabels(
        neurons,
        concept_measures(images.codes, labels, split, candidates, drawn, seed, settings.measures, evaluations),
    )


def add_tpp(
    found: Findings,
    decoder: Float[np.ndarray, "latents d"],
    images: ImageCodes,
    labels: Labels,
    split: Halves,
    settings: Concepts,
    seed: int,
) -> None:
    """TPP of an SAE whose images have one activation each; nothing if no concept has enough images in both halves."""
    drawn = drawn_concepts(labels, min(settings.max_concepts, MOST_PERTURBED), seed)
    try:
        measured = tpp(images.activations, images.codes, decoder, some_concepts(labels, drawn), split, seed=seed)
    except UsageError:
        return
    found.counts |= {
        "tpp_ns": list(measured.ns),
        "tpp": _nullable(measured.tpp),
        "tpp_intended": _nullable(measured.intended),
        "tpp_unintended": _nullable(measured.unintended),
        "tpp_2": dict(zip(measured.ns, _nullable(measured.tpp), strict=True)).get(2),
    }


def _nullable(values: Float[np.ndarray, " some"]) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
