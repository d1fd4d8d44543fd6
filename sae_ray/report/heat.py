"""Heat maps: where on the patch grid a latent fires, on each of its top images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from sae_ray.encoders.sites import Site
from sae_ray.report.album import read_pixels
from sae_ray.report.neurons import Neurons
from sae_ray.study.plan import ImagePlan, StudyPlan, TrainPlan

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Int
    from torch import Tensor

    from sae_ray.encoders import Encoder
    from sae_ray.sae import SAE

PER_CELL = 48
"""Maximum number of latents per cell that get heat maps, best first."""
MOST = 1024
"""Maximum number of latents with heat maps over all cells."""
BATCH = 32
"""Images per forward pass."""


@dataclass(frozen=True, eq=False)
class HeatMaps:
    """Heat maps of some latents of an SAE."""

    latents: Int[np.ndarray, " latents"]
    maps: Float[np.ndarray, "latents top rows columns"]
    """The latent's value on each patch of each top image; NaN where there is no image."""


def why_none(neurons: Neurons) -> str | None:
    """The reason why a cell has no heat maps; None if it has."""
    if neurons.score.sae is None:
        return "There are no heat maps for raw neurons, only for the latents of SAEs."
    site = neurons.score.sae.grid_cell.site
    if site.point != "residual":
        return f"There are no heat maps: a {site.point} site has one vector per image and no patch grid."
    return None


def caution(neurons: Neurons) -> str | None:
    """A warning to show with the maps of an SAE that was not trained on patch tokens."""
    sae = neurons.score.sae
    match sae.grid_cell.site.tokens if sae else "":
        case "cls":
            return "Out of distribution: this SAE was trained on CLS tokens only, not on patch tokens."
        case "mean":
            return "Out of distribution: this SAE was trained on the mean over all tokens, not on single tokens."
    return None


def heat_maps(plan: StudyPlan, cells: Sequence[Neurons], chosen: dict[str, Sequence[int]]) -> dict[str, HeatMaps]:
    """Heat maps of the best latents of each cell that has a patch grid, in one pass of the encoder over their images.

    Args:
        chosen: name of a cell -> latents that always get maps.

    Raises:
        UsageError: the encoder cannot be loaded.
    """
    import torch

    from sae_ray.encoders import load_encoder, load_preprocess

    cells = [cell for cell in cells if why_none(cell) is None]
    if not cells:
        return {}
    images = plan.images[plan.study.scoring.pictures]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = load_encoder(plan.encoder.model, plan.encoder.revision, device, plan.study.encoder.dtype)
    preprocess = load_preprocess(plan.encoder.model, plan.encoder.revision)
    per_cell = max(1, min(PER_CELL, MOST // len(cells)))
    makers = [_Maker(cell, [*chosen.get(cell.name, ()), *cell.order[:per_cell]], encoder) for cell in cells]
    sites = {maker.site for maker in makers}
    wanted = np.unique(np.concatenate([maker.top_image.ravel() for maker in makers]))
    wanted = wanted[wanted >= 0]
    for start in range(0, len(wanted), BATCH):
        found = [(index, read_pixels(images, index, preprocess)) for index in wanted[start : start + BATCH].tolist()]
        read = {index: pixels for index, pixels in found if pixels is not None}
        if read:
            pixels = torch.from_numpy(np.stack(list(read.values())))
            tapped = encoder.tap(pixels, list(sites), _ids(images, read), plan.study.seed)
            for maker in makers:
                maker.add(list(read), tapped[maker.site].activation)
    return {maker.name: HeatMaps(maker.latents, maker.maps) for maker in makers}


def _ids(images: ImagePlan, indices) -> list[str]:
    return [images.manifest["image_id"][index].as_py() for index in indices]


class _Maker:
    """Collects the maps of one cell, batch by batch."""

    def __init__(self, cell: Neurons, latents: Sequence[int], encoder: Encoder):
        from sae_ray.sae import load_sae

        assert cell.score.sae is not None
        train: TrainPlan = cell.score.sae
        self.name = cell.name
        self.site = Site("residual", train.grid_cell.site.layer, "all")
        self.latents = np.unique(np.asarray(latents, dtype=np.int64))
        self.top_image = cell.top_image[self.latents]
        self.sae = load_sae(train.step.folder).to(encoder.device)
        self.n_cls = int(encoder.info.has_cls)
        self.maps = np.full((*self.top_image.shape, *encoder.info.patch_grid), np.nan, dtype=np.float32)

    def add(self, indices: list[int], activation: Float[Tensor, "rows d_in"]) -> None:
        """Adds the maps for a batch of images. Activations are sorted by (image, token)."""
        codes = codes_of(self.sae, activation, self.latents).reshape(len(indices), -1, len(self.latents))
        codes = codes[:, self.n_cls :].cpu().numpy()
        for position, index in enumerate(indices):
            for latent, rank in zip(*np.nonzero(self.top_image == index), strict=True):
                self.maps[latent, rank] = codes[position, :, latent].reshape(self.maps.shape[2:])


def codes_of(sae: SAE, x: Float[Tensor, "n d_in"], latents: Int[np.ndarray, " latents"]) -> torch.Tensor:
    """The codes of a few latents, [n, latents]; all others are computed only where they compete with them."""
    import torch

    where = torch.from_numpy(latents).to(sae.device)
    if sae.kind.latents_compete:
        codes = sae.encode_sparse(x)
        place = torch.full((sae.d_sae,), -1, device=sae.device)
        place[where] = torch.arange(len(where), device=sae.device)
        kept = place[codes.latents] >= 0
        found = torch.zeros(len(x), len(where), device=sae.device)
        found[codes.rows[kept], place[codes.latents[kept]]] = codes.values[kept].to(found.dtype)
        return found
    part = replace(
        sae,
        W_enc=sae.W_enc[:, where],
        W_dec=sae.W_dec[where],
        b_enc=sae.b_enc[where],
        threshold=None if sae.threshold is None else sae.threshold[where],
    )
    return part.encode(x)
