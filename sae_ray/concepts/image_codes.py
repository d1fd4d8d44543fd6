"""Codes of images: one pass of an SAE over a store, which keeps what is not 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_ray.concepts.inputs import SparseMatrix
from sae_ray.sae.second_moment import MOMENT_ROWS, SecondMoment
from sae_ray.scores.scoring import image_blocks, n_neurons
from sae_ray.scores.statistics import pool_dense, pool_tokens

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from sae_ray.sae import SAE
    from sae_ray.store.activations import ActivationStore


class ImageCodes(NamedTuple):
    """What one pass keeps."""

    image_index: Int[np.ndarray, " images"]
    """Ascending; images that could not be read are missing."""
    codes: Float[SparseMatrix, "images neurons"]
    """CSC: the mean of the codes over each image's tokens; for raw neurons of the activations."""
    l0: Int[np.ndarray, " counts"]
    """Number of activations by how many latents are active on them."""
    moment: SecondMoment
    """Of the activations."""
    activations: Float[np.ndarray, "images d"] | None
    """Where they were asked for and every image has one."""


def image_codes(
    sae: SAE | None,
    store: ActivationStore,
    keep_activations: bool = False,
    after_images: Callable[[int], None] = lambda done: None,
) -> ImageCodes:
    """Encodes all images of a store, in the order of `image_index` and in blocks that the store alone determines.

    Memory: 12 bytes for each code that is not 0, twice for a moment, and one block.

    Args:
        sae: on any device; None for the raw coordinates of the activation.
        store: activations of the site that the SAE was trained on.
        keep_activations: as float32, if there is one per image.
        after_images: called with the number of images done.

    Raises:
        UsageError: the SAE takes activations of another width.
    """
    from scipy.sparse import csc_array

    width = n_neurons(sae, store)
    stride = -(-store.n_rows // MOMENT_ROWS) or 1
    keep_activations = keep_activations and store.n_rows == store.n_images
    moment, l0 = SecondMoment(store.d), np.zeros(1, np.int64)
    indices, rows, columns, values, kept = [], [], [], [], []
    n_images = n_rows = 0
    for number, places in (piece for block in image_blocks(store) for piece in block):
        row_index, _, activation = store.read(number, places)
        images, row_image = np.unique(row_index, return_inverse=True)
        if sae is None:
            entries = pool_dense(row_image, activation)
        else:
            import torch

            found = sae.encode_sparse(torch.tensor(activation).to(sae.device).float())
            row, neuron, value = (tensor.cpu().numpy() for tensor in (found.rows, found.latents, found.values))
            active = np.bincount(np.bincount(row[value > 0], minlength=len(activation)))
            l0 = np.pad(l0, (0, max(0, len(active) - len(l0))))
            l0[: len(active)] += active
            entries = pool_tokens(row_image, row, neuron, value)
        moment.add(activation[-n_rows % stride :: stride])
        indices.append(images)
        rows.append((entries.image + n_images).astype(np.int32))
        columns.append(entries.neuron.astype(np.int32))
        values.append(entries.value)
        if keep_activations:
            kept.append(activation.astype(np.float32))
        n_images += len(images)
        n_rows += len(activation)
        after_images(n_images)
    entries = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
    codes = csc_array(entries, shape=(n_images, width))
    return ImageCodes(np.concatenate(indices), codes, l0, moment, np.concatenate(kept) if kept else None)
