"""What a LLaVA is taught to say of training images: questions with their answers, from class folders or a file."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from random import Random
from typing import NamedTuple

from sae_ray.concepts.naming import class_names, class_of, first_synonym
from sae_ray.errors import UsageError
from sae_ray.images import list_images
from sae_ray.images.labels import csv_reader, text_of
from sae_ray.images.meeting import meetings, nearest, prefixes
from sae_ray.steering.config import ONE_WORD
from sae_ray.store.files import Folder, parent_and_name
from sae_ray.world.render import article

NAMING = (ONE_WORD, "What is this? Answer with one word.", "What do you see? Name it.")
DESCRIBING = ("Describe the image.", "Describe this picture briefly.", "What is in this picture?", "Write a caption.")
PHRASES = ("a photo of {}", "a picture of {}", "this is {}")
"""Captions of an image of a class, which stands here with its article."""
COLUMNS = ("image_id", "caption")
FORMS = f"captions are a CSV file with the columns {' and '.join(COLUMNS)}, or come from folders named by classes"


class Said(NamedTuple):
    """Questions to all of which each of the answers is right."""

    questions: tuple[str, ...]
    """The first one is asked most."""
    answers: tuple[str, ...]


def said_of(folder: Folder, captions: str | None) -> dict[str, tuple[Said, ...]]:
    """What is said of the images of a folder.

    Args:
        folder: of class folders, unless captions are given; their names may be WordNet ids.
        captions: A CSV file with one row per caption; an image may have several, or none and is then left out.

    Returns:
        `image_id` -> its questions and answers, in the order of the manifest.

    Raises:
        UsageError: There is no such folder or file, or no image has a caption.
        SaeRayError: The folder has no images.
    """
    images = list_images(folder, "auto" if captions is None else "none")
    image_ids = images.manifest["image_id"].to_pylist()
    if captions is not None:
        return _from_file(captions, folder, image_ids)
    labels = images.labels["label_name"].to_pylist()
    names = class_names(label for label in labels if label is not None)
    shown = {
        image_id: first_synonym(names[class_of(label)])
        for image_id, label in zip(image_ids, labels, strict=True)
        if label is not None and class_of(label) in names
    }
    if not shown:
        raise UsageError(
            f"the images in {folder} have no captions: they are in no folders named by what they show; sort them into "
            f"such folders, or give a file ({FORMS})"
        )
    return {image_id: _of_class(name) for image_id, name in shown.items()}


def _of_class(name: str) -> tuple[Said, ...]:
    return Said(NAMING, (name,)), Said(DESCRIBING, tuple(phrase.format(article(name)) for phrase in PHRASES))


def _from_file(file: str, folder: Folder, image_ids: list[str]) -> dict[str, tuple[Said, ...]]:
    rows = csv_reader(text_of(file, FORMS, "caption file"), [COLUMNS])
    if not set(COLUMNS) <= set(rows.fieldnames or []):
        raise UsageError(f"{file} has the columns {', '.join(rows.fieldnames or ['(none)'])}; {FORMS}")
    captions: dict[str, list[str]] = {}
    try:
        for row in rows:
            if text := (row["caption"] or "").strip():
                captions.setdefault(row["image_id"], []).append(text)
    except csv.Error as error:
        raise UsageError(f"{file}, row {rows.reader.line_num}: {error}; fix the row") from error
    parent, _ = parent_and_name(file)
    row_of = meetings(file, dict.fromkeys(captions), image_ids, prefixes(folder, parent))
    if not row_of:
        raise UsageError(
            f"{file} has a caption for none of the {len(image_ids):,} images in {folder}, such as {image_ids[0]}"
            f"{nearest(image_ids[0], captions)}; {FORMS}"
        )
    return {one: (Said(DESCRIBING, tuple(captions[row_of[one]])),) for one in image_ids if one in row_of}


def drawn(said: tuple[Said, ...], chance: Random) -> tuple[str, str]:
    """A question and an answer."""
    questions, answers = chance.choice(said)
    return chance.choice((questions[0], chance.choice(questions))), chance.choice(answers)


def counted(said: Mapping[str, tuple[Said, ...]]) -> str:
    """For the user: how many images and different answers there are."""
    answers = {answer for some in said.values() for one in some for answer in one.answers}
    return f"{len(said):,} images with {len(answers):,} different answers"
