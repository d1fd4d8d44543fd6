"""A part of an image set through an encoder: pixels to the rows of every site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sae_ray.encoders.base import Encoder
from sae_ray.encoders.info import site_width
from sae_ray.encoders.sites import Site

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8


class SiteRows(NamedTuple):
    """The activations of a part at one site, sorted by (`image_index`, `token`)."""

    image_index: Int[np.ndarray, " rows"]
    token: Int[np.ndarray, " rows"]
    activation: Float[np.ndarray, "rows d"]
    """float32."""


def encode_part(
    encoder: Encoder,
    sites: Sequence[Site],
    pixels: UInt8[np.ndarray, "n 3 h w"],
    image_index: Int[np.ndarray, " n"],
    image_ids: Sequence[str],
    seed: int,
    batch_size: int,
) -> list[SiteRows]:
    """Runs the images batch by batch; batches are formed within the part, so that the result depends on nothing else.

    Args:
        sites: where to tap.
        pixels: the output of `load_preprocess`, stacked.
        image_index: of every image, ascending.
        image_ids: of every image; the draw of `random:n` depends on them.
        seed: the study's, for `random:n`.
        batch_size: images per forward pass.

    Returns:
        One element per site.
    """
    pieces: list[list[SiteRows]] = [[] for _ in sites]
    for start in range(0, len(pixels), batch_size):
        batch = slice(start, start + batch_size)
        tapped = encoder.tap(torch.from_numpy(pixels[batch]), sites, image_ids[batch], seed)
        for site, rows in zip(sites, pieces, strict=True):
            position, token, activation = (tensor.cpu().numpy() for tensor in tapped[site])
            rows.append(SiteRows(image_index[batch][position], token, activation))
    return [_joined(rows, site_width(encoder.info, site)) for site, rows in zip(sites, pieces, strict=True)]


def _joined(pieces: Sequence[SiteRows], width: int) -> SiteRows:
    if not pieces:
        return SiteRows(np.zeros(0, np.int64), np.zeros(0, np.int16), np.zeros((0, width), np.float32))
    return SiteRows(*(np.concatenate(column) for column in zip(*pieces, strict=True)))
