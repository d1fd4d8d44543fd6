"""BatchTopK."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_ray.sae.architectures.base import SelectingArchitecture

if TYPE_CHECKING:
    from torch import Tensor

    from sae_ray.sae.config import Cell
    from sae_ray.sae.ranks import Split


class BatchTopK(SelectingArchitecture):
    """The `k * batch` largest values of the whole batch, over all ranks (Bussmann et al. 2024, arXiv 2412.06410)."""

    name = "batch_topk"
    uses = SelectingArchitecture.uses | {"threshold_beta", "threshold_start_step"}
    has_threshold = estimates_threshold = True
    sae_lens = "jumprelu"

    def __init__(self, cell: Cell, d_in: int, split: Split):
        from sae_ray.sae.selection import BatchSelection

        super().__init__(cell, d_in, split)
        assert cell.k is not None
        self._selection = BatchSelection(cell.k, split)

    def select(self, pre: Tensor) -> Tensor:
        return self._selection(pre)

    def rivals(self, pre: Tensor) -> tuple[Tensor, int]:
        assert self.cell.k is not None
        return pre.view(1, -1), self.cell.k * len(pre)
