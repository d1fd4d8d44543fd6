"""The memory of the host: what is free of it, and what comes to it from a device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def free_memory() -> int:
    """Bytes that this and new processes may take, as the kernel says; a very large number where it does not."""
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return sys.maxsize


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
