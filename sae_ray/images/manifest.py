"""The manifest of an image folder, and its split into training and held-out images.

The manifest lists **every** file under the folder, at any depth, except hidden files (a path component starts with a
dot) and the label files in use. A file that turns out not to be an image keeps its `image_index` and is rejected with
a reason when it is decoded. No file is skipped silently.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

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
        pa.field("label", pa.int32()),
        pa.field("label_name", pa.string()),
        pa.field("n_bytes", pa.int64(), nullable=False),
    ]
)


def list_images(folder: Folder, labels: str = "auto") -> pa.Table:
    """The manifest of a folder: one row per file, in the order of the UTF-8 bytes of the relative path.

    Args:
        folder: Contains the images, at any depth.
        labels: `auto`, `none` or the path or URI of a label file, as described in `sae_ray.images.labels`.

    Returns:
        A table of `MANIFEST_SCHEMA`. `image_index` counts from 0, `image_id` is the relative POSIX path, and `label` is
        the position among the sorted label names, or null if the image has none.

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
    columns = [
        pa.array(np.arange(len(image_ids))),
        pa.array(image_ids, pa.string()),
        pa.array([None if name is None else classes[name] for name in label_names], pa.int32()),
        pa.array(label_names, pa.string()),
        pa.array([sizes[image_id] for image_id in image_ids], pa.int64()),
    ]
    return pa.table(columns, schema=MANIFEST_SCHEMA)


def select_split(table: pa.Table, heldout_fraction: float, part: Literal["train", "heldout"]) -> pa.Table:
    """One part of a manifest, with `image_index` counted from 0 again.

    An image's part depends only on its `image_id` and the fraction, so adding or removing other files does not change
    it, and a larger fraction only moves images from `train` to `heldout`. A part may be empty.
    """
    if not 0 <= heldout_fraction <= 1:
        raise UsageError(f"heldout_fraction is {heldout_fraction}; it must be between 0 and 1")
    if part not in ("train", "heldout"):
        raise UsageError(f"part is {part!r}; it must be train or heldout")
    digests = (hashlib.sha256(image_id.encode()).digest() for image_id in table["image_id"].to_pylist())
    heldout = np.fromiter((int.from_bytes(digest[:6]) / 2**48 for digest in digests), float) < heldout_fraction
    side = table.filter(pa.array(heldout if part == "heldout" else ~heldout))
    return side.set_column(0, MANIFEST_SCHEMA.field("image_index"), pa.array(np.arange(side.num_rows)))


def manifest_digest(table: pa.Table) -> str:
    """SHA-256, in hexadecimal, over the ids, labels and file sizes of a manifest, in order."""
    columns = [table[name].to_pylist() for name in ("image_id", "label", "label_name", "n_bytes")]
    return hashlib.sha256(json.dumps(columns).encode()).hexdigest()
