"""Spatial coherence of all neurons of a site with patches: Moran's I of their maps on their top images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sae_ray.concepts.config import Patches
from sae_ray.concepts.spatial import morans_i
from sae_ray.scores.scoring import image_blocks

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from sae_ray.sae import SAE
    from sae_ray.store.activations import ActivationStore


def spatial_coherence(
    sae: SAE | None, store: ActivationStore, top_images: Int[np.ndarray, "neurons k"], patches: Patches
) -> Float[np.ndarray, " neurons"]:
    """The mean of `morans_i` over each neuron's top images, in a second pass over their activations.

    Args:
        sae: on any device; None for raw coordinates.
        store: activations of all tokens.
        top_images: positions among the images of the store, -1 in unused places.
        patches: of the encoder.

    Returns:
        NaN for a neuron without a top image on which its patches differ.
    """
    neuron, rank = np.nonzero(top_images >= 0)
    image = top_images[neuron, rank].astype(np.int64)
    order = np.lexsort((neuron, image))
    neuron, image = neuron[order], image[order]
    total, n = np.zeros((2, len(top_images)))
    n_seen = 0
    for number, places in (piece for block in image_blocks(store) for piece in block):
        row_index, token, activation = store.read(number, places)
        row_image = np.unique(row_index, return_inverse=True)[1] + n_seen
        n_seen = row_image[-1] + 1 if len(row_image) else n_seen
        mine = slice(*np.searchsorted(image, (row_image[0], row_image[-1] + 1))) if len(row_image) else slice(0)
        if not len(image[mine]):
            continue
        maps = _maps(sae, activation, row_image, token, image[mine], neuron[mine], patches)
        found = morans_i(maps)
        known = ~np.isnan(found)
        np.add.at(total, neuron[mine][known], found[known])
        np.add.at(n, neuron[mine][known], 1)
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


def _maps(
    sae: SAE | None,
    activation: np.ndarray,
    row_image: Int[np.ndarray, " rows"],
    token: Int[np.ndarray, " rows"],
    image: Int[np.ndarray, " pairs"],
    neuron: Int[np.ndarray, " pairs"],
    patches: Patches,
) -> Float[np.ndarray, "pairs height width"]:
    """Of pairs sorted by image and neuron."""
    wanted = np.isin(row_image, image)
    activation, row_image, token = activation[wanted], row_image[wanted], token[wanted].astype(np.int64)
    if sae is None:
        starts, ends = (np.searchsorted(row_image, image, side=side) for side in ("left", "right"))
        length = ends - starts
        pair = np.repeat(np.arange(len(image)), length)
        row = np.repeat(starts - np.r_[0, length.cumsum()[:-1]], length) + np.arange(length.sum())
        value = activation[row, neuron[pair]]
    else:
        import torch

        codes = sae.encode_sparse(torch.tensor(activation).to(sae.device).float())
        row, latent, value = (tensor.cpu().numpy() for tensor in (codes.rows, codes.latents, codes.values))
        width = sae.d_sae
        keys, sought = image * width + neuron, row_image[row] * width + latent
        pair = np.minimum(np.searchsorted(keys, sought), len(keys) - 1)
        hit = keys[pair] == sought
        pair, row, value = pair[hit], row[hit], value[hit]
    place = token[row] - patches.first_token
    on_grid = (place >= 0) & (place < patches.rows * patches.columns)
    maps = np.zeros((len(image), patches.rows * patches.columns))
    maps[pair[on_grid], place[on_grid]] = value[on_grid]
    return maps.reshape(len(image), patches.rows, patches.columns)
