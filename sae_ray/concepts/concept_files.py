"""Concept files: CSV with `image_id,<concept>,…`, for images that show any number of concepts.

A value is 1 (the image shows the concept), 0 (it does not) or empty (unknown; so is -1, CheXpert's "uncertain"). Guided
SAEs also learn fractions, which tell how far the image shows it. The
rules for rows are those of label files (`sae_ray.images.labels`): every image must have a row, though all of its values
may be empty; rows of absent images are ignored; paths may be spelled otherwise; commas, semicolons, tabs or bars
separate the columns.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from sae_ray.concepts.labels import Labels
from sae_ray.errors import UsageError
from sae_ray.images.labels import check_rows, csv_reader, text_of
from sae_ray.images.meeting import meetings, prefixes
from sae_ray.store.files import Folder, parent_and_name

if TYPE_CHECKING:
    from jaxtyping import Float

FORMS = "a concept file is CSV with the header image_id,<concept>,… and the values 1, 0 or empty"
VALUES = {"": np.nan, "1": 1.0, "0": 0.0, "-1": np.nan, "1.0": 1.0, "0.0": 0.0, "-1.0": np.nan}


def read_concepts(file: str, folder: Folder, image_ids: Sequence[str]) -> Labels:
    """The labels that a concept file gives to images, concepts in the order of their names.

    Args:
        file: Path or URI of the concept file.
        folder: The image folder.
        image_ids: Of the manifest, or of any part of it; the labels have one row for each.

    Raises:
        UsageError: The file cannot be read, has no concept, a row is incomplete or appears twice, a value is not one of
            the above, or an image has no row.
    """
    concepts, matrix = read_values(file, folder, image_ids)
    return Labels.of(matrix, concepts)


def read_values(
    file: str, folder: Folder, image_ids: Sequence[str], fractions: bool = False
) -> tuple[list[str], Float[np.ndarray, "images concepts"]]:
    """The sorted names of concepts, and the values of images: NaN where one is unknown.

    Args:
        file, folder, image_ids: as in `read_concepts`.
        fractions: whether values between 0 and 1 are allowed.

    Raises as `read_concepts`.
    """
    rows = csv_reader(text_of(file, FORMS), [["image_id"]])
    header = [name or "" for name in rows.fieldnames or []]
    concepts = sorted(name for name in header if name != "image_id")
    if "image_id" not in header or not concepts:
        raise UsageError(f"{file} has the columns {', '.join(header) or '(none)'}; {FORMS}")
    for name, count in Counter(header).items():
        if not name or count > 1:
            raise UsageError(f"{file} has {count} columns with the name {name!r}; give every concept a name of its own")

    found: dict[str, list[float]] = {}
    try:
        for row in rows:
            image_id, values = row["image_id"], [row[name] for name in concepts]
            where = f"{file}, row {rows.line_num}"
            if image_id is None or None in values or None in row:
                raise UsageError(f"{where}: it needs as many values as the header has columns; complete it")
            if image_id in found:
                raise UsageError(f"{where}: {image_id!r} already has a row; keep one of them")
            found[image_id] = [
                _value(text, name, where, fractions) for name, text in zip(concepts, values, strict=True)
            ]
    except csv.Error as error:
        raise UsageError(f"{file}, row {rows.line_num}: {error}; fix the row") from error

    parent, _ = parent_and_name(file)
    spelled: dict[str, str | None] = {image_id: repr(values) for image_id, values in found.items()}
    row_of = meetings(file, spelled, image_ids, prefixes(folder, parent))
    keys = {image_id: image_id for image_id in image_ids}
    check_rows(file, folder, keys, row_of, found, "with empty values if nothing is known of the image")
    unknown = [np.nan] * len(concepts)
    matrix = [found[row_of[image_id]] if image_id in row_of else unknown for image_id in image_ids]
    return concepts, np.array(matrix, np.float64).reshape(len(image_ids), len(concepts))


def _value(text: str, name: str, where: str, fractions: bool) -> float:
    known = VALUES.get(text.strip())
    if known is None and fractions:
        with suppress(ValueError):
            known = float(text)
    if known is None or known < 0 or known > 1:
        forms = "a number from 0 to 1" if fractions else "1, 0"
        raise UsageError(
            f"{where}: {name} is {text!r}; give {forms} or nothing where it is unknown (-1 counts as nothing)"
        )
    return known
