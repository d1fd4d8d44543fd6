"""The names of neurons, the same wherever they are shown."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

import pyarrow as pa

from sae_ray.concepts.labelling import Concept
from sae_ray.concepts.naming import class_names
from sae_ray.concepts.tables import ConceptTables
from sae_ray.steering.latent_names import NAMES
from sae_ray.study.plan import StudyPlan

LABEL = "label"
"""The method of a neuron that is named by the most common class of its top images."""


class Name(NamedTuple):
    """A neuron's name."""

    name: str
    method: str
    """How it was found: `soft_wpmi`, say, or `label`."""
    score: float | None
    """How good it is, in the unit of the method; for `label` the share of the top images that are of the class."""


@dataclass(frozen=True)
class NeuronNames:
    """The names of the neurons of an SAE: those of the LLaVA, else those from a vocabulary, else their labels."""

    found: dict[int, Name]
    class_name: dict[str, str]

    @classmethod
    def read(cls, plan: StudyPlan, cell: str, label_names: Iterable[str | None]) -> Self:
        """Of one SAE, as far as stages are done.

        Args:
            cell: The SAE's name.
            label_names: Of all images; None for those without a label.

        Raises:
            SaeRayError: a table is damaged.
        """
        found: dict[int, Name] = {}
        for one in plan.concepts:
            if one.name == cell and one.step.finished:
                found |= _by_words(ConceptTables(one.step.folder))
        for one in plan.namings:
            if one.name == cell and one.step.finished:
                found |= _by_llava(one.step.folder.read_parquet(NAMES))
        return cls(found, class_names(name for name in label_names if name is not None))

    def of(self, concept: Concept) -> Name | None:
        """The name of a live neuron; None if it has none, and its top images have no labels."""
        if concept.latent in self.found:
            return self.found[concept.latent]
        label = self.label_of(concept)
        return None if label is None else Name(label, LABEL, concept.purity)

    def label_of(self, concept: Concept) -> str | None:
        """The readable name of the most common class of its top images."""
        return None if concept.label is None else self.class_name.get(concept.label, concept.label)


def _by_words(tables: ConceptTables) -> dict[int, Name]:
    neurons = tables.neurons
    columns = neurons.neuron.tolist(), neurons.name, neurons.name_method, neurons.name_score.tolist()
    return {
        neuron: Name(name, method, None if math.isnan(score) else score)
        for neuron, name, method, score in zip(*columns, strict=True)
        if name is not None
    }


def _by_llava(table: pa.Table) -> dict[int, Name]:
    """Of each latent the first name."""
    rows = (row for row in reversed(table.to_pylist()) if row["name"] is not None)
    return {row["neuron"]: Name(row["name"], row["method"], row["score"]) for row in rows}
