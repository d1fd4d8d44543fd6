"""Ranks that are threads of one process: quick enough for many small examples."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
import torch.distributed as dist

from sae_ray.sae.ranks import Ranks

T = TypeVar("T")
REDUCE = {dist.ReduceOp.SUM: lambda parts: parts.sum(0), dist.ReduceOp.MIN: lambda parts: parts.amin(0)}


class _ThreadRanks(Ranks):
    def __init__(self, rank: int, barrier: threading.Barrier, parts: list[torch.Tensor | None]):
        self.rank, self.size = rank, barrier.parties
        self._barrier, self._parts = barrier, parts

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._tell(rows))

    def exchange(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([part.unflatten(0, (self.size, -1))[self.rank] for part in self._tell(rows)])

    def _reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        return tensor.copy_(REDUCE[op](torch.stack(self._tell(tensor))))

    def _tell(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._parts[self.rank] = tensor.clone()
        self._barrier.wait()
        parts = list(self._parts)
        self._barrier.wait()  # nobody writes the next before all have read these
        return parts


def on_ranks(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """What `work` returns on each of `size` ranks, in rank order."""
    barrier, parts = threading.Barrier(size, timeout=60), [None] * size

    def guarded(rank: int) -> T:
        try:
            return work(_ThreadRanks(rank, barrier, parts))
        except BaseException:
            barrier.abort()  # the others would wait
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(guarded, range(size)))
