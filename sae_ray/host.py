"""The memory of the host: what is free of it, and what comes to it from a device."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sae_ray import control_groups

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that this and new processes may take: of a GPU, if that is the device, else of the host, as the kernel and
    the control groups of this process say; a very large number where neither does."""
    if device is None or device.type != "cuda":
        return min(_available(), control_groups.memory().left)
    import torch

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, to be used again
    return torch.cuda.mem_get_info(device)[0] + kept


def total_memory() -> int:
    """Bytes of the host's memory that its control groups leave to this process and those beside it."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(there, control_groups.memory().limit)


def _available() -> int:
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
