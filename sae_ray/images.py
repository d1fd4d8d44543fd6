"""Images: the manifest of a folder, its split into training and held-out images, and the decoding of one file.

The manifest lists **every** file under the folder, at any depth, but for hidden ones (a path component that starts with
a dot) and the label files in use. A file that turns out not to be an image keeps its `image_index` and is rejected,
with a reason, when it is decoded: nothing is left out silently.
"""

from __future__ import annotations

import hashlib
import json
from io import BytesIO
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from pyarrow import fs

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.files import Folder
from sae_ray.labels import read_labels

if TYPE_CHECKING:
    from PIL import Image

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("image_index", pa.int64(), nullable=False),
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("label_name", pa.string()),
        pa.field("n_bytes", pa.int64(), nullable=False),
    ]
)

PIXEL_LIMIT = 178_956_970
"""Pixels above which an image is refused unread: where Pillow itself stops warning and raises."""

ASPECT_LIMIT = 200
"""Longest side over shortest above which an image is refused: resizing the shortest side to a model's input size makes
the longest one as many times larger, so that a strip of 1 × 60 000 pixels would fill the memory."""


class BadImage(SaeRayError):
    """A file that is not a usable image. `reason` is short and stable: it is what the rejects table holds."""

    @property
    def reason(self) -> str:
        return str(self)


def list_images(folder: Folder, labels: str = "auto") -> pa.Table:
    """The manifest of a folder: one row per file, in the order of the UTF-8 bytes of the relative path.

    Args:
        folder: Where the images lie, at any depth.
        labels: `auto`, `none` or the path or URI of a label file, as `sae_ray.labels` describes them.

    Returns:
        A table of `MANIFEST_SCHEMA`. `image_index` is dense, `image_id` the relative POSIX path; `label` is dense over
        the sorted label names and null where an image has none.

    Raises:
        UsageError: There is no such folder, or the labels do not fit its images.
        SaeRayError: The folder holds no file, or one whose name is not UTF-8.
    """
    if folder.filesystem.get_file_info(folder.path).type != fs.FileType.Directory:
        raise UsageError(f"there is no image folder {folder}; name a folder of JPEG, PNG or WebP files")
    try:
        sizes = folder.files(recursive=True)
    except UnicodeDecodeError as error:
        raise SaeRayError(f"{folder} holds a file whose name is not UTF-8: {error.object!r}; rename it") from error
    visible = [path for path in sizes if not any(part[0] == "." for part in path.split("/"))]
    image_ids, label_names = read_labels(labels, folder, sorted(visible, key=lambda path: path.encode()))
    if not image_ids:
        raise SaeRayError(f"the image folder {folder} holds no file; name a folder of JPEG, PNG or WebP files")
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
    """One side of a manifest, `image_index` dense again.

    An image's side depends on its `image_id` and the fraction alone, so it stays when other files come or go, and a
    larger fraction only ever moves images from `train` to `heldout`. A side may be empty.
    """
    if not 0 <= heldout_fraction <= 1:
        raise UsageError(f"heldout_fraction is {heldout_fraction}; it must lie between 0 and 1")
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


def decode_image(data: bytes, max_pixels: int = PIXEL_LIMIT, at_least: int | None = None) -> Image.Image:
    """Decodes a JPEG, PNG or WebP file to RGB, upright as its EXIF orientation says; of an animation the first frame.

    Colours are taken as CLIP's own preprocessing takes them (`convert("RGB")`): transparency is dropped rather than
    composed over a background, palettes are resolved, CMYK is converted. 16-bit gray is scaled to 8 bits, where Pillow
    alone would clip it.

    Args:
        data: The file.
        max_pixels: More are refused, by the header alone.
        at_least: A JPEG may come reduced to a half, quarter or eighth, whichever is the smallest whose sides have at
            least so many pixels.

    Raises:
        BadImage: `zero bytes`, `not an image`, `unsupported format: …`, `truncated`, `pixel bomb: WxH`,
            `aspect ratio: WxH`, or `unreadable: …` with the decoder's own words.
    """
    if not data:
        raise BadImage("zero bytes")
    image = _open(data)
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(f"pixel bomb: {width}x{height}")
    if max(width, height) > ASPECT_LIMIT * min(width, height):
        raise BadImage(f"aspect ratio: {width}x{height}")
    try:
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        image.load()
        return _upright(_to_rgb(image), image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever a damaged file makes them raise
        raise BadImage(_reason(error)) from error


def _open(data: bytes) -> Image.Image:
    """Reads the header only. The readers are called directly, since `Image.open` hides the size of a pixel bomb."""
    from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    if data.startswith(b"\xff\xd8\xff"):
        reader = JpegImagePlugin.JpegImageFile
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        reader = PngImagePlugin.PngImageFile
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        if len(data) < int.from_bytes(data[4:8], "little") + 8:
            raise BadImage("truncated")
        reader = WebPImagePlugin.WebPImageFile
    else:
        raise BadImage(_other_format(data))
    stream = BytesIO(data)
    try:
        return reader(stream, "")
    except Image.DecompressionBombError as error:
        raise BadImage(f"pixel bomb: {error}") from error
    except Exception as error:
        # A header that breaks off leaves the reader at the end of the file.
        raise BadImage("truncated" if stream.tell() >= len(data) else _reason(error)) from error


def _other_format(data: bytes) -> str:
    from PIL import Image

    try:
        return f"unsupported format: {Image.open(BytesIO(data)).format}"
    except Exception:  # whatever a foreign reader trips over, this is no image of ours
        return "not an image"


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "RGB":
        return image  # as it is, where convert() would copy it
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.rint(wide / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the direct way to RGB warns
    return image.convert("RGB")


def _upright(rgb: Image.Image, source: Image.Image) -> Image.Image:
    from PIL import ExifTags, Image

    try:
        orientation = source.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken metadata does not spoil the picture
        orientation = 1
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return rgb if turn is None else rgb.transpose(turn)


def _reason(error: Exception) -> str:
    message = str(error) or type(error).__name__
    return "truncated" if "truncated" in message.lower() else f"unreadable: {message.splitlines()[0][:80]}"
