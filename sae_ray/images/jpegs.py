"""JPEGs that a GPU may decode: those of the usual kind. All others are left to Pillow."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_ray.images.decode import PIXEL_LIMIT, check_size
from sae_ray.images.formats import BadImage, open_image

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from PIL.JpegImagePlugin import JpegImageFile

SAMPLINGS = ((1, 1), (2, 1), (2, 2))
"""Of brightness against colour: 4:4:4, 4:2:2 and 4:2:0."""
ORIENTATION = 0x0112


class Jpeg(NamedTuple):
    """A file that is decoded later, by a GPU."""

    data: UInt8[np.ndarray, " bytes"]
    size: tuple[int, int]
    """Width and height as they are stored, before it is turned."""
    orientation: int
    """By its EXIF data, 1 to 8; 1 is upright."""


def usual_jpeg(data: bytes) -> Jpeg | None:
    """The file, if it is a whole baseline JPEG in YCbCr; its content alone decides.

    None for any other file, such as one that is progressive, grey, CMYK, cut off, too large or no JPEG at all.
    """
    if not data.startswith(b"\xff\xd8\xff") or not data[-64:].rstrip(b"\0").endswith(b"\xff\xd9"):
        return None
    try:
        image = open_image(data, lambda size: check_size(size, PIXEL_LIMIT))
    except BadImage:  # found again, and told of, by who decodes it
        return None
    if not _is_usual(image):  # pyright: ignore[reportArgumentType]
        return None
    try:
        image.info.pop("xmp", None)  # Pillow would look for the orientation there, too
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata can make a reader raise anything
        return None
    known = orientation if orientation in range(1, 9) else 1
    return Jpeg(np.frombuffer(data, np.uint8), image.size, known)


def _is_usual(image: JpegImageFile) -> bool:
    ids, across, down, _ = zip(*image.layer, strict=True)
    return (
        image.mode == "RGB"
        and "progressive" not in image.info
        and image.info.get("adobe_transform", 1) == 1
        and ids == (1, 2, 3)
        and (across[0], down[0]) in SAMPLINGS
        and {*across[1:], *down[1:]} == {1}
    )
