"""TopK."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_ray.sae.architectures.base import SelectingArchitecture

if TYPE_CHECKING:
    from torch import Tensor


class TopK(SelectingArchitecture):
    """The `k` largest values of each sample (Gao et al. 2024, arXiv 2406.04093)."""

    def select(self, pre: Tensor) -> Tensor:
        from sae_ray.sae.sparse import largest_positive_per_row

        assert self.cell.k is not None
        return largest_positive_per_row(pre, self.cell.k)
