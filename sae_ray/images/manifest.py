"""The list of an image folder: its manifest, the labels beside it, and the split into training and held-out images.

The manifest lists every file under the folder, at any depth, except hidden ones (a path component that starts with a
dot), the label files in use, and what is no image by its very name (`sae_ray.images.skipping`), which is counted. A
file that turns out not to be an image keeps its `image_index` and is rejected, with a reason, when it is decoded:
nothing is left out silently.

A list may be of any length: its tables are files, which are read piece by piece.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from operator import itemgetter
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.images.labels import label_files, read_labels
from sae_ray.images.skipping import is_skipped_folder, skipped_as, skipped_line
from sae_ray.store.files import Folder
from sae_ray.store.tables import GROUP_ROWS, StoredTable, spooled
from sae_ray.store.walking import walk

if TYPE_CHECKING:
    from jaxtyping import Bool

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("image_index", pa.int64(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("n_bytes", pa.int64(), nullable=False),
    ]
)
LABELS_SCHEMA = pa.schema(
    [
        pa.field("image_index", pa.int64(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("label_name", pa.string()),
    ]
)


class ImageList(NamedTuple):
    """The images of a set. Both tables have one row per image, in the same order."""

    manifest: StoredTable
    """`MANIFEST_SCHEMA`: what the images are."""
    labels: StoredTable
    """`LABELS_SCHEMA`: what is said of them. `label` is dense over the sorted names, and null without a label."""
    skipped: Mapping[str, int] = {}
    """How many files and folders below the folder are no images by their names, by kind (`.txt`, `@eaDir/`)."""


def list_images(folder: Folder, labels: str = "auto") -> ImageList:
    """The images of a folder, in the order of the UTF-8 bytes of their relative paths, and their labels.

    Args:
        folder: Contains the images, at any depth.
        labels: `auto`, `none` or the path or URI of a label file, as described in `sae_ray.images.labels`.

    Returns:
        `image_index` is dense, `image_id` the relative POSIX path.

    Raises:
        UsageError: There is no such folder, or the labels do not fit its images.
        SaeRayError: The folder contains no image, an image whose name is not UTF-8, or a folder that cannot be read; or
            it is in one.
    """
    try:
        kind = folder.filesystem.get_file_info(folder.path).type
    except PermissionError as error:
        raise SaeRayError(
            f"the image folder {folder} cannot be reached: no permission for a folder above it"
        ) from error
    if kind != fs.FileType.Directory:
        raise UsageError(f"there is no image folder {folder}; give a folder of images")
    skipped: Counter[str] = Counter()
    try:
        manifest = spooled(MANIFEST_SCHEMA, _manifest(folder, label_files(labels, folder), skipped))
    except UnicodeDecodeError as error:
        raise SaeRayError(f"{folder} contains a file whose name is not UTF-8: {error.object!r}; rename it") from error
    except PermissionError as error:
        path = str(error.filename or folder).rstrip("/")
        remedy = "make it readable" + (f", or move it out of {folder}" if path != str(folder) else "")
        raise SaeRayError(f"the folder {path} cannot be read: no permission; {remedy}") from error
    if not manifest.num_rows:
        what = f"no images, only what is skipped for its name ({skipped_line(skipped)})" if skipped else "no files"
        raise SaeRayError(f"the image folder {folder} contains {what}; give a folder of images")
    return ImageList(manifest, spooled(LABELS_SCHEMA, _labels(labels, folder, manifest)), dict(sorted(skipped.items())))


def _manifest(folder: Folder, label_files: set[str], skipped: Counter[str]) -> Iterator[pa.Table]:
    """Also counts what is skipped, by kind."""

    def images() -> Iterator[tuple[str, int]]:
        for found in walk(folder, is_skipped_folder):
            if found.path in label_files:
                continue
            if kind := skipped_as(found):
                skipped[kind] += 1
            else:
                yield found.path.encode(errors="surrogateescape").decode(), found.size

    files = images()
    first = 0
    while some := list(islice(files, GROUP_ROWS)):
        image_ids, sizes = zip(*some, strict=True)
        index = np.arange(first, first + len(some))
        yield pa.table([index, pa.array(image_ids, pa.string()), pa.array(sizes)], schema=MANIFEST_SCHEMA)
        first += len(some)


def _labels(labels: str, folder: Folder, manifest: StoredTable) -> Iterator[pa.Table]:
    named = read_labels(labels, folder, manifest)
    names: set[str | None] = set()
    for group in manifest.groups(["image_id"]):
        names.update(named(group["image_id"]).unique().to_pylist())
    classes = pa.array(sorted(name for name in names if name is not None), pa.string())
    for group in manifest.groups(["image_index", "image_id"]):
        found = named(group["image_id"])
        codes = pc.call_function("index_in", [found], pc.SetLookupOptions(classes))
        yield pa.table([group["image_index"], codes, found], schema=LABELS_SCHEMA)


def select_split(images: ImageList, heldout_fraction: float, part: Literal["train", "heldout"]) -> ImageList:
    """One side of a list, `image_index` dense again.

    An image's part depends only on its `image_id` and the fraction, so adding or removing other files does not change
    it, and a larger fraction only moves images from `train` to `heldout`. A part may be empty. What was skipped is that
    of the whole folder.
    """
    if not 0 <= heldout_fraction <= 1:
        raise UsageError(f"heldout_fraction is {heldout_fraction}; it must be between 0 and 1")
    if part not in ("train", "heldout"):
        raise UsageError(f"part is {part!r}; it must be train or heldout")
    parts = [is_heldout(group["image_id"], heldout_fraction) for group in images.manifest.groups(["image_id"])]
    heldout = np.concatenate([np.zeros(0, bool), *parts])
    kept = heldout if part == "heldout" else ~heldout

    def side(table: StoredTable) -> Iterator[pa.Table]:
        first = seen = 0
        for group in table.groups():
            rows = group.filter(pa.array(kept[seen : seen + group.num_rows]))
            index = pa.array(np.arange(first, first + rows.num_rows))
            yield rows.set_column(0, MANIFEST_SCHEMA.field("image_index"), index)
            first, seen = first + rows.num_rows, seen + group.num_rows

    manifest, labels = spooled(MANIFEST_SCHEMA, side(images.manifest)), spooled(LABELS_SCHEMA, side(images.labels))
    return ImageList(manifest, labels, images.skipped)


def is_heldout(image_ids: pa.ChunkedArray, fraction: float) -> Bool[np.ndarray, " images"]:
    """Which images a share to hold out has: each by its id alone, and a larger share has those of a smaller one."""
    digests = (hashlib.sha256(image_id.encode()).digest() for image_id in image_ids.to_pylist())
    return np.fromiter((int.from_bytes(digest[:6]) / 2**48 for digest in digests), float) < fraction


def manifest_digest(manifest: StoredTable) -> str:
    """SHA-256, in hexadecimal, over the ids and sizes of the images, in order."""
    return _digest(manifest, ["image_id", "n_bytes"])


def labels_digest(labels: StoredTable) -> str:
    """SHA-256, in hexadecimal, over the labels of the images, in order."""
    return _digest(labels, ["label", "label_name"])


def describe_change(before: Iterable[pa.Table], after: Iterable[pa.Table]) -> str:
    """How a manifest differs from an earlier one, as `3 added, 1 removed`; empty where it does not.

    Args:
        before: the groups of the earlier one (`StoredTable.groups`).
        after: those of the later one.
    """

    def images(groups: Iterable[pa.Table], side: str) -> Iterator[tuple[str, str, int]]:
        for group in groups:
            for image_id, n_bytes in zip(group["image_id"].to_pylist(), group["n_bytes"].to_pylist(), strict=True):
                yield image_id, side, n_bytes

    # Both are sorted by `image_id`.
    both = heapq.merge(images(before, "removed"), images(after, "added"))
    counts = Counter({"added": 0, "removed": 0, "changed": 0})
    for _, same in groupby(both, key=itemgetter(0)):
        (_, side, n_bytes), *others = same
        if not others:
            counts[side] += 1
        elif others[0][2] != n_bytes:
            counts["changed"] += 1
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def _digest(table: StoredTable, columns: Sequence[str]) -> str:
    """Of the columns as a JSON list of lists, which is never in memory as a whole."""
    found = hashlib.sha256()
    for place, name in enumerate(columns):
        found.update(b", [" if place else b"[[")
        for number, group in enumerate(table.groups([name])):
            values = json.dumps(group[name].to_pylist())[1:-1]
            found.update(f"{', ' if number else ''}{values}".encode())
        found.update(b"]")
    found.update(b"]")
    return found.hexdigest()
