"""The ranks of data-parallel training; there may be only one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


class Ranks:
    """Reductions over the ranks of a process group; over this process alone without one."""

    def __init__(self, group: ProcessGroup | None):
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def sum(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def mean(self, tensor: Tensor) -> Tensor:
        return self.sum(tensor).div_(self.size) if self.size > 1 else tensor

    def smallest(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.MIN)

    def total(self, number: int, device: torch.device) -> int:
        """The sum of one number per rank, reduced as a tensor on `device`."""
        return number if self.size == 1 else int(self.sum(torch.tensor(number, device=device)))

    def sum_before(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks before this one."""
        return self.gather(tensor.unsqueeze(0))[: self.rank].sum(0)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in rank order; every rank holds equally many."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous(), group=self.group)
        return torch.cat(parts)

    def _reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor


ALONE = Ranks(None)
"""A single process."""
