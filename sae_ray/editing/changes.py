"""Changes of one tensor, seen as a matrix: a product of two vectors that is added, or slices that are replaced.

A linear layer's weight is a matrix as it is, `[out, in]`; its bias is seen as `[out, 1]`, a convolution as
`[out, the rest]`, a table of tokens as `[tokens, width]`. The sizes of a change say how.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sae_ray.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class RankOne:
    """Adds `left rightᵀ`."""

    left: Float[Tensor, " rows"]
    right: Float[Tensor, " columns"]

    def fits(self, tensor: Tensor) -> bool:
        return len(self.left) * len(self.right) == tensor.numel()

    def of(self, tensor: Tensor) -> Tensor:
        """The changed tensor, in the given one's shape and dtype and on its device; computed in float64."""
        left, right = (one.to(tensor.device, torch.float64) for one in (self.left, self.right))
        matrix = tensor.double().reshape(len(left), len(right))
        return torch.addr(matrix, left, right).reshape(tensor.shape).to(tensor.dtype)


@dataclass(frozen=True, eq=False)
class Replaced:
    """Puts other values in place of some rows (`axis` 0) or columns (`axis` 1)."""

    axis: int
    index: Int[Tensor, " n"]
    """int64, ascending."""
    values: Float[Tensor, "rows columns"]
    """n rows or n columns."""

    def fits(self, tensor: Tensor) -> bool:
        across = self.values.shape[1 - self.axis]
        return tensor.numel() % across == 0 and bool((self.index < tensor.numel() // across).all())

    def of(self, tensor: Tensor) -> Tensor:
        """As `RankOne.of`."""
        rows, columns = self.values.shape
        matrix = tensor.reshape((-1, columns) if self.axis == 0 else (rows, -1))
        return matrix.index_copy(self.axis, self.index.to(tensor.device), self.values.to(tensor)).reshape(tensor.shape)


Change = RankOne | Replaced


def changed(tensor: Tensor, change: Change, name: str) -> Tensor:
    """The tensor after the change. Raises UsageError if that was made for another shape."""
    if not change.fits(tensor):
        raise UsageError(
            f"{name} has the shape {list(tensor.shape)}, which the patch does not fit; make it again for this model"
        )
    return change.of(tensor)
