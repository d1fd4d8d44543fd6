"""Taxonomies: the path of each class from the widest rank to the narrowest, from names of classes or from a file."""

from __future__ import annotations

import csv
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from sae_ray.errors import UsageError
from sae_ray.images.labels import csv_reader, text_of

FORM = "a taxonomy is CSV with the header label_name,path and paths such as animal > bird > crane"


def inaturalist_taxonomy(label_names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Label -> path, from iNaturalist's names: `00000_Animalia_Chordata_…_Parus_major` has the path Animalia, Chordata,
    … major. The first field is a number. Warns if the paths do not all have one length, as `_` in a name makes it.

    Raises UsageError if a label is not named like that.
    """
    names = sorted(set(label_names))
    if others := [name for name in names if not re.match(r"\d+_.", name)]:
        raise UsageError(
            f"{len(others)} labels are not named as in iNaturalist (00000_Animalia_Chordata_…), {others[0]!r} among "
            "them; give a CSV file with the columns label_name and path"
        )
    taxonomy = {name: tuple(name.split("_")[1:]) for name in names}
    _warn_of_lengths("iNaturalist's names", taxonomy)
    return taxonomy


def read_taxonomy(file: str) -> dict[str, tuple[str, ...]]:
    """Label -> path, from a CSV file with the columns `label_name` and `path`, its ranks separated by `>`.

    Labels are the class names of the image set, as in its labels. Other columns are ignored. Warns if the paths do not
    all have one length: depths of neurons with different classes are then hard to compare.

    Args:
        file: path or URI.

    Raises:
        UsageError: the file cannot be read, lacks a column, repeats a label, or a path has an empty rank.
    """
    rows = csv_reader(text_of(file, FORM, "taxonomy"), [["label_name", "path"]])
    header = rows.fieldnames or []
    if not {"label_name", "path"} <= set(header):
        raise UsageError(f"{file} has the columns {', '.join(header) or '(none)'}; {FORM}")
    taxonomy: dict[str, tuple[str, ...]] = {}
    try:
        for row in rows:
            where = f"{file}, row {rows.line_num}"
            label, path = (row["label_name"] or "").strip(), row["path"] or ""
            ranks = tuple(rank.strip() for rank in path.split(">"))
            if not label or not all(ranks):
                raise UsageError(f"{where}: label_name is {label!r} and path is {path!r}; {FORM}")
            if label in taxonomy:
                raise UsageError(f"{where}: {label!r} already has a row; keep one of them")
            taxonomy[label] = ranks
    except csv.Error as error:
        raise UsageError(f"{file}, row {rows.line_num}: {error}; fix the row") from error
    _warn_of_lengths(file, taxonomy)
    return taxonomy


def image_paths(
    label_names: Sequence[str | None], taxonomy: Mapping[str, tuple[str, ...]]
) -> list[tuple[str, ...] | None]:
    """The path of each image, by its label; None for an image without one.

    Raises UsageError if a label is not in the taxonomy.
    """
    if missing := sorted({name for name in label_names if name is not None} - taxonomy.keys()):
        raise UsageError(
            f"the taxonomy has no path for {len(missing)} labels, {missing[0]!r} among them; add a row for each"
        )
    return [None if name is None else taxonomy[name] for name in label_names]


def _warn_of_lengths(source: str, taxonomy: Mapping[str, tuple[str, ...]]) -> None:
    lengths = Counter(map(len, taxonomy.values()))
    if len(lengths) > 1:
        [(usual, _), *_] = lengths.most_common(1)
        label, path = next((label, path) for label, path in taxonomy.items() if len(path) != usual)
        warnings.warn(
            f"{source}: most paths have {usual} ranks, but {label!r} has {len(path)} ({' > '.join(path)}); depths in "
            "the taxonomy are counted in ranks, so give all classes as many if you can",
            stacklevel=3,
        )
