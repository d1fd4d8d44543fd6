"""Resizing as vision models' processors do it, a faster version of it, and one for GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from PIL import Image
    from torch import Tensor

MODES = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the ways of sampling that torch has, too -> torch's names."""


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


class Preprocessing(Protocol):
    """What an encoder does to an image, apart from its values."""

    def __call__(self, image: Image.Image) -> UInt8[np.ndarray, "3 h w"]: ...

    def cut(self, size: tuple[int, int]) -> Cut | None:
        """What becomes of an image of this width and height; None if that is more than torch can do on a GPU."""
        ...


class Cut(NamedTuple):
    """What becomes of an image's shape: it is resized, and a rectangle of that is kept."""

    size: tuple[int, int]
    """Width and height to resize to."""
    resample: int
    """Pillow's number of bicubic or bilinear."""
    left: int
    top: int
    width: int
    height: int


def cut(size: tuple[int, int], resample: int, kept: tuple[int, int] | None, to_even: bool) -> Cut | None:
    """The cut that keeps the middle; None where torch cannot resize so, or pixels would have to be added.

    Args:
        size: width and height to resize to.
        resample: Pillow's way of sampling.
        kept: height and width of the middle; None for all.
        to_even: whether a corner between two pixels is rounded to the even one, as by torchvision, and not down.
    """
    height, width = kept or (size[1], size[0])
    across, down = size[0] - width, size[1] - height
    if resample not in MODES or across < 0 or down < 0:
        return None
    left, top = (round(across / 2), round(down / 2)) if to_even else (across // 2, down // 2)
    return Cut(size, resample, left, top, width, height)


def cut_tensor(image: UInt8[Tensor, "3 h w"], cut: Cut) -> UInt8[Tensor, "3 H W"]:
    """Resizes and cuts on the image's device. Some values differ by a level from Pillow's, which rounds twice."""
    import torch

    width, height = cut.size
    if image.shape[1:] != (height, width):
        mode = MODES[cut.resample]
        resized = torch.nn.functional.interpolate(image[None].float(), (height, width), mode=mode, antialias=True)
        image = resized[0].round_().clamp_(0, 255).byte()
    return image[:, cut.top : cut.top + cut.height, cut.left : cut.left + cut.width]


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

    mode = MODES.get(resample)
    if mode is None or image.size == size:
        return image.resize(size, resample)
    width, height = size
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)
    resized = torch.nn.functional.interpolate(pixels, (height, width), mode=mode, antialias=True)
    return Image.fromarray(resized[0].permute(1, 2, 0).contiguous().numpy())
