"""Preprocessing that consists of torchvision's steps, as open_clip's and timm's does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_ray.encoders.resizing import Cut, cut, fast_resize, size_with_shortest

if TYPE_CHECKING:
    from jaxtyping import UInt8
    from PIL import Image


@dataclass(frozen=True)
class Preprocess:
    """Resizes and crops as the model's own transform does, or nearly so but faster."""

    transform: Any

    def __call__(self, image: Image.Image) -> UInt8[np.ndarray, "3 h w"]:
        return np.asarray(self.transform(image)).transpose(2, 0, 1)

    def cut(self, size: tuple[int, int]) -> Cut | None:
        """As `Preprocessing.cut`."""
        from torchvision.transforms import CenterCrop, Resize
        from torchvision.transforms.functional import pil_modes_mapping

        # Images are RGB already.
        steps: list[Any] = [step for step in self.transform.transforms if type(step).__name__ != "MaybeConvertMode"]
        if [type(step) for step in steps] not in ([Resize], [Resize, CenterCrop]):
            return None
        resize, middle = steps[0], steps[1].size if len(steps) > 1 else None
        if isinstance(resize.size, int):
            target = size_with_shortest(size, resize.size)
        else:
            height, width = resize.size
            target = width, height
        return cut(target, pil_modes_mapping[resize.interpolation], middle, to_even=True)


@dataclass(frozen=True)
class FastResize:
    """Stands in for torchvision's `Resize`."""

    size: int | Sequence[int]
    """Of the shortest side, or height and width."""
    resample: int

    def __call__(self, image: Image.Image) -> Image.Image:
        if isinstance(self.size, int):
            return fast_resize(image, size_with_shortest(image.size, self.size), self.resample)
        height, width = self.size
        return fast_resize(image, (width, height), self.resample)


def preprocess_of(steps: Sequence[Any], fast: bool) -> Preprocess:
    """All but the last two steps, which make a tensor and normalise it: that is done on the device.

    Args:
        steps: Those of a library's own transform for inference.
        fast: Whether to resize by `fast_resize`.
    """
    from torchvision.transforms import Compose, Resize
    from torchvision.transforms.functional import pil_modes_mapping

    on_images = list(steps[:-2])
    if fast:
        on_images = [
            FastResize(step.size, pil_modes_mapping[step.interpolation]) if type(step) is Resize else step
            for step in on_images
        ]
    return Preprocess(Compose(on_images))
