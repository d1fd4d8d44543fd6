"""The accuracy with an SAE's reconstruction in place, over all labelled images of a set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from sae_ray.concepts.labels import Labels
from sae_ray.concepts.splits import halves
from sae_ray.encoders.base import Encoder
from sae_ray.encoders.sites import Site
from sae_ray.errors import UsageError
from sae_ray.images.part import Preparation, decode_part
from sae_ray.images.rendering import Rendering
from sae_ray.sae.model import SAE
from sae_ray.steering.splicing import (
    Classifier,
    Outputs,
    Spliced,
    count_spliced,
    linear_probe,
    outputs_at,
    outputs_of,
    zero_shot,
)
from sae_ray.store.activations import ActivationStore
from sae_ray.store.files import Folder

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

BATCH = 64
"""Images per forward pass: a constant, since the last bits depend on it."""
MEAN_ROWS = 2**17
"""Activations that a mean is of, about, in whole parts of a store that are evenly spread over it."""

Batches = Callable[["Int[np.ndarray, ' wanted']"], Iterator[tuple["Int[np.ndarray, ' images']", Outputs]]]
"""Some images by `image_index`, ascending -> those of them that could be read, in batches, with their outputs."""


class ByName(NamedTuple):
    """What images are classified by without a probe."""

    classes: Int[np.ndarray, " images"]
    """The class of every image by `image_index`; -1 for none, and for a class without a readable name."""
    texts: Float[np.ndarray, "classes d"]
    """Embeddings of the names of the classes, by the text side of the encoder."""


class Recovered(NamedTuple):
    """The accuracy that is left."""

    spliced: Spliced
    classifier: Literal["zero_shot", "linear_probe"]

    @property
    def counts(self) -> dict[str, Any]:
        """As figures of a step."""
        original, reconstruction, mean, zero = self.spliced.accuracy
        return {
            "spliced_by": self.classifier,
            "spliced_images": self.spliced.n_images,
            "spliced_original": original,
            "spliced": reconstruction,
            "spliced_mean": mean,
            "spliced_zero": zero,
            "recovered": self.spliced.recovered,
        }


@torch.inference_mode()
def recovered(
    sae: SAE,
    mean: Float[Tensor, " d_in"],
    batches: Batches,
    classes: Int[np.ndarray, " images"],
    by_name: ByName | None,
    *,
    seed: int = 0,
    after_images: Callable[[int], None] = lambda done: None,
) -> Recovered | None:
    """Splices the reconstruction into the encoder for every labelled image. The same inputs give the same bits.

    With names of classes the classifier is zero-shot, and judged on all these images. Without, it is a linear probe
    that is fitted on one half of them, unspliced, and judged on the other (`halves`).

    Args:
        sae: on any device.
        mean: of the activations that it was trained on.
        batches: `stored_batches` or `encoded_batches`.
        classes: of every image by `image_index`, -1 for none.
        by_name: None for the probe.
        seed: the study's.
        after_images: called with the number of images done.

    Returns:
        None if there are fewer than two classes to tell apart.
    """
    done = 0

    def read(wanted: Int[np.ndarray, " wanted"]) -> Iterator[tuple[Tensor, Outputs]]:
        nonlocal done
        for images, outputs in batches(wanted):
            yield torch.from_numpy(classes[images]), outputs
            done += len(images)
            after_images(done)

    if by_name is not None:
        classes = by_name.classes
        judged, classify = np.flatnonzero(classes >= 0), zero_shot(torch.from_numpy(by_name.texts))
    else:
        fitted, judged = halves(Labels.of(classes), seed)
        probe = _probe(read(fitted))
        if probe is None:
            return None
        classify = probe
    if len(np.unique(classes[judged])) < 2:
        return None
    parts = [count_spliced(outputs, sae, mean, classify, shown) for shown, outputs in read(judged)]
    return Recovered(Spliced.merged(parts), "linear_probe" if by_name is None else "zero_shot") if parts else None


def _probe(images: Iterator[tuple[Tensor, Outputs]]) -> Classifier | None:
    read = [(outputs(None), shown) for shown, outputs in images]
    if not read:
        return None
    outputs, shown = (torch.cat(column) for column in zip(*read, strict=True))
    try:
        return linear_probe(outputs, shown)
    except UsageError:  # one class
        return None


def stored_batches(store: ActivationStore, device: Any = "cpu") -> Batches:
    """Of an SAE of the very output that is classified, as it is stored."""

    def batches(wanted: Int[np.ndarray, " wanted"]) -> Iterator[tuple[Int[np.ndarray, " images"], Outputs]]:
        for number in store.parts:
            index, _, activation = store.read(number)
            rows = np.flatnonzero(np.isin(index, wanted))
            if len(rows):
                yield index[rows], outputs_of(torch.from_numpy(activation[rows]).float().to(device))

    return batches


def encoded_batches(
    encoder: Encoder,
    preparation: Preparation,
    images: Folder,
    ids: list[str],
    rendering: Rendering,
    site: Site,
    readout: Site,
) -> Batches:
    """Of an SAE of a residual site: images are read once more, and the encoder runs on with edited activations.

    Args:
        ids: `image_id` of every image, by `image_index`.
        site, readout: as in `outputs_at`.
    """

    def batches(wanted: Int[np.ndarray, " wanted"]) -> Iterator[tuple[Int[np.ndarray, " images"], Outputs]]:
        for start in range(0, len(wanted), BATCH):
            places = wanted[start : start + BATCH]
            part = decode_part(images, [ids[place] for place in places], [preparation], rendering=rendering)
            if len(part.accepted):
                yield places[part.accepted], outputs_at(encoder, torch.from_numpy(part.pixels[0]), site, readout)

    return batches


def mean_activation(store: ActivationStore) -> Float[Tensor, " d"]:
    """Of at most about `MEAN_ROWS` activations: what stands in place of every one when a site is ablated."""
    total, n = np.zeros(store.d), 0
    for number in list(store.parts)[:: -(-store.n_rows // MEAN_ROWS) or 1]:
        activation = store.read(number)[2]
        total += activation.sum(axis=0, dtype=np.float64)
        n += len(activation)
    return torch.from_numpy(total / max(1, n)).float()
