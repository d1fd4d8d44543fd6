"""What a study gives the stage `concepts`: labels of its held-out images, and words."""

from __future__ import annotations

from typing import NamedTuple

from sae_ray.concepts.concept_files import read_concepts
from sae_ray.concepts.label_findings import usable_labels
from sae_ray.concepts.labels import Labels
from sae_ray.concepts.vocabulary import class_words, read_vocabulary
from sae_ray.encoders.sources import named_by
from sae_ray.study.plan import StudyPlan


class Words(NamedTuple):
    """The names that neurons may get."""

    words: list[str]
    word_of: dict[str, str]
    """The word of each concept that has one among them."""


class Asked(NamedTuple):
    """What concepts are measured by, and what is said of that which they cannot be."""

    labels: Labels | None
    """Of all held-out images by `image_index`; None if there are none to measure by."""
    words: Words | None
    """None if there are none, or no model of the study embeds them."""
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
    words = None
    if "names" in settings.measures:
        words, note = _words(plan, label_names)
        notes += [note] if note else []
    return Asked(labels, words, notes)


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
