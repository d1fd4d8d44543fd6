"""BatchTopK."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_ray.sae.architectures.base import SelectingArchitecture

if TYPE_CHECKING:
    from torch import Tensor


class BatchTopK(SelectingArchitecture):
    """The `k * batch` largest values of the whole batch (Bussmann et al. 2024, arXiv 2412.06410)."""

    name = "batch_topk"
    uses = SelectingArchitecture.uses | {"threshold_beta", "threshold_start_step"}
    has_threshold = estimates_threshold = True
    sae_lens = "jumprelu"

    _guess = 0.0
    """Somewhat below the smallest value of the last selection: where the next one starts to look."""

    def select(self, pre: Tensor) -> Tensor:
        import torch

        from sae_ray.sae.sparse import largest_positive

        assert self.cell.k is not None
        parts, start = [], 0
        for share in pre.tensor_split(self.shares):
            parts.append(largest_positive(share, self.cell.k * len(share), self._guess) + start)
            start += share.numel()
        chosen = torch.cat(parts)
        self._guess = 0.9 * pre.flatten()[chosen].amin().item() if len(chosen) else 0.0
        return chosen
