"""Profiles: how the codes of images on which a latent is strongest differ from those of the others.

One decoder row is a poor direction to steer in: where a latent fires, others that stand for the same thing fire with
it, and some that stand for other things are silent. A profile is DiffMean with the latent's own top images in place of
labelled ones, and with codes in place of activations: it is found without labels, and it is a list of edits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_ray.steering.diffmean import ClassSums, diffmean
from sae_ray.steering.interventions import Intervention, LatentEdit

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from sae_ray.sae import SAE
    from sae_ray.store.activations import ActivationStore

PROFILE_IMAGES = 200
"""Top images of a latent that are compared with all others."""
PROFILE_LATENTS = 16
"""Latents of a profile: those that differ most."""


class Profile(NamedTuple):
    """The edits of one latent's profile, the largest change first."""

    latents: tuple[int, ...]
    changes: tuple[float, ...]
    """What is added to their values, for the scale 1."""

    def intervention(self, sae: SAE, scale: float) -> Intervention:
        """Adds the changes, `scale` times, and keeps what the SAE does not reconstruct."""
        edits = zip(self.latents, self.changes, strict=True)
        return Intervention(sae, tuple(LatentEdit(latent, "add", scale * change) for latent, change in edits), "keep")


class TopImages(NamedTuple):
    """The images on which some latents are strongest, in descending order; of equal ones the first image first."""

    value: Float[np.ndarray, "latents n"]
    """Mean over the tokens; 0 in unused places."""
    image_index: Int[np.ndarray, "latents n"]

    @classmethod
    def merged(cls, parts: Sequence[TopImages], n: int = PROFILE_IMAGES) -> TopImages:
        """Of the images of all parts."""
        value, image_index = (np.concatenate(column, axis=1) for column in zip(*parts, strict=True))
        order = np.lexsort((image_index, -value))[:, :n]
        return cls(np.take_along_axis(value, order, axis=1), np.take_along_axis(image_index, order, axis=1))

    def members(self, n_images: int) -> Bool[np.ndarray, "latents images"]:
        """Which images they are, by `image_index`; those without a positive value are none."""
        members = np.zeros((len(self.value), n_images), bool)
        latent, place = np.nonzero(self.value > 0)
        members[latent, self.image_index[latent, place]] = True
        return members


def top_images(
    sae: SAE,
    store: ActivationStore,
    part: int,
    latents: Sequence[int],
    usable: Bool[np.ndarray, " images"],
    n: int = PROFILE_IMAGES,
) -> TopImages:
    """The top images of one part.

    Args:
        sae: of the store's site.
        store: training activations.
        part: its number.
        latents: whose images.
        usable: which images may be among them, by `image_index`.
        n: how many of each latent, at most.
    """
    import torch

    from sae_ray.sae.few_latents import codes_of

    row_index, _, activation = store.read(part)
    chosen = usable[row_index]
    images, row_image = np.unique(row_index[chosen], return_inverse=True)
    x = torch.tensor(activation[chosen]).to(sae.device).float()
    codes = codes_of(sae, latents)(x).cpu().numpy().astype(np.float64)
    total = np.zeros((len(images), len(latents)))
    np.add.at(total, row_image, codes)
    value = (total / np.bincount(row_image, minlength=len(images))[:, None]).T
    return TopImages.merged([TopImages(value, np.broadcast_to(images, value.shape))], n)


def code_sums(sae: SAE, store: ActivationStore, part: int, members: Bool[np.ndarray, "latents images"]) -> ClassSums:
    """Sums of the codes over the tokens of one part, with the images of each latent as a class."""
    import torch

    row_index, _, activation = store.read(part)
    codes = sae.encode_sparse(torch.tensor(activation).to(sae.device).float())
    row, latent, value = (tensor.cpu().numpy() for tensor in (codes.rows, codes.latents, codes.values))
    of_row = members[:, row_index]
    total = np.bincount(latent, value, minlength=sae.d_sae)
    of_class = [np.bincount(latent[own], value[own], minlength=sae.d_sae) for own in of_row[:, row]]
    return ClassSums(total, len(row_index), np.stack(of_class), of_row.sum(axis=1))


def profiles(sums: Iterable[ClassSums], n_latents: int = PROFILE_LATENTS) -> list[Profile | None]:
    """The profile of each latent; None where it fires nowhere or everywhere, so that there is nothing to compare."""
    return [_profile(change, n_latents) if np.isfinite(change).all() else None for change in diffmean(sums)]


def _profile(change: Float[np.ndarray, " d_sae"], n_latents: int) -> Profile:
    order = np.argsort(-np.abs(change), kind="stable")[:n_latents]
    latents = order[change[order] != 0]
    return Profile(tuple(latents.tolist()), tuple(change[latents].tolist()))
