"""A part of an image set through an encoder: pixels to the rows of every site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_ray.encoders.base import Encoder, Tapped
from sae_ray.encoders.info import rows_per_image, site_width
from sae_ray.encoders.sites import Site
from sae_ray.store.activations import Rows
from sae_ray.store.casting import Cast, cast, checked_rows

if TYPE_CHECKING:
    from jaxtyping import Int, UInt8
    from torch import Tensor


def encode_part(
    encoder: Encoder,
    sites: Sequence[tuple[Site, str]],
    pixels: UInt8[np.ndarray, "n 3 h w"] | UInt8[Tensor, "n 3 h w"],
    image_index: Int[np.ndarray, " n"],
    image_ids: Sequence[str],
    seed: int,
    batch_size: int,
    after_batch: Callable[[int], None] = lambda done: None,
) -> list[Rows]:
    """Runs the images batch by batch; batches are formed within the part, so that the result depends on nothing else.

    Activations are cast and checked on the encoder's device, and leave it in the dtype that they are stored in.

    Args:
        sites: where to tap, and the dtype to store: `float16` or `float32`.
        pixels: the output of `load_preprocess`, stacked; a tensor if they are on the encoder's device already.
        image_index: of every image, ascending.
        image_ids: of every image; the draw of `random:n` depends on them.
        seed: the study's, for `random:n`.
        batch_size: images per forward pass. A compiled encoder gets as many black ones as the last batch lacks.
        after_batch: called with the number of images done.

    Returns:
        One element per site.

    Raises:
        SaeRayError: an activation is not finite, or does not fit into the stored dtype.
    """
    on_gpu = encoder.device.type == "cuda"
    collected = [_Collected(encoder, site, dtype, len(pixels)) for site, dtype in sites]
    for start in range(0, len(pixels), batch_size):
        batch = slice(start, start + batch_size)
        shown, ids = pixels[batch], list(image_ids[batch])
        if isinstance(shown, np.ndarray):
            shown = torch.from_numpy(shown)
            if on_gpu:
                shown = shown.pin_memory()  # its copy waits for the batch before, but the host does not
        if encoder.compiled and (lacking := batch_size - len(ids)):
            shown = torch.cat([shown, shown.new_zeros(lacking, *shown.shape[1:])])
        padded = ids + [""] * (len(shown) - len(ids))
        tapped = encoder.tap(shown, [site for site, _ in sites], padded, seed)
        for rows in collected:
            rows.add(tapped[rows.site], len(ids))
        after_batch(min(start + batch_size, len(pixels)))
    if on_gpu:
        torch.cuda.current_stream(encoder.device).synchronize()  # copies from the device may still be under way
    return [rows.finished(image_index) for rows in collected]


class _Collected:
    """The rows of one site, in the memory of the host. Copies from a GPU do not wait for it: the memory is pinned."""

    def __init__(self, encoder: Encoder, site: Site, store_dtype: str, n_images: int):
        self.site = site
        self._dtype = store_dtype
        self._per_image = rows_per_image(encoder.info, site)
        n_rows, pinned = n_images * self._per_image, encoder.device.type == "cuda"

        def memory(dtype: torch.dtype, *width: int) -> Tensor:
            return torch.empty(n_rows, *width, dtype=dtype, pin_memory=pinned)

        self._token = memory(torch.int16)
        self._vectors = Cast(
            stored=memory(getattr(torch, store_dtype), site_width(encoder.info, site)),
            norm=memory(torch.float64),
            largest=memory(torch.float32),
        )
        self._n = 0

    def add(self, tapped: Tapped, n_images: int) -> None:
        """Adds the first images of a batch, whose rows are sorted by image and token."""
        n_rows = n_images * self._per_image
        place = slice(self._n, self._n + n_rows)
        self._token[place].copy_(tapped.token[:n_rows], non_blocking=True)
        for column, values in zip(self._vectors, cast(tapped.activation[:n_rows], self._dtype), strict=True):
            column[place].copy_(values, non_blocking=True)
        self._n = place.stop

    def finished(self, image_index: Int[np.ndarray, " n"]) -> Rows:
        index = np.repeat(image_index, self._per_image)
        return checked_rows(index, self._token.numpy(), self._vectors, self._dtype)
