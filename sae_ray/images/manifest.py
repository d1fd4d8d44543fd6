"""The list of an image folder: its manifest, the labels beside it, and the split into training and held-out images.

The manifest lists **every** file under the folder, at any depth, except hidden ones (a path component that starts with
a dot) and the label files in use. A file that turns out not to be an image keeps its `image_index` and is rejected,
with a reason, when it is decoded: nothing is left out silently.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import fs

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.images.labels import read_labels
from sae_ray.store.files import Folder

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
    """The images of a set. Both tables have one row per file, in the same order."""

    manifest: pa.Table
    """`MANIFEST_SCHEMA`: what the images are."""
    labels: pa.Table
    """`LABELS_SCHEMA`: what is said of them. `label` is dense over the sorted names, and null without a label."""


def list_images(folder: Folder, labels: str = "auto") -> ImageList:
    """The files of a folder, in the order of the UTF-8 bytes of their relative paths, and their labels.

    Args:
        folder: Contains the images, at any depth.
        labels: `auto`, `none` or the path or URI of a label file, as described in `sae_ray.images.labels`.

    Returns:
        `image_index` is dense, `image_id` the relative POSIX path.

    Raises:
        UsageError: There is no such folder, or the labels do not fit its images.
        SaeRayError: The folder contains no file, or a file whose name is not UTF-8.
    """
    if folder.filesystem.get_file_info(folder.path).type != fs.FileType.Directory:
        raise UsageError(f"there is no image folder {folder}; give a folder of JPEG, PNG or WebP files")
    try:
        sizes = folder.files(recursive=True)
    except UnicodeDecodeError as error:
        raise SaeRayError(f"{folder} contains a file whose name is not UTF-8: {error.object!r}; rename it") from error
    visible = [path for path in sizes if not any(part[0] == "." for part in path.split("/"))]
    image_ids, label_names = read_labels(labels, folder, sorted(visible, key=lambda path: path.encode()))
    if not image_ids:
        raise SaeRayError(f"the image folder {folder} contains no files; give a folder of JPEG, PNG or WebP files")
    classes = {name: label for label, name in enumerate(sorted({name for name in label_names if name is not None}))}
    index = pa.array(np.arange(len(image_ids)))
    n_bytes = pa.array([sizes[image_id] for image_id in image_ids], pa.int64())
    codes = pa.array([None if name is None else classes[name] for name in label_names], pa.int32())
    return ImageList(
        pa.table([index, pa.array(image_ids, pa.string()), n_bytes], schema=MANIFEST_SCHEMA),
        pa.table([index, codes, pa.array(label_names, pa.string())], schema=LABELS_SCHEMA),
    )


def select_split(images: ImageList, heldout_fraction: float, part: Literal["train", "heldout"]) -> ImageList:
    """One side of a list, `image_index` dense again.

    An image's part depends only on its `image_id` and the fraction, so adding or removing other files does not change
    it, and a larger fraction only moves images from `train` to `heldout`. A part may be empty.
    """
    if not 0 <= heldout_fraction <= 1:
        raise UsageError(f"heldout_fraction is {heldout_fraction}; it must be between 0 and 1")
    if part not in ("train", "heldout"):
        raise UsageError(f"part is {part!r}; it must be train or heldout")
    digests = (hashlib.sha256(image_id.encode()).digest() for image_id in images.manifest["image_id"].to_pylist())
    heldout = np.fromiter((int.from_bytes(digest[:6]) / 2**48 for digest in digests), float) < heldout_fraction
    kept = pa.array(heldout if part == "heldout" else ~heldout)

    def side(table: pa.Table) -> pa.Table:
        rows = table.filter(kept)
        return rows.set_column(0, MANIFEST_SCHEMA.field("image_index"), pa.array(np.arange(rows.num_rows)))

    return ImageList(side(images.manifest), side(images.labels))


def manifest_digest(manifest: pa.Table) -> str:
    """SHA-256, in hexadecimal, over the ids and sizes of the images, in order."""
    return _digest([manifest[name].to_pylist() for name in ("image_id", "n_bytes")])


def labels_digest(labels: pa.Table) -> str:
    """SHA-256, in hexadecimal, over the labels of the images, in order."""
    return _digest([labels[name].to_pylist() for name in ("label", "label_name")])


def describe_change(before: pa.Table, after: pa.Table) -> str:
    """How a manifest differs from an earlier one, as `3 added, 1 removed`; empty where it does not."""
    old, new = (
        dict(zip(one["image_id"].to_pylist(), one["n_bytes"].to_pylist(), strict=True)) for one in (before, after)
    )
    counts = {
        "added": len(new.keys() - old.keys()),
        "removed": len(old.keys() - new.keys()),
        "changed": sum(old[image_id] != new[image_id] for image_id in old.keys() & new.keys()),
    }
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def _digest(columns: list[list]) -> str:
    return hashlib.sha256(json.dumps(columns).encode()).hexdigest()
