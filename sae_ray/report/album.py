"""The images of a report, numbered in the order in which they are needed and packed into sprites.

A sprite is one JPEG file of at most `SIDE` × `SIDE` thumbnails, so that a page of neurons loads a few files instead of
hundreds. A thumbnail shows what the encoder sees: the image resized and cropped by the encoder's rules, then shrunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from sae_ray.concepts.naming import label_title
from sae_ray.study.step_plans import ImagePlan

if TYPE_CHECKING:
    from jaxtyping import Int, UInt8

SIDE = 10
"""Thumbnails per row and column of a sprite."""
LONGEST = 112
"""Maximum pixels of a thumbnail's longer side; smaller images are not enlarged."""
MOST = 60_000
"""Maximum number of thumbnails in a report. Further images are shown by name only."""
BLANK = (128, 128, 128)


class Album:
    """The images that a report shows, numbered from 0.

    Args:
        sets: the image sets they come from.
        needed: (name of the set, `image_index`), most important first; -1 for no image; duplicates are allowed.
    """

    def __init__(self, sets: Sequence[ImagePlan], needed: Iterable[tuple[str, Int[np.ndarray, " n"]]]):
        self.sets = tuple(sets)
        *starts, n_images = np.cumsum([0, *(one.n_images for one in sets)]).tolist()
        self._starts = dict(zip((one.name for one in sets), starts, strict=True))
        keys = [index.ravel()[index.ravel() >= 0] + self._starts[name] for name, index in needed]
        joined = np.concatenate([np.zeros(0, dtype=np.int64), *keys])
        unique, first = np.unique(joined, return_index=True)
        self._keys = unique[np.argsort(first)]
        self._number = np.full(n_images + 1, -1)
        self._number[self._keys] = np.arange(len(self._keys))

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def n_pictured(self) -> int:
        """How many images get a thumbnail: those with the lowest numbers."""
        return min(len(self), MOST)

    @property
    def sprites(self) -> list[range]:
        """The numbers of the images of each sprite."""
        return [range(start, min(start + SIDE**2, self.n_pictured)) for start in range(0, self.n_pictured, SIDE**2)]

    def numbers(self, name: str, image_index: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """The numbers of images of a set; -1 stays -1."""
        # Index -1 reads the last element, which belongs to no image and holds -1.
        return self._number[np.where(image_index >= 0, image_index + self._starts[name], -1)]

    def image(self, number: int) -> tuple[ImagePlan, int]:
        """The set and `image_index` of an image."""
        key = int(self._keys[number])
        images = [one for one in self.sets if self._starts[one.name] <= key][-1]
        return images, key - self._starts[images.name]

    def name(self, number: int) -> str:
        """The `image_id` of an image."""
        images, index = self.image(number)
        return images.manifest["image_id"][index].as_py()

    def captions(self, sprite: int) -> list[list[str | None]]:
        """`image_id` and label, as it is shown, of each image of a sprite."""
        captions = []
        for number in range(sprite * SIDE**2, min((sprite + 1) * SIDE**2, len(self))):
            images, index = self.image(number)
            image_id, label = (
                table[index].as_py() for table in (images.manifest["image_id"], images.labels["label_name"])
            )
            captions.append([image_id, None if label is None else label_title(label)])
        return captions


def thumbnail_size(image_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of thumbnails for an encoder with this input size."""
    scale = min(1.0, LONGEST / max(image_size))
    return max(1, round(image_size[0] * scale)), max(1, round(image_size[1] * scale))


def sprite_of(pixels: Sequence[UInt8[np.ndarray, "3 h w"] | None], size: tuple[int, int], side: int = SIDE) -> bytes:
    """A sprite as a JPEG file.

    Args:
        pixels: at most `side` ** 2 images as the encoder sees them; None leaves a grey thumbnail.
        size: height and width of a thumbnail.
        side: thumbnails per row and column.
    """
    from PIL import Image

    height, width = size
    sprite = Image.new("RGB", (side * width, side * height), BLANK)
    for place, one in enumerate(pixels):
        if one is None:
            continue
        thumbnail = Image.fromarray(one.transpose(1, 2, 0))
        if thumbnail.size != (width, height):
            thumbnail = thumbnail.resize((width, height), Image.Resampling.LANCZOS)
        sprite.paste(thumbnail, (place % side * width, place // side * height))
    out = BytesIO()
    sprite.save(out, "JPEG", quality=85, subsampling=0)  # no chroma subsampling: thumbnails are small
    return out.getvalue()
