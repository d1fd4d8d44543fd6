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
        unit_decoder: bool = True,
    ):
        """The encoder is the transpose of the decoder, the biases are 0.

        Args:
            unit_decoder: decoder rows are random directions of unit norm, and keep it. Otherwise they begin as the
                weights of `torch.nn.Linear(d_in, d_sae)`, and are free.
        """
        generator = torch.Generator().manual_seed(seed)
        self._unit_decoder = unit_decoder
        if unit_decoder:
            W_dec = F.normalize(split.latents.own(torch.randn(d_sae, d_in, generator=generator)), dim=1)
        else:
            W_dec = (2 * split.latents.own(torch.rand(d_sae, d_in, generator=generator)) - 1) / d_in**0.5
        self.W_dec = Parameter(W_dec.to(device).contiguous())
        self.W_enc_t = Parameter(self.W_dec.detach().clone())
        self.b_enc = Parameter(torch.zeros(len(W_dec), device=device))
        self.b_dec = Parameter(torch.zeros(d_in, device=device))
        self.threshold = None if threshold is None else Parameter(torch.full_like(self.b_enc, threshold))
        """None unless the architecture learns it."""

    def named(self) -> dict[str, Parameter]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Parameter)}

    def of_unit_rows(self, name: str) -> bool:
        """Whether the rows of a weight keep unit norm."""
        return name == "W_dec" and self._unit_decoder

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
        rows = getattr(self, name)[part]
        if self.of_unit_rows(name):
            rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(torch.finfo().tiny)
        elif name == "threshold":
            rows.clamp_(min=0)
