"""Which name of a neuron is shown: the LLaVA's, else one from a vocabulary, else its label."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from sae_ray.concepts.labelling import Concept
from sae_ray.concepts.tables import NEURONS, NEURONS_SCHEMA, as_table
from sae_ray.steering.latent_names import LATENT_NAMES_SCHEMA, NAMES
from sae_ray.study.names import Name, NeuronNames
from sae_ray.study.plan import StudyPlan


@pytest.fixture(scope="module")
def plan(plan_small_study, tmp_path_factory: pytest.TempPathFactory) -> StudyPlan:
    return plan_small_study(tmp_path_factory.mktemp("named"), **{"concepts": {}, "naming": {}})


def concept(latent: int, label: str | None = "n02012849") -> Concept:
    return Concept(latent, label, 0.75, 20, 0.1, 2.0)


def name_by_words(plan: StudyPlan, cell: str) -> None:
    [one] = [one for one in plan.concepts if one.name == cell]
    columns = {
        "neuron": np.arange(4),
        "name": [None, "bird", "fish", None],
        "name_method": [None, "soft_wpmi", "soft_wpmi", None],
        "name_score": [np.nan, 12.5, np.nan, np.nan],
    }
    one.step.folder.write_parquet(NEURONS, as_table(columns, NEURONS_SCHEMA))
    one.step.finish(0.1, {})


def name_by_llava(plan: StudyPlan, cell: str) -> None:
    [one] = [one for one in plan.namings if one.name == cell]
    rows = [
        {"neuron": 1, "method": "vlm", "name": "crane", "score": 0.875},
        {"neuron": 3, "method": "vlm", "name": None},
        {"neuron": 1, "method": "steering", "name": "beak", "score": 1.0},
        {"neuron": 3, "method": "steering", "name": "egg"},
    ]
    one.step.folder.write_parquet(NAMES, pa.Table.from_pylist(rows, LATENT_NAMES_SCHEMA))
    one.step.finish(0.1, {})


def test_the_best_source_that_names_a_neuron_is_taken(plan: StudyPlan):
    [cell] = {one.name for one in plan.namings if "steering" in one.methods and "x2" in one.name}

    def shown() -> list[Name | None]:
        names = NeuronNames.read(plan, cell, ["n02012849 crane", None, "dog"])
        return [names.of(concept(latent)) for latent in range(4)]

    label = Name("crane", "label", 0.75)
    assert shown() == [label] * 4  # no stage is done
    name_by_words(plan, cell)
    assert shown() == [label, Name("bird", "soft_wpmi", 12.5), Name("fish", "soft_wpmi", None), label]
    name_by_llava(plan, cell)
    assert shown() == [
        label,
        Name("crane", "vlm", 0.875),
        Name("fish", "soft_wpmi", None),
        Name("egg", "steering", None),
    ]
    other = NeuronNames.read(plan, plan.namings[-1].name, ["dog"])
    assert (other.of(concept(1, None)), other.of(concept(1, "dog"))) == (None, Name("dog", "label", 0.75))
    assert other.label_of(concept(1, "unheard of")) == "unheard of"
