"""Guided TopK: the SAE of G-SAE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sae_ray.errors import check
from sae_ray.sae.architectures.base import Architecture, Forward, OwnSettings

if TYPE_CHECKING:
    from torch import Tensor

    from sae_ray.sae.model import SAE
    from sae_ray.sae.weights import Weights

LABELS = "labels"


@dataclass(frozen=True)
class GuidanceSettings(OwnSettings):
    """How latents are guided by concepts."""

    concepts: str = LABELS
    """Which concepts the first latents learn, in the order of their sorted names: `labels`, the classes of the images;
    or a concept file that names the training images and the held-out ones: CSV with `image_id,<concept>,…` and values
    from 0 to 1, or nothing where it is unknown. Steps are named by what they hold."""
    concept_weight: float = 1.0
    """Weight of the loss of concepts; 0 turns it off, and needs no labels."""
    concept_reduction: Literal["sum", "mean"] = "sum"
    """Whether the loss is summed over concepts (the reference, with at most 25 of them) or averaged: a thousand
    concepts, most of them absent, outweigh the reconstruction."""
    positive_weight: float = 1.0
    """What the gradient of this loss is multiplied by where the target is 1; for concepts that few images show."""

    table: ClassVar[str] = "architectures.guided_topk"
    """Where they stand in a study file."""

    def __post_init__(self):
        check(self.concepts != "", f"{self.table}.concepts", "", 'make it "labels" or the path of a concept file')
        check(0 <= self.concept_weight < math.inf, f"{self.table}.concept_weight", self.concept_weight,
              "make it 0 or more")  # fmt: skip
        check(self.concept_reduction in ("sum", "mean"), f"{self.table}.concept_reduction", self.concept_reduction,
              'make it "sum" or "mean"')  # fmt: skip
        check(0 < self.positive_weight < math.inf, f"{self.table}.positive_weight", self.positive_weight,
              "make it a number above 0")  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """Without where concepts are from: what they are is part of the name of the step."""
        return {name: value for name, value in super().identity().items() if name != "concepts"}


class GuidedTopK(Architecture):
    """The sigmoids of the `k` largest values of each sample, of rows brought to mean 0 and standard deviation 1
    (Härle et al. 2025, arXiv 2506.19382; its code at 5d73415).

    An active latent says that it was selected; a concept is present where its pre-activation is above 0. Decoder rows
    have any length, and dead latents are not revived.
    """

    name = "guided_topk"
    tuned_by = "k"
    uses = Architecture.uses - {"centre"}
    Settings = GuidanceSettings
    guided = True
    standardises_rows = True
    unit_decoder = False
    codes_below_1 = True
    latents_compete = True
    sae_lens = "sae_ray_guided_topk"

    def inputs(self, x: Tensor) -> Tensor:
        from sae_ray.sae.rows import standardised

        return standardised(x).values

    def forward(self, weights: Weights, x: Tensor) -> Forward:
        """The loss is the squared error relative to the row's own squared norm, averaged over rows."""
        import torch

        from sae_ray.sae.kernels import fixed_shapes
        from sae_ray.sae.rows import standardised
        from sae_ray.sae.selection import largest_of_rows, largest_per_row
        from sae_ray.sae.sparse import PaddedPattern, Pattern, decode_entries, encode_entries

        assert self.cell.k is not None
        rows, mean, spread = standardised(x)
        with torch.no_grad():
            pre = self.pre_activations(weights, rows)
            found = largest_per_row(pre, min(self.cell.k, pre.shape[1])).flatten()
            flat = largest_of_rows(pre, found, self.cell.k, self.split.latents)
            pattern = (PaddedPattern if fixed_shapes(x, self.split) else Pattern).of_flat(flat, *pre.shape)
        b_dec = self.split.latents.shared(weights.b_dec)
        values = encode_entries(pre.flatten()[flat], rows, weights.W_enc_t, weights.b_enc, b_dec, pattern).sigmoid()
        decoded = self.split.latents.joined(decode_entries(values, weights.W_dec, pattern)) + weights.b_dec
        error = x - (decoded * spread + mean)
        power = x.square().mean(-1).clamp_min(torch.finfo(x.dtype).tiny)
        kept = values.detach()
        return Forward(
            reconstruction_loss=(self.weighed(error).square().mean(-1) / power).mean(),
            sparsity_penalty=x.new_zeros(()),
            residual=error.detach(),
            pre=pre,
            fired=pre.new_zeros(pre.shape[1], dtype=torch.bool).index_fill_(0, pattern.latents, True),
            n_active=x.new_full((), len(flat)),
            smallest_active=torch.cat([kept, kept.new_full((1,), torch.inf)]).amin(),
        )

    @classmethod
    def codes(cls, pre: Tensor, sae: SAE) -> Tensor:
        rows = pre.reshape(-1, sae.d_sae)
        flat = cls.active(rows, sae)
        values = cls.activation(rows.flatten()[flat])
        return pre.new_zeros(rows.numel()).index_copy(0, flat, values).view(pre.shape)

    @classmethod
    def active(cls, pre: Tensor, sae: SAE) -> Tensor:
        import torch

        assert sae.k is not None
        latents = pre.topk(sae.k, dim=1, sorted=False).indices.sort(dim=1).values
        return (latents + torch.arange(0, pre.numel(), sae.d_sae, device=pre.device).unsqueeze(1)).flatten()

    @classmethod
    def activation(cls, pre: Tensor) -> Tensor:
        import torch

        return pre.sigmoid().clamp_min(torch.finfo(pre.dtype).tiny)  # above 0, so that it is active

    @classmethod
    def sae_lens_config(cls, sae: SAE) -> dict[str, Any]:
        return {"k": sae.k}
