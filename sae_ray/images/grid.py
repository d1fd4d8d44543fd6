"""Several images as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

CELL = 224
"""Pixels of a side of an image in a grid."""


def grid_of(images: Sequence[Image.Image]) -> Image.Image:
    """A grid of images, as square as may be, row by row: 4 × 4 for 16. Each is cropped to its central square.

    Places that are left are white.
    """
    from PIL import Image, ImageOps

    columns = math.ceil(math.sqrt(len(images)))
    grid = Image.new("RGB", (columns * CELL, -(-len(images) // columns) * CELL), "white")
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        grid.paste(ImageOps.fit(image.convert("RGB"), (CELL, CELL)), (column * CELL, row * CELL))
    return grid
