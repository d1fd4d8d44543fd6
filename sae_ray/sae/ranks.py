"""The processes that train one SAE together, and how they split its work. There may be only one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor
    from torch.distributed import ProcessGroup


class Ranks:
    """What the ranks of a process group tell each other; without a group, this process is the only one.

    Things that are dealt out are taken in turn: rank r of R has the things r, r + R, r + 2R and so on.
    """

    def __init__(self, group: ProcessGroup | None):
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    # What ranks computed, each of its part

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

    def exchange(self, rows: Tensor) -> Tensor:
        """Sends block r of the rows to rank r. Returns this rank's block of each, [ranks, rows / ranks, ...]."""
        blocks = rows.unflatten(0, (self.size, -1))
        if self.size == 1:
            return blocks
        received = torch.empty_like(blocks)
        dist.all_to_all_single(received, blocks.contiguous(), group=self.group)
        return received

    # A loss of what all ranks hold, of which each finds the gradients of its own

    def joined(self, part: Tensor) -> Tensor:
        """The sum of what each rank computed of its own weights, in place. Its gradient is that of `part`."""
        if self.size == 1:
            return part
        result = _Joined.apply(part, self)
        assert isinstance(result, torch.Tensor)
        return result

    def shared(self, weight: Tensor) -> Tensor:
        """A weight that all ranks hold and each uses for its part: its gradient is the sum of what they find."""
        if self.size == 1:
            return weight
        result = _Shared.apply(weight, self)
        assert isinstance(result, torch.Tensor)
        return result

    # Things that are dealt out

    def share(self, count: int) -> int:
        """How many of the first `count` things are this rank's."""
        return len(range(self.rank, count, self.size))

    def own(self, whole: Tensor) -> Tensor:
        """This rank's rows, a view."""
        return whole[self.rank :: self.size]

    def places(self, own: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Where this rank's things are among all."""
        return own * self.size + self.rank

    def whole(self, own: Tensor, count: int, device: torch.device) -> Tensor | None:
        """All `count` rows of several ranks, on `device`, for the first of them, None for the others. Each calls it."""
        missing = -(-count // self.size) - len(own)
        padded = F.pad(own, (0, 0) * (own.ndim - 1) + (0, missing))
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(padded, parts, group=self.group, group_dst=0)
        if parts is None:
            return None
        whole = torch.empty(count, *own.shape[1:], dtype=own.dtype, device=device)
        for rank, part in enumerate(parts):
            rows = whole[rank :: self.size]
            rows.copy_(part[: len(rows)])
        return whole

    def _reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part, ranks):
        ctx.mark_dirty(part)
        return ranks.sum(part)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ranks):
        ctx.ranks = ranks
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.ranks.sum(grad.clone()), None


_ONE = Ranks(None)


@dataclass(frozen=True)
class Split:
    """How the entries [batch, d_sae] of a training step are split over ranks: by rows, by latents, or not at all.

    What a rank computed of its rows is reduced over `rows`, what it computed of its latents over `latents`, and what it
    computed of its entries over `ranks`.
    """

    rows: Ranks = _ONE
    """Those that hold other rows of the same latents: equal shares of the batch, in rank order. Weights are on all."""
    latents: Ranks = _ONE
    """Those that hold other latents of the same rows. Latents are dealt out, with their weights and moments, in turn:
    the first of a Matryoshka SAE, which fire most, then do not meet on one rank. `b_dec` is on all."""

    def __post_init__(self):
        if self.rows.size > 1 and self.latents.size > 1:
            raise ValueError("entries are split by rows or by latents, not by both")

    @property
    def ranks(self) -> Ranks:
        """All of them."""
        return self.rows if self.latents.size == 1 else self.latents


ALONE = Split()
"""A single process."""
