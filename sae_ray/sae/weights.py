"""The trained parameters of one autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn import Parameter

from sae_ray.sae.ranks import ALONE

if TYPE_CHECKING:
    from collections.abc import Collection

    from sae_ray.sae.ranks import Split


class Weights:
    """The trained parameters, float32. The encoder is stored transposed, so that one latent is one contiguous row.

    Where latents are split over ranks, each has the rows of its own, and `b_dec`.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        seed: int,
        threshold: float | None,
        device: torch.device,
        split: Split = ALONE,
    ):
        """Decoder rows are random directions of unit norm, the encoder is their transpose, the biases are 0."""
        generator = torch.Generator().manual_seed(seed)
        W_dec = F.normalize(split.latents.own(torch.randn(d_sae, d_in, generator=generator)), dim=1)
        self.W_dec = Parameter(W_dec.to(device))
        self.W_enc_t = Parameter(self.W_dec.detach().clone())
        self.b_enc = Parameter(torch.zeros(len(W_dec), device=device))
        self.b_dec = Parameter(torch.zeros(d_in, device=device))
        self.threshold = None if threshold is None else Parameter(torch.full_like(self.b_enc, threshold))
        """None unless the architecture learns it."""

    def named(self) -> dict[str, Parameter]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def freeze(self, names: Collection[str]) -> None:
        """Keeps these at the values that they have."""
        for name in names:
            self.named()[name].requires_grad_(False)

    def trained(self) -> dict[str, Parameter]:
        """Those that are not frozen."""
        return {name: value for name, value in self.named().items() if value.requires_grad}

    @torch.no_grad()
    def constrain(self, name: str, part: slice) -> None:
        """Constrains some rows of a weight: decoder rows to unit norm, a learned threshold to 0 or more."""
        rows = self.named()[name][part]
        if name == "W_dec":
            rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(torch.finfo().tiny)
        elif name == "threshold":
            rows.clamp_(min=0)
