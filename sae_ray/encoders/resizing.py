"""Resizing as vision models' processors do it, and a faster version of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


class Box(NamedTuple):
    """A rectangle in an image, in fractions of its width and height from the upper left corner."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether they have an area in common."""
        across = min(self.right, other.right) > max(self.left, other.left)
        return across and min(self.bottom, other.bottom) > max(self.top, other.top)


WHOLE = Box(0.0, 0.0, 1.0, 1.0)


def size_with_shortest(size: tuple[int, int], shortest: int) -> tuple[int, int]:
    """Width and height once the shorter of both has `shortest` pixels, rounded as transformers and torchvision do."""
    width, height = size
    return int(shortest * width / min(size)), int(shortest * height / min(size))


def fast_resize(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """`image.resize(size, resample)` of an RGB image by torch's vectorised kernel, several times as fast.

    It is what torchvision does with a tensor of bytes. On photographs about one value in 200 differs from Pillow's, by
    one grey level; more do around hard edges, where it matters which axis comes first: Pillow chooses by the sizes.
    Ways of sampling other than bicubic and bilinear are left to Pillow.
    """
    import torch
    from PIL import Image

    modes: dict[int, str] = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}
    mode = modes.get(resample)
    if mode is None or image.size == size:
        return image.resize(size, resample)
    width, height = size
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)
    resized = torch.nn.functional.interpolate(pixels, (height, width), mode=mode, antialias=True)
    return Image.fromarray(resized[0].permute(1, 2, 0).contiguous().numpy())
