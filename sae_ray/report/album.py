"""The images of a report, numbered in the order in which they are needed and packed into sprites.

A sprite is one JPEG file of at most `SIDE` × `SIDE` thumbnails, so that a page of neurons loads a few files instead of
hundreds. A thumbnail shows what the encoder sees: the image resized and cropped by the encoder's rules, then shrunk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sae_ray.images import BadImage, decode_image
from sae_ray.study.plan import ImagePlan

if TYPE_CHECKING:
    from jaxtyping import Int, UInt8
    from PIL import Image

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
        """`image_id` and label name of each image of a sprite."""
        captions = []
        for number in range(sprite * SIDE**2, min((sprite + 1) * SIDE**2, len(self))):
            images, index = self.image(number)
            image_id, label_name = images.manifest["image_id"][index], images.labels["label_name"][index]
            captions.append([image_id.as_py(), label_name.as_py()])
        return captions


def thumbnail_size(image_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of thumbnails for an encoder with this input size."""
    scale = min(1.0, LONGEST / max(image_size))
    return max(1, round(image_size[0] * scale)), max(1, round(image_size[1] * scale))


def read_pixels(images: ImagePlan, index: int, preprocess: Callable) -> UInt8[np.ndarray, "3 h w"] | None:
    """The image as the encoder sees it; None if it can no longer be read."""
    try:
        return preprocess(decode_image(images.folder.read_bytes(images.manifest["image_id"][index].as_py())))
    except (BadImage, OSError):
        return None


def write_sprites(album: Album, folder: Path, preprocess: Callable, size: tuple[int, int]) -> int:
    """Writes the sprites `<n>.jpg` into a local folder.

    Args:
        preprocess: the encoder's (`load_preprocess`).
        size: height and width of a thumbnail.

    Returns:
        The number of images that could not be read; their thumbnails are grey.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def write(first: int) -> int:
        numbers = range(first, min(first + SIDE**2, album.n_pictured))
        sprite, n_missing = _sprite(album, numbers, preprocess, size)
        out = BytesIO()
        sprite.save(out, "JPEG", quality=85, subsampling=0)  # no chroma subsampling: thumbnails are small
        (folder / f"{first // SIDE**2}.jpg").write_bytes(out.getvalue())
        return n_missing

    # Decoding, resizing and encoding release the GIL.
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        return sum(pool.map(write, range(0, album.n_pictured, SIDE**2)))


def _sprite(
    album: Album, numbers: Iterable[int], preprocess: Callable, size: tuple[int, int]
) -> tuple[Image.Image, int]:
    from PIL import Image

    height, width = size
    sprite = Image.new("RGB", (SIDE * width, SIDE * height), BLANK)
    n_missing = 0
    for place, number in enumerate(numbers):
        pixels = read_pixels(*album.image(number), preprocess)
        if pixels is None:
            n_missing += 1
            continue
        thumbnail = Image.fromarray(pixels.transpose(1, 2, 0))
        if thumbnail.size != (width, height):
            thumbnail = thumbnail.resize((width, height), Image.Resampling.LANCZOS)
        sprite.paste(thumbnail, (place % SIDE * width, place // SIDE * height))
    return sprite, n_missing
