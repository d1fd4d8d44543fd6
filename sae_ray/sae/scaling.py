"""What training makes of the activations of a site before an SAE sees them, so that sites are alike to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from sae_ray.sae.config import TrainingConfig
    from sae_ray.store.activations import ActivationStore
    from sae_ray.store.sample import Location

_LARGEST_OFFSET = 1e6
"""Activations that spread less than that are as good as equal: what is left of them is rounding."""


class Scaling(NamedTuple):
    """Activations become `(x - centre) / scale`."""

    scale: float
    centre: Float[Tensor, " d"] | None
    """float32; None where nothing is subtracted."""

    @classmethod
    def of(
        cls, store: ActivationStore, location: Location, training: TrainingConfig, device: torch.device | str = "cpu"
    ) -> Scaling:
        """The scale is the root of their mean squared norm, or of their squared distance from what is subtracted."""
        if not training.centre or location.offset > _LARGEST_OFFSET:
            return cls(store.root_mean_square_norm, None)
        return cls(location.spread, torch.from_numpy(location.mean).to(device, torch.float32))

    def __call__(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """In float32."""
        rows = rows.float()
        return (rows if self.centre is None else rows - self.centre) / self.scale


AS_THEY_ARE = Scaling(1.0, None)
