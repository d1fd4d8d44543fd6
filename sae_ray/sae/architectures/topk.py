"""TopK."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_ray.sae.architectures.base import SelectingArchitecture

if TYPE_CHECKING:
    from torch import Tensor

    from sae_ray.sae.model import SAE


class TopK(SelectingArchitecture):
    """The `k` largest values of each sample (Gao et al. 2024, arXiv 2406.04093)."""

    name = "topk"
    latents_compete = True
    sae_lens = "topk"
    opens_sae_lens = True

    def select(self, pre: Tensor) -> Tensor:
        from sae_ray.sae.selection import largest_positive_per_row

        assert self.cell.k is not None
        return largest_positive_per_row(pre, self.cell.k, self.split)

    def rivals(self, pre: Tensor) -> tuple[Tensor, int]:
        assert self.cell.k is not None
        return pre, self.cell.k

    @classmethod
    def codes(cls, pre: Tensor, sae: SAE) -> Tensor:
        assert sae.k is not None
        top = pre.topk(sae.k, dim=-1, sorted=False)
        return pre.new_zeros(pre.shape).scatter(-1, top.indices, top.values.relu())

    @classmethod
    def active(cls, pre: Tensor, sae: SAE) -> Tensor:
        from sae_ray.sae.selection import largest_positive_per_row

        assert sae.k is not None
        return largest_positive_per_row(pre, sae.k)

    @classmethod
    def sae_lens_config(cls, sae: SAE) -> dict[str, Any]:
        return {"k": sae.k, "rescale_acts_by_decoder_norm": False}
