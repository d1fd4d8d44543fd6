"""Heat maps: where on the patch grid a latent fires, on each of its top images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sae_ray.encoders.sites import Site
from sae_ray.report.neurons import Neurons
from sae_ray.store.files import Folder

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from sae_ray.encoders import Encoder

PER_CELL = 48
"""Maximum number of latents per cell that get heat maps, best first."""
MOST = 1024
"""Maximum number of latents with heat maps over all cells."""


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
    if site.point == "mlp":
        return "There are no heat maps for SAEs of an MLP's output."
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


@dataclass(frozen=True)
class HeatCell:
    """A cell that gets heat maps, for whoever makes them."""

    name: str
    sae: Folder
    layer: int
    latents: tuple[int, ...]
    """Ascending."""


def heat_cells(cells: Sequence[Neurons], chosen: Mapping[str, Sequence[int]]) -> list[HeatCell]:
    """The cells that have a patch grid, each with its best latents, `MOST` over all cells.

    Args:
        chosen: name of a cell -> latents that always get maps.
    """
    cells = [cell for cell in cells if why_none(cell) is None]
    per_cell = max(1, min(PER_CELL, MOST // max(1, len(cells))))
    return [_heat_cell(cell, [*chosen.get(cell.name, ()), *cell.order[:per_cell]]) for cell in cells]


def _heat_cell(cell: Neurons, latents: Sequence[int]) -> HeatCell:
    train = cell.score.sae
    assert train is not None
    assert train.grid_cell.site.layer is not None
    unique = sorted({int(latent) for latent in latents})
    return HeatCell(cell.name, train.step.folder, train.grid_cell.site.layer, tuple(unique))


class HeatMaker:
    """Makes the maps of some latents of one SAE."""

    def __init__(self, cell: HeatCell, encoder: Encoder):
        from sae_ray.sae import load_sae
        from sae_ray.sae.few_latents import codes_of

        self.site = Site("residual", cell.layer, "all")
        self._codes = codes_of(load_sae(cell.sae).to(encoder.device), cell.latents)
        self._n_cls = int(encoder.info.has_cls)

    def maps(
        self, activation: Float[Tensor, "rows d_in"], n_images: int
    ) -> Float[np.ndarray, "images patches latents"]:
        """Of a batch whose rows are sorted by image and token."""
        codes = self._codes(activation)
        # An SAE whose latents never fire has none to show, so the number of tokens is no -1 for torch to find out.
        n_tokens = len(codes) // n_images
        return codes.reshape(n_images, n_tokens, codes.shape[1])[:, self._n_cls :].cpu().numpy()
