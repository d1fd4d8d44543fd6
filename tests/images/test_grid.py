"""Several images as one."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sae_ray.images.grid import CELL, grid_of


def centres(grid: Image.Image) -> list[int]:
    """The red value in the middle of each place, row by row."""
    pixels = np.array(grid)[CELL // 2 :: CELL, CELL // 2 :: CELL, 0]
    return pixels.flatten().tolist()


@pytest.mark.parametrize(("n", "shape"), [(1, (1, 1)), (2, (1, 2)), (5, (2, 3)), (16, (4, 4))])
def test_images_stand_row_by_row_and_the_rest_is_white(n: int, shape: tuple[int, int]):
    rows, columns = shape
    grid = grid_of([Image.new("RGB", (30, 30), (10 * place, 0, 0)) for place in range(n)])
    assert grid.size == (columns * CELL, rows * CELL)
    assert centres(grid) == [10 * place for place in range(n)] + [255] * (rows * columns - n)


def test_images_are_cropped_to_their_central_square_in_any_mode():
    wide = Image.new("L", (300, 100), 0)
    wide.paste(200, (100, 0, 200, 100))
    assert set(np.array(grid_of([wide]))[:, 8:-8].flatten().tolist()) == {200}
