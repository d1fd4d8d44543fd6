"""Labels of an image folder, from its sub-folders or from a file.

Values of `labels`:

- `none`: no labels.
- `auto`: if every image is in a sub-folder, its class is the path of that sub-folder, without the leading components
  that all images share. So `n01440764/x.JPEG` (ImageNet) has the class `n01440764`, as has
  `train/n01440764/x.JPEG` if all images are under `train`; `00000_Animalia_…/x.jpg` (iNaturalist) has the class
  `00000_Animalia_…`, and `a/abbey/x.jpg` (Places365) has the class `a/abbey`. A folder with images at its top level is
  unlabelled. Where classes begin with WordNet's ids and a file with their words (`LOC_synset_mapping.txt`, `words.txt`
  or `synset_words.txt`) is beside them or above them, no higher than beside the image folder, they are named with
  these: `n01440764 tench`.
- a CSV file with a header that has `image_id` (the relative path) and `label` (the class name; empty for none). Every
  image must have a row; rows of absent images are ignored. Commas, semicolons, tabs or bars separate the columns. Paths
  may be spelled otherwise (`./1.jpg`, `cat\\1.jpg`, in another of Unicode's forms) and may begin with the image folder.
- Kaggle's `LOC_val_solution.csv` (`ImageId,PredictionString`: the file's name without extension; the first word is its
  synset). With `LOC_synset_mapping.txt` in the same folder, a class is named by its line there (`n02012849 crane`; the
  synset stays in the name, since ImageNet has two cranes).
- the ILSVRC devkit's `ILSVRC2012_validation_ground_truth.txt`: one class number per line, in the order of the sorted
  file names. The number is the class name.

An *image* here is a file with a suffix of `sae_ray.images.formats.SUFFIXES`, or any file if the folder has none
of those. Other files are labelled only if a sub-folder or a row gives them a label.
"""

from __future__ import annotations

import csv
import io
import math
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.images.formats import SUFFIXES
from sae_ray.images.meeting import meetings, nearest, prefixes
from sae_ray.images.wordnet import TABLES, read_words, with_words
from sae_ray.store.files import Folder, parent_and_name
from sae_ray.store.tables import StoredTable

IMAGE = rf"(?i)\.({SUFFIXES.replace(' ', '|')})$"
"""What paths of images match."""
SYNSET_MAPPING = TABLES[0]
KNOWN_COLUMNS = (("image_id", "label"), ("ImageId", "PredictionString"))
SEPARATORS = ",;\t|"
FORMS = (
    "labels must be auto, none, or the path of a CSV or TSV file with the header image_id,label, of Kaggle's "
    "LOC_val_solution.csv, or of the devkit's ILSVRC2012_validation_ground_truth.txt"
)


Naming = Callable[[pa.ChunkedArray], pa.Array]
"""From a column of `image_id` to the class names; null where there is none."""


def label_files(labels: str, folder: Folder) -> set[str]:
    """Paths below the image folder that hold its labels, and so are no images.

    Raises UsageError if the label file is missing.
    """
    if labels in ("none", "auto"):
        return set()
    parent, name = parent_and_name(labels)
    if not parent.exists(name):
        raise UsageError(f"the label file {labels} does not exist; {FORMS}")
    below = folder.path_of("")
    files = (parent.path_of(name), parent.path_of(SYNSET_MAPPING))
    return {path.removeprefix(below) for path in files if path.startswith(below)}


def read_labels(labels: str, folder: Folder, manifest: StoredTable) -> Naming:
    """Reads what there is to read; returns what names the class of each image.

    `auto` keeps nothing but the names of shared folders in memory, a label file itself and all paths.

    Args:
        labels: One of the values above.
        folder: The image folder.
        manifest: Its own, without label files.

    Raises:
        UsageError: The label file has an unknown format, or does not fit the images.
    """
    if labels == "none":
        return lambda image_ids: pa.nulls(len(image_ids), pa.string())
    if labels == "auto":
        return _from_folders(folder, manifest)

    text = text_of(labels, FORMS)
    parent, name = parent_and_name(labels)
    match PurePosixPath(name).suffix.lower():
        case ".csv" | ".tsv":
            named = _from_csv(labels, text, parent, folder, manifest["image_id"].to_pylist())
        case ".txt":
            named = _from_devkit(labels, text, manifest["image_id"].to_pylist())
        case _:
            raise UsageError(f"labels is {labels!r}; {FORMS}")
    return lambda image_ids: pa.array(map(named.get, image_ids.to_pylist()), pa.string())


def text_of(file: str, forms: str, kind: str = "label file") -> str:
    """The text of a file. Raises UsageError if it cannot be read or is no UTF-8; `forms` says what it may be."""
    parent, name = parent_and_name(file)
    try:
        data = parent.read_bytes(name)
        return data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except OSError as error:
        raise UsageError(f"the {kind} {file} cannot be read ({error}); {forms}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text ({error}); save it as UTF-8") from error


def _images(paths: list[str]) -> list[str]:
    """Those that are named like images, or all if none is."""
    return _matching(pa.array(paths, pa.string()), IMAGE).to_pylist() or paths


def _matching(paths: Any, pattern: str) -> Any:
    """Those of a column that match."""
    return paths.filter(pc.call_function("match_substring_regex", [paths], pc.MatchSubstringOptions(pattern)))


def _from_folders(folder: Folder, manifest: StoredTable) -> Naming:
    def parents(pattern: str) -> Iterator[str]:
        for group in manifest.groups(["image_id"]):
            yield from _parent(_matching(group["image_id"], pattern)).unique().to_pylist()

    has_images = any(True for _ in parents(IMAGE))
    n_shared = _n_shared(parents(IMAGE if has_images else ""))

    @cache
    def words() -> dict[str, str]:
        first = next(parents(IMAGE if has_images else ""))
        return _words_beside(folder, first.split("/")[:n_shared])

    def named(image_ids: pa.ChunkedArray) -> pa.Array:
        if n_shared is None:
            return pa.nulls(len(image_ids), pa.string())
        found = _parent(image_ids).combine_chunks().dictionary_encode()
        classes = ("/".join(parent.split("/")[n_shared:]) for parent in found.dictionary.to_pylist())
        names = [with_words(name, words) or None for name in classes]
        return pa.array(names, pa.string()).take(found.indices)

    return named


def _words_beside(folder: Folder, shared: list[str]) -> dict[str, str]:
    """The words of classes from the nearest file beside them or above them, no higher than beside the image folder.

    Args:
        folder: the image folder.
        shared: the folders in it that lead to the classes.
    """
    places = [folder / "/".join(shared[:depth]) for depth in range(len(shared), 0, -1)]
    for place, name in ((place, name) for place in (*places, folder) for name in TABLES):
        if words := read_words(place, name):
            return words
    if "/" in folder.path.strip("/") or folder.is_local:
        parent, _ = parent_and_name(folder.uri)
        with suppress(OSError, SaeRayError):  # which need not be readable
            for name in TABLES:
                if words := read_words(parent, name):
                    return words
    return {}


def _parent(image_ids: pa.ChunkedArray) -> pa.ChunkedArray:
    options = pc.ReplaceSubstringOptions("/?[^/]*$", "")
    return pc.call_function("replace_substring_regex", [image_ids], options)


def _n_shared(parents: Iterable[str]) -> int | None:
    """How many leading folders all images share, without the last one of any. None if an image is in no folder."""
    shared, most = None, math.inf
    for parent in parents:
        if not parent:
            return None
        shared = parent if shared is None else posixpath.commonpath([shared, parent])
        most = min(most, parent.count("/"))
    return None if shared is None else int(min(most, len(shared.split("/")) if shared else 0))


def _from_csv(file: str, text: str, parent: Folder, folder: Folder, image_ids: list[str]) -> dict[str, str]:
    rows = csv_reader(text, KNOWN_COLUMNS)
    header = rows.fieldnames or []
    try:
        if {"image_id", "label"} <= set(header):
            names = {image_id: label or None for image_id, label in _rows(file, rows, "image_id", "label")}
            keys = {image_id: image_id for image_id in image_ids}
        elif {"ImageId", "PredictionString"} <= set(header):
            words = read_words(parent, SYNSET_MAPPING)
            pairs = _rows(file, rows, "ImageId", "PredictionString")
            firsts = {image_id: (boxes.split() or [""])[0] for image_id, boxes in pairs}
            names = {image_id: with_words(synset, lambda: words) or None for image_id, synset in firsts.items()}
            keys = {image_id: PurePosixPath(image_id).stem for image_id in image_ids}
        else:
            raise UsageError(f"{file} has the columns {', '.join(header) or '(none)'}; {FORMS}")
    except csv.Error as error:
        raise UsageError(f"{file}, row {rows.reader.line_num}: {error}; fix the row") from error
    row_of = meetings(file, names, keys.values(), prefixes(folder, parent))
    check_rows(file, folder, keys, row_of, names, "with an empty label if the image has no class")
    found = {image_id: names[row_of[key]] for image_id, key in keys.items() if key in row_of}
    return {image_id: name for image_id, name in found.items() if name is not None}


def check_rows(
    file: str, folder: Folder, keys: Mapping[str, str], row_of: Mapping[str, str], names: Iterable[str], blank: str
) -> None:
    """Raises UsageError unless every image has a row.

    Args:
        file, folder: as messages name them.
        keys: `image_id` -> how a row names the image.
        row_of: of `meetings`.
        names: of all rows.
        blank: what the row of an image is like of which nothing is known.
    """
    images = _images(list(keys))
    if lacking := [image_id for image_id in images if keys[image_id] not in row_of]:
        none = f"names none of the {len(images):,} images in {folder}: it " if len(lacking) == len(images) else ""
        key = keys[lacking[0]]
        raise UsageError(
            f"{file} {none}has no row for the image {lacking[0]}{nearest(key, names)}; add the row {key!r}, {blank}"
        )


def csv_reader(text: str, columns: Iterable[Iterable[str]]) -> csv.DictReader:
    """Of a CSV file, whatever ends its lines, and separates its columns if it has one of these sets of them."""
    first, _, rest = text.partition("\n")
    if first.strip().lower().startswith("sep="):  # a hint for spreadsheets
        text = rest
    first = text.splitlines()[0] if text else ""

    def header(separator: str) -> list[str]:
        return [name.strip() for name in next(csv.reader([first], delimiter=separator), [])]

    known = [one for one in SEPARATORS if any(set(some) <= set(header(one)) for some in columns)]
    separator = known[0] if known else ","
    rows = csv.DictReader(io.StringIO(text, newline=None), strict=True, delimiter=separator)
    if rows.fieldnames:
        rows.fieldnames = header(separator)
    return rows


def _rows(file: str, rows: csv.DictReader, key: str, value: str) -> Iterator[tuple[str, str]]:
    seen = set()
    for row in rows:
        if not any(cell.strip() for cell in row.values() if isinstance(cell, str)):  # spreadsheets leave such rows
            continue
        if row[key] is None or row[value] is None:
            raise UsageError(f"{file}, row {rows.line_num}: {value} is missing; give every row all columns")
        if row[key] in seen:
            raise UsageError(f"{file}, row {rows.line_num}: {row[key]!r} already has a row; keep one of them")
        seen.add(row[key])
        yield row[key], row[value].strip()


def _from_devkit(file: str, text: str, image_ids: list[str]) -> dict[str, str]:
    numbers = text.split("\n")
    if numbers[-1] == "":
        numbers.pop()
    for row, number in enumerate(numbers, start=1):
        if not number.strip().isdecimal():
            raise UsageError(f"{file}, row {row}: {number!r} is not a class number; {FORMS}")
    images = sorted(_images(image_ids), key=lambda path: PurePosixPath(path).name.encode())
    if len(numbers) != len(images):
        raise UsageError(
            f"{file} has {len(numbers)} rows for {len(images)} images; it labels images by order, so the folder must "
            "contain exactly the images of the devkit; to label a part of them, use a CSV file with the header "
            "image_id,label"
        )
    return dict(zip(images, (str(int(number)) for number in numbers), strict=True))
