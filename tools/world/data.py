"""Rendered images and their labels as arrays, for the scripts that train the world's models."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sae_ray.world.render import BACKGROUNDS, COLOURS, SEED, SHAPES, SIDE, Attributes, attributes, render

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
"""How every model of the world normalises pixels in 0..1."""

SHAPE_NAMES = (*SHAPES, None)
COLOUR_NAMES = (*COLOURS, None)
BACKGROUND_NAMES = (*BACKGROUNDS, "noisy")
LABEL_NAMES = (SHAPE_NAMES, COLOUR_NAMES, BACKGROUND_NAMES)


class Rendered(NamedTuple):
    """A range of images in memory."""

    pixels: torch.Tensor
    """uint8 [images, 3, SIDE, SIDE]."""
    labels: torch.Tensor
    """int64 [images, 3]: positions in `SHAPE_NAMES`, `COLOUR_NAMES` and `BACKGROUND_NAMES`."""
    shown: list[Attributes]
    """The same labels by name."""

    def normalized(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """float32 [rows, 3, SIDE, SIDE] as the models take them."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        return (self.pixels[rows].float() / 255 - mean) / std


def rendered(start: int, stop: int, processes: int = 2, seed: int = SEED) -> Rendered:
    """Images from `start` up to, but not including, `stop`."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    chunks = [range(low, min(low + 1000, stop)) for low in range(start, stop, 1000)]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        parts = list(pool.map(_chunk, chunks, [seed] * len(chunks)))
    shown = [attributes(index, seed) for index in range(start, stop)]
    labels = [
        (SHAPE_NAMES.index(a.shape), COLOUR_NAMES.index(a.colour), BACKGROUND_NAMES.index(a.background)) for a in shown
    ]
    pixels = torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2).contiguous()
    return Rendered(pixels, torch.tensor(labels), shown)


def _chunk(indices: range, seed: int) -> np.ndarray:
    return np.stack([np.asarray(render(index, seed)) for index in indices])


def image_processor() -> CLIPImageProcessor:
    """The transformers preprocessing of these models, applied to a user's images."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
