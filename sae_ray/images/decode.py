"""Decoding one image file."""

from __future__ import annotations

from contextlib import suppress
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from sae_ray.errors import SaeRayError
from sae_ray.images.imposters import not_an_image

if TYPE_CHECKING:
    from PIL import Image

PIXEL_LIMIT = 178_956_970
"""Larger images are rejected without being decoded. Pillow raises an error above the same limit."""

ASPECT_LIMIT = 200
"""Images with a larger ratio of longest to shortest side are rejected. Resizing the shortest side to a model's input
size scales the longest side too, so a strip of 1 × 60 000 pixels would fill the memory."""


class BadImage(SaeRayError):
    """A file that is not a usable image. `reason` is short and stable, for the table of rejects."""

    @property
    def reason(self) -> str:
        return str(self)


def decode_image(data: bytes, max_pixels: int = PIXEL_LIMIT, at_least: int | None = None) -> Image.Image:
    """Decodes a JPEG, PNG or WebP file to RGB, turned upright by its EXIF orientation. Animations give the first frame.

    Colours are converted as in CLIP's own preprocessing (`convert("RGB")`): transparency is dropped rather than
    composed over a background, palettes are resolved, CMYK is converted. 16-bit grey is scaled to 8 bits, where Pillow
    alone would clip it.

    Args:
        data: The content of the file.
        max_pixels: Images with more pixels are rejected by their header.
        at_least: Allows a JPEG to be decoded at a half, quarter or eighth of its size: the smallest whose sides have at
            least this many pixels.

    Raises:
        BadImage: `zero bytes`, `not an image`, `not an image: an HTML page` (or what else it is), `unsupported
            format: …`, `truncated`, `pixel bomb: WxH`, `aspect ratio: WxH`, or `unreadable: …` with the decoder's own
            words.
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
        _turn_upright(image)
        return _to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can make a decoder raise anything
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
        # A truncated header leaves the reader at the end of the file.
        raise BadImage("truncated" if stream.tell() >= len(data) else _reason(error)) from error


def _other_format(data: bytes) -> str:
    from PIL import Image

    try:
        return f"unsupported format: {Image.open(BytesIO(data)).format}"
    except Exception:  # whatever the reader raises, it is not a supported image
        return not_an_image(data)


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "RGB":
        return image  # convert() would copy it
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.float64)
        return Image.fromarray(np.rint(wide / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # converting directly to RGB warns
    return image.convert("RGB")


def _turn_upright(image: Image.Image) -> None:
    from PIL import ImageOps

    with suppress(Exception):  # broken metadata does not spoil the picture
        ImageOps.exif_transpose(image, in_place=True)


def _reason(error: Exception) -> str:
    message = str(error) or type(error).__name__
    return "truncated" if "truncated" in message.lower() else f"unreadable: {message.splitlines()[0][:80]}"
