"""From a device to the memory of the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def to_host(*tensors: Tensor) -> list[Tensor]:
    """The tensors, of one device, in the memory of the host, after one wait for all.

    From a GPU they go to pinned memory: fresh memory of the usual kind takes 30 times as long (docs/speed.md).
    """
    import torch

    device = tensors[0].device
    if device.type != "cuda":
        return list(tensors)
    copies = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True).copy_(one, non_blocking=True) for one in tensors]
    torch.cuda.current_stream(device).synchronize()
    return copies
