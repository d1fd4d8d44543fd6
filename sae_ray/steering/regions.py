"""Regions of an image, and the patches of a tower that lie in them."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_ray.encoders.info import EncoderInfo
from sae_ray.encoders.resizing import Box
from sae_ray.errors import UsageError
from sae_ray.images import BadImage, decode_image
from sae_ray.images.rendering import Rendering
from sae_ray.store.files import parent_and_name

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from PIL import Image

MASK_RENDERING = Rendering(background=(0, 0, 0))
"""Where a mask is transparent, it is outside."""


@dataclass(frozen=True, eq=False)
class Region:
    """What lies in one of some rectangles or under a mask, in an image as it is shown: upright by its EXIF orientation.

    Raises UsageError for a rectangle that is none or exceeds the image, and where nothing is inside.
    """

    rectangles: tuple[Box, ...] = ()
    mask: Bool[np.ndarray, "height width"] | None = None
    """Of any size; it is stretched over the whole image."""

    def __post_init__(self):
        for one in self.rectangles:
            if not (0 <= one.left < one.right <= 1 and 0 <= one.top < one.bottom <= 1):  # NaN compares as false
                raise UsageError(
                    f"region has the rectangle {_shown(one)}; give left, top, right and bottom as fractions of the "
                    "image from 0 to 1, with left < right and top < bottom"
                )
        if self.mask is not None and not self.mask.any():
            raise UsageError("the mask of region is empty; what is edited must be white in it, and the rest black")
        if not self.rectangles and self.mask is None:
            raise UsageError("region is empty; give rectangles or a mask, or leave it out to edit the whole image")

    @classmethod
    def from_dict(cls, values: Any) -> Region:
        """From plain values: `{"rectangles": [[left, top, right, bottom], …], "mask": "mask.png"}`, or one of both.

        `mask` is a path, a URI, or a data URL in base64, of an image file (`mask_of`).

        Raises:
            UsageError: a value is invalid, or the mask cannot be read.
        """
        if not isinstance(values, Mapping) or not values.keys() <= {"rectangles", "mask"}:
            raise UsageError(f"region is {values!r:.200}; it must be a table with the keys rectangles and mask")
        rectangles = values.get("rectangles") or ()
        if not isinstance(rectangles, list | tuple) or not all(map(_is_rectangle, rectangles)):
            raise UsageError(
                f"rectangles of region is {rectangles!r:.200}; it must be a list of [left, top, right, bottom]"
            )
        mask = values.get("mask")
        return cls(tuple(Box(*one) for one in rectangles), None if mask is None else _read_mask(mask))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` takes them; the mask as a data URL."""
        rectangles = {"rectangles": [list(one) for one in self.rectangles]} if self.rectangles else {}
        return rectangles | ({} if self.mask is None else {"mask": _as_data_url(self.mask)})

    def inside(
        self, x: Float[np.ndarray, " columns"], y: Float[np.ndarray, " rows"]
    ) -> Bool[np.ndarray, "rows columns"]:
        """Which points of a grid lie in the region, given their fractions of the image's width and height."""
        found = np.zeros((len(y), len(x)), dtype=bool)
        for one in self.rectangles:
            found |= ((one.top <= y) & (y < one.bottom))[:, None] & ((one.left <= x) & (x < one.right))
        if self.mask is not None:
            (rows, on_rows), (columns, on_columns) = map(_nearest, (y, x), self.mask.shape)
            found |= self.mask[np.ix_(rows, columns)] & on_rows[:, None] & on_columns
        return found


def tokens_in(region: Region, view: Box, tower: EncoderInfo) -> tuple[int, ...]:
    """The tokens of the patches of which at least half lies in a region; the CLS token is of no place and never in one.

    A patch is judged by the centres of its pixels.

    Args:
        region: Of an image.
        view: The part of that image that the tower sees (`Preprocess.view`).

    Returns:
        Numbers as in a `Site`, ascending.

    Raises:
        UsageError: A rectangle lies outside of what the tower sees, or no patch lies in the region.
    """
    for one in region.rectangles:
        if not one.meets(view):
            raise UsageError(
                f"region has the rectangle {_shown(one)}, which is outside of what the model sees of this image; it "
                f"crops images, here to {_shown(view)} (left, top, right, bottom); move the rectangle there"
            )
    (height, width), (rows, columns) = tower.image_size, tower.patch_grid
    inside = region.inside(
        view.left + (np.arange(width) + 0.5) / width * (view.right - view.left),
        view.top + (np.arange(height) + 0.5) / height * (view.bottom - view.top),
    )
    down, across = height // rows, width // columns  # pixels beyond the last patch belong to none
    shares = inside[: rows * down, : columns * across].reshape(rows, down, columns, across).mean(axis=(1, 3))
    places = np.flatnonzero(shares >= 0.5)
    if not len(places):
        raise UsageError(
            f"no patch lies in region by at least half: the model sees {_shown(view)} (left, top, right, bottom) of "
            f"this image in {rows} × {columns} patches; choose a larger region"
        )
    return tuple(int(place) + tower.has_cls for place in places)


def mask_of(image: Image.Image) -> Bool[np.ndarray, "height width"]:
    """What is closer to white than to black is inside."""
    return np.asarray(image.convert("L")) >= 128


def _read_mask(source: Any) -> Bool[np.ndarray, "height width"]:
    if not isinstance(source, str):
        raise UsageError(f"mask of region is {source!r:.200}; it must be the path of an image file or a data URL")
    try:
        return mask_of(decode_image(_read(source), rendering=MASK_RENDERING))
    except (BadImage, OSError, binascii.Error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"mask of region is {source:.100}, which is not a usable image ({reason}); give a PNG or other image file, "
            "white where the image is edited and black elsewhere"
        ) from error


def _read(source: str) -> bytes:
    if source.startswith("data:"):
        return base64.b64decode(source.partition(",")[2], validate=True)
    folder, name = parent_and_name(source)
    return folder.read_bytes(name)


def _as_data_url(mask: Bool[np.ndarray, "height width"]) -> str:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(mask).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _nearest(at: Float[np.ndarray, " n"], length: int) -> tuple[np.ndarray, Bool[np.ndarray, " n"]]:
    """The pixels in which these fractions of a length lie, and which of them do lie on it."""
    return np.clip((at * length).astype(int), 0, length - 1), (at >= 0) & (at < 1)


def _is_rectangle(value: Any) -> bool:
    numbers = isinstance(value, list | tuple) and [one for one in value if isinstance(one, int | float)]
    return bool(numbers) and len(numbers) == len(value) == 4


def _shown(box: Box) -> str:
    return f"[{', '.join(f'{value:.3g}' for value in box)}]"
