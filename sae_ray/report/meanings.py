"""What was measured of the meaning of a cell's neurons, and the data of it that the pages load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sae_ray.concepts.naming import class_names, names
from sae_ray.concepts.tables import ConceptScores, ConceptTables
from sae_ray.report.names import Named
from sae_ray.report.neurons import Neurons
from sae_ray.report.packing import nullable, packed, write_data
from sae_ray.study.plan import StudyPlan

if TYPE_CHECKING:
    from jaxtyping import Int

MOST_NEURONS = 65_536
"""Per cell, first of the order, on the page of concepts. Each takes some 100 bytes of what the page loads."""
MOST_CONCEPTS = 2000
"""Per cell, those with the highest held-out correlation. Each takes some 500 bytes."""


class Score(NamedTuple):
    """A score of neurons."""

    key: str
    """For the pages; a column of `NEURONS_SCHEMA`, or one of the cell's index."""
    title: str
    words: str
    """What it tells."""
    logarithmic: bool = False
    """Whether its axis is."""


INDEXED = (
    Score("ms", "MonoSemanticity", "How alike the judge finds the held-out images on which the neuron is active."),
    Score("frequency", "share of images it fires on", "Of the held-out images.", True),
    Score("max", "largest value on an image", "Of the held-out images, in the unit of the activations.", True),
    Score("support", "images above its minimum", "Held-out images that MonoSemanticity rests on.", True),
    Score("share", "share of top images of one class", "Of the images that are shown, by their commonest class."),
)
"""Scores that are in the cell's index."""
MEASURED = (
    Score(
        "rho",
        "ρ with its concept",
        "Correlation with the concept that it correlates with most, on all labelled images.",
    ),
    Score("second_rho", "ρ with the next concept", "Correlation with the second best concept."),
    Score("margin", "ρ ahead of the next concept", "How far its concept is ahead of the second best one."),
    Score("shuffled_rho", "ρ with shuffled labels", "The largest correlation with shuffled labels: what chance gives."),
    Score(
        "judged_rho", "ρ, held out", "Correlation on one half of the images with the concept that is best on the other."
    ),
    Score(
        "average_precision",
        "average precision",
        "How high its value ranks the images of that concept, on the same half; 1 is perfect.",
    ),
    Score(
        "entropy_balanced",
        "entropy over concepts",
        "0 if its mean value is above 0 for one concept only, 1 if it is the same for all.",
    ),
    Score("entropy_mass", "entropy of its mass", "The same for sums over images, so that common concepts weigh more."),
    Score("entropy_rho", "entropy of correlations", "The same for the correlations above 0."),
    Score(
        "purity",
        "purity of 16 top images",
        "Share of the commonest concept in its held-out top images; high by chance where it fires on few.",
    ),
    Score(
        "spatial", "spatial coherence", "Moran's I of its patches: near 1 if it marks regions, about 0 if it is noise."
    ),
    Score("overlap", "overlap with another neuron", "Largest share of top images in common (Jaccard index)."),
    Score("coherence", "coherence", "Largest |cosine| of its decoder row with another one; near 1 for twins."),
    Score("coherence_aip", "coherence, atomic product", "The same under the inner product that whitens activations."),
    Score("k_unique", "k that coherence allows", "The largest L0 up to which such coherence makes codes unique."),
    Score("stability", "stability", "Cosine with its counterpart in the SAE of another seed."),
    Score(
        "name_score",
        "SoftWPMI of its word",
        "Of its name from the vocabulary, which may not be the one that is shown. Comparable within one cell only.",
    ),
    Score("name_margin", "word ahead of the next", "That score less the one of the next best word."),
    Score("lca_mean", "depth in the taxonomy", "Mean number of ranks that two of its held-out top images share."),
)
"""Scores of `NEURONS_SCHEMA`, all those with a fraction, and of `HIERARCHY_SCHEMA`."""


@dataclass(frozen=True, eq=False)
class Meaning:
    """What was measured of one cell."""

    cell: Neurons
    counts: dict[str, Any]
    """The figures of the whole, from `step.json`."""
    tables: ConceptTables
    class_name: Mapping[str, str]
    """Concept -> its readable name, of those that have one."""

    @property
    def name(self) -> str:
        return self.cell.name

    @cached_property
    def shown(self) -> Int[np.ndarray, " shown"]:
        """The neurons on the page of concepts."""
        return self.cell.order[:MOST_NEURONS]

    @cached_property
    def scores(self) -> list[Score]:
        """Those of `MEASURED` that a neuron of the cell has."""
        return [one for one in MEASURED if not np.isnan(self.tables.score(one.key)[self.cell.order]).all()]

    def title(self, concept: str) -> str:
        """A concept as it is shown, what matters first: `tench, Tinca tinca (n01440764)`."""
        name = self.class_name.get(concept, concept)
        return concept if name == concept else f"{name} ({concept})"

    def fits(self, named: Named) -> Int[np.ndarray, " named"]:
        """1 where a name is that of the neuron's concept, 0 where it is not, -1 where it has no concept."""
        concepts = self.tables.neurons.concept[self.cell.order[named.place]]
        pairs = zip(named.name, concepts, strict=True)
        found = [-1 if one is None else names(name, self.class_name.get(one, one)) for name, one in pairs]
        return np.array(found, np.int64)


def read_meanings(plan: StudyPlan, cells: Sequence[Neurons]) -> dict[str, Meaning]:
    """What was measured of each of these cells, by its name. Cells whose step is not done are left out."""
    by_name, found = {cell.name: cell for cell in cells}, {}
    for one in plan.concepts:
        record = one.step.record()
        if one.name in by_name and record is not None and record["status"] == "done":
            tables = ConceptTables(one.step.folder)
            label_names = {*one.images.labels["label_name"].unique().to_pylist(), *tables.concepts.concept} - {None}
            found[one.name] = Meaning(by_name[one.name], record["counts"], tables, class_names(label_names))
    return found


def meaning_of(meaning: Meaning, neurons: Int[np.ndarray, " some"]) -> list[dict[str, Any]]:
    """What the page of each of these neurons shows: its concept, and its scores in the order of `Meaning.scores`."""
    columns = meaning.tables.neurons
    scores = np.array([meaning.tables.score(one.key)[neurons] for one in meaning.scores]).reshape(-1, len(neurons))
    return [
        {"concept": concept and meaning.title(concept), "scores": values}
        for concept, values in zip(columns.concept[neurons], nullable(scores.T), strict=True)
    ]


def write_meaning(folder: Path, meaning: Meaning, named: Sequence[Named]) -> None:
    """Writes what the page of concepts loads of a cell."""
    cell = meaning.name
    write_data(folder, f"{cell}/concepts", _concepts(meaning))
    for one in meaning.scores:
        write_data(folder, f"{cell}/scores/{one.key}", packed(meaning.tables.score(one.key)[meaning.shown], "<f4"))
    write_data(folder, f"{cell}/names", [_names(meaning, one) for one in named])


def _concepts(meaning: Meaning) -> dict[str, Any]:
    """The concepts, best first, with their scores and best neurons, and the concept of every neuron."""
    table, best = meaning.tables.concepts, meaning.tables.correlations
    order = np.lexsort((np.arange(len(table.concept)), -np.nan_to_num(table.rho, nan=-2.0)))[:MOST_CONCEPTS]
    listed: dict[str, list] = {str(concept): [] for concept in table.concept}
    for concept, neuron, rho in zip(best.concept, best.neuron.tolist(), nullable(best.rho), strict=True):
        listed[concept].append([neuron, rho])
    names = sorted(set(meaning.tables.neurons.concept[meaning.shown]) - {None})
    number = {name: place for place, name in enumerate(names)}
    of_neuron = [number.get(name, -1) for name in meaning.tables.neurons.concept[meaning.shown]]
    return {
        "n_concepts": len(table.concept),
        "scores": {key: nullable(getattr(table, key)[order]) for key in ConceptScores._fields if key != "concept"},
        "concept": [meaning.title(concept) for concept in table.concept[order]],
        "best": [listed[concept] for concept in table.concept[order]],
        "names": [meaning.title(name) for name in names],
        "of_neuron": packed(np.array(of_neuron), "<i4"),
    }


def _names(meaning: Meaning, named: Named) -> dict[str, Any]:
    kept = named.place < len(meaning.shown)
    words, word = np.unique(named.name[kept].astype(str), return_inverse=True)
    numbers = {key: getattr(named, key)[kept] for key in ("score", "margin", "agreement", "control_score")}
    return {
        "method": named.method,
        "words": words.tolist(),
        "place": packed(named.place[kept], "<i4"),
        "word": packed(word, "<i4"),
        "n_images": packed(named.n_images[kept], "<i4"),
        "fits": packed(meaning.fits(named)[kept], "<i4"),
        **{key: packed(values, "<f4") for key, values in numbers.items() if not np.isnan(values).all()},
    }
