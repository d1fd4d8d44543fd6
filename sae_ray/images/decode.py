"""Decoding one image file."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from sae_ray.images.formats import BadImage, Size, open_image, reason_of
from sae_ray.images.metadata import without_metadata
from sae_ray.images.rendering import DIM, Rendering, is_deep, is_dim, rendered

if TYPE_CHECKING:
    from PIL import Image

PIXEL_LIMIT = 178_956_970
"""Larger images are rejected without being decoded. Pillow raises an error above the same limit."""

ASPECT_LIMIT = 200
"""Images with a larger ratio of longest to shortest side are rejected. Resizing the shortest side to a model's input
size scales the longest side too, so a strip of 1 × 60 000 pixels would fill the memory."""

BYTE_LIMIT = 2**30
"""Larger files are rejected without being read."""


def decode_image(
    data: bytes, max_pixels: int = PIXEL_LIMIT, at_least: int | None = None, rendering: Rendering | None = None
) -> Image.Image:
    """Decodes an image file to RGB, turned upright by its EXIF orientation. Of several pictures it gives the first.

    Formats are those of `sae_ray.images.formats`. Metadata that are damaged or too large are ignored.

    Args:
        data: The content of the file.
        max_pixels: Images with more pixels are rejected by their header.
        at_least: Allows a JPEG to be decoded at a half, quarter or eighth of its size: the smallest whose sides have at
            least this many pixels.
        rendering: How pixels become RGB. By default as in CLIP's own preprocessing.

    Raises:
        BadImage: `zero bytes`, `too large: … bytes`, `not an image`, `not an image: an HTML page` (or what else it is),
            `unsupported format: …`, `truncated`, `pixel bomb: WxH`, `aspect ratio: WxH`, or `unreadable: …` with the
            decoder's own words.
    """
    if not data:
        raise BadImage("zero bytes")
    check_bytes(len(data))
    try:
        return _decoded(data, max_pixels, at_least, rendering or Rendering())
    except BadImage:
        bare = without_metadata(data)
        if bare != data:
            with suppress(BadImage):
                return _decoded(bare, max_pixels, at_least, rendering or Rendering())
        raise


def check_bytes(n_bytes: int) -> None:
    """Raises BadImage for a file that is too large to be read."""
    if n_bytes > BYTE_LIMIT:
        raise BadImage(f"too large: {n_bytes:,} bytes")


def check_size(size: Size, max_pixels: int) -> None:
    """Raises BadImage for an image that is not to be decoded: it is too large, or a strip."""
    width, height = size
    if width * height > max_pixels:
        raise BadImage(f"pixel bomb: {width}x{height}")
    if max(size) > ASPECT_LIMIT * min(size):
        raise BadImage(f"aspect ratio: {width}x{height}")


def _decoded(data: bytes, max_pixels: int, at_least: int | None, rendering: Rendering) -> Image.Image:
    image = open_image(data, lambda size: check_size(size, max_pixels))
    try:
        deep = is_deep(image)
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        image.load()
        check_size(image.size, max_pixels)  # a few formats tell another size in their header
        _turn_upright(image)
        rgb = rendered(image, data, rendering)
        if deep and rendering.white is None and is_dim(rgb):
            rgb.info[DIM] = True
        return rgb
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # a damaged file can make a decoder raise anything
        raise BadImage(reason_of(error)) from error


def _turn_upright(image: Image.Image) -> None:
    """By its EXIF data alone, as browsers do: Pillow would also look into XMP data and texts."""
    from PIL import ImageOps

    for elsewhere in ("xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
        image.info.pop(elsewhere, None)
    with suppress(Exception):  # broken metadata does not spoil the picture
        ImageOps.exif_transpose(image, in_place=True)
