"""What a study gives the stage `concepts`: labels of its held-out images, their classes in a taxonomy, and words."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_ray.concepts.concept_files import read_concepts
from sae_ray.concepts.config import INATURALIST
from sae_ray.concepts.hierarchy import Path
from sae_ray.concepts.label_findings import usable_labels
from sae_ray.concepts.labels import Labels
from sae_ray.concepts.taxonomy import image_paths, inaturalist_taxonomy, read_taxonomy
from sae_ray.concepts.vocabulary import class_words, read_vocabulary
from sae_ray.encoders.sources import named_by
from sae_ray.study.plan import StudyPlan

if TYPE_CHECKING:
    from jaxtyping import Int


class Words(NamedTuple):
    """The names that neurons may get."""

    words: list[str]
    word_of: dict[str, str]
    """The word of each concept that has one among them."""


class Classes(NamedTuple):
    """What held-out images are classified as, with reconstructions in place of activations."""

    of_image: Int[np.ndarray, " images"]
    """By `image_index`; -1 for none."""
    words: list[str | None]
    """Of each class; None where it has no readable name."""


class Asked(NamedTuple):
    """What concepts are measured by, and what is said of that which they cannot be."""

    labels: Labels | None
    """Of all held-out images by `image_index`; None if there are none to measure by."""
    words: Words | None
    """None if there are none, or no model of the study embeds them."""
    paths: list[Path | None] | None
    """Of all held-out images by `image_index`; None without a taxonomy."""
    classes: Classes | None
    """None if splicing is not asked for, or there are fewer than two."""
    notes: list[str]


def asked(plan: StudyPlan) -> Asked:
    """Reads the labels and the vocabulary of a study with `[concepts]`.

    Raises:
        UsageError: a file cannot be read or does not fit the images; the message names its field.
        SaeRayError: the images are not listed yet.
    """
    settings = plan.study.concepts
    assert settings is not None, "it was asked for"
    images, notes = plan.images["heldout"], []
    if settings.file is None:
        labels = Labels.of_table(images.labels, settings.ignore_labels)
        label_names = sorted(set(images.labels["label_name"].to_pylist()) - {None, *settings.ignore_labels})
    else:
        with named_by("concepts.file", settings.file):
            labels = read_concepts(settings.file, images.folder, images.manifest["image_id"].to_pylist())
        label_names = list(labels.names)
    if usable_labels(labels, settings.min_images) is None:
        notes.append(
            f"{labels.n_concepts} concept(s) of held-out images, none with {settings.min_images} images that show it "
            f"and as many that do not: what needs labels is skipped"
        )
        labels = None
    paths = _paths(plan) if settings.taxonomy is not None else None
    words = None
    if "names" in settings.measures:
        words, note = _words(plan, label_names)
        notes += [note] if note else []
    classes = _classes(plan) if "splicing" in settings.measures else None
    if "splicing" in settings.measures:
        notes += _unspliced(plan, classes)
    return Asked(labels, words, paths, classes, notes)


def _classes(plan: StudyPlan) -> Classes | None:
    settings = plan.study.concepts
    assert settings is not None, "it was asked for"
    labels = Labels.of_table(plan.images["heldout"].labels, settings.ignore_labels)
    if labels.n_concepts < 2:
        return None
    of_image = np.full(labels.n_images, -1)
    image, of_image_there = labels.positive.nonzero()
    of_image[image] = of_image_there
    words = class_words(labels.names)
    return Classes(of_image, [words.get(name) for name in labels.names])


def _unspliced(plan: StudyPlan, classes: Classes | None) -> list[str]:
    if classes is None:
        return ["fewer than two classes of held-out images: no accuracy with reconstructions in place"]
    left = [one.name for one in plan.concepts if one.sae is not None and one.readout is None]
    return [f"{name}: no output is computed from its site, so there is no accuracy to measure" for name in left]


def _paths(plan: StudyPlan) -> list[Path | None]:
    settings = plan.study.concepts
    assert settings is not None, "it was asked for"
    assert settings.taxonomy is not None, "it was asked for"
    label_names: list[str | None] = plan.images["heldout"].labels["label_name"].to_pylist()
    classes = [None if name in settings.ignore_labels else name for name in label_names]
    with named_by("concepts.taxonomy", settings.taxonomy):
        if settings.taxonomy == INATURALIST:
            taxonomy = inaturalist_taxonomy(name for name in classes if name is not None)
        else:
            taxonomy = read_taxonomy(settings.taxonomy)
        return [*image_paths(classes, taxonomy)]


def _words(plan: StudyPlan, label_names: list[str]) -> tuple[Words | None, str | None]:
    settings, of_concept = plan.study.concepts, class_words(label_names)
    assert settings is not None, "it was asked for"
    if plan.naming_space is None:
        return None, "neither the encoder nor the judge embeds texts: neurons get no names from a vocabulary"
    if settings.vocabulary is None:
        words = list(dict.fromkeys(sorted(of_concept.values())))
    else:
        with named_by("concepts.vocabulary", settings.vocabulary):
            words = read_vocabulary(settings.vocabulary).words
    if len(words) < 2:
        return None, "there are no names of classes to choose among: give concepts.vocabulary to name neurons"
    known = set(words)
    return Words(words, {one: word for one, word in of_concept.items() if word in known}), None
