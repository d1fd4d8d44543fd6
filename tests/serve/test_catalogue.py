"""The names that the API tells of features, without a server."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from sae_ray.serve.api import _summary
from sae_ray.serve.catalogue import SaeEntry, _mostly, read_catalogue

from sae_ray.sae.formats import LATENTS_FILE
from sae_ray.scores.tables import ScoreTables
from sae_ray.steering.latent_names import LATENT_NAMES_SCHEMA, NAMES
from sae_ray.study.root import remember

CELL = "layer1.all-matryoshka_batch_topk-x2-k4"
NAMED = 3


@pytest.fixture(scope="module")
def entry(small_study: Path, plan_small_study, tiny_llava: str, tmp_path_factory: pytest.TempPathFactory) -> SaeEntry:
    """A study in which the LLaVA has named one feature."""
    directory = shutil.copytree(small_study, tmp_path_factory.mktemp("catalogue") / "study")
    plan = plan_small_study(directory, naming={})
    [naming] = [one for one in plan.namings if one.name == CELL]
    row = {"neuron": NAMED, "method": "vlm", "name": "Marsh bird", "score": 0.875}
    naming.step.folder.write_parquet(NAMES, pa.Table.from_pylist([row], LATENT_NAMES_SCHEMA))
    naming.step.finish(0.1, {})
    scores = ScoreTables(naming.scores.step.folder).scores
    latents = pa.table({"latent": scores.neuron, "max_token": scores.max_token})
    naming.sae.step.folder.write_parquet(LATENTS_FILE, latents)
    shutil.rmtree(plan.text_space.step.folder.path)  # its model has no tokenizer, so searches are by name alone
    remember(plan)
    return read_catalogue(str(plan.root), tiny_llava, None, [CELL])[CELL]


def test_a_feature_tells_its_name_and_how_it_was_found(entry: SaeEntry):
    told = _summary(entry.summary(NAMED))
    assert (told.name, told.name_method, told.name_score) == ("Marsh bird", "vlm", 0.875)
    assert told.label in ("red", "green", "<b>&blue\"'")
    other = next(index for index in entry.concepts if index != NAMED)
    told = _summary(entry.summary(other))
    assert told.name_method in ("soft_wpmi", "label")
    if told.name_method == "label":
        assert (told.name, told.name_score) == (told.label, told.purity)


def test_a_search_finds_names_and_labels(entry: SaeEntry):
    assert NAMED in [one.concept.latent for one in entry.search("marsh", None)]
    label = entry.summary(NAMED).label
    assert label is not None
    assert NAMED in [one.concept.latent for one in entry.search(label.upper(), None)]


def test_features_of_ignored_classes_come_last(entry: SaeEntry):
    labels = entry.pictures.labels["label_name"].to_pylist()
    ignored = _mostly(entry.top_images.image, [label == "green" for label in labels])
    for index in entry.concepts:
        top = [labels[image] for image in entry.top_images.image[index].tolist() if image >= 0]
        assert (index in ignored) == (top.count("green") > len(top) / 2)

    def order(of: SaeEntry, *asked) -> list[int]:
        return [one.concept.latent for one in of.search(*asked)]

    plain, ignoring = entry, replace(entry, ignored=ignored)
    best_first = order(plain, None, None)
    assert 0 < len(ignored & set(best_first)) < len(best_first)
    assert order(ignoring, None, None) == sorted(best_first, key=lambda index: index in ignored)
    assert order(ignoring, None, "ms") == order(plain, None, "ms") == best_first
    assert order(ignoring, "green", None) == order(plain, "green", None)
