"""Work on a GPU that is always the same, recorded once as a CUDA graph: the host then starts it in one call."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    x: Tensor
    """What it reads."""


class Replayed:
    """Calls a function `run(x, *key)`, always the same, whose work on the GPU follows from the shape of `x` and `key`.

    It runs as it is the first time, is recorded the second, and replayed from then on. All tensors that it changes
    are there before, and nothing else that it makes is used afterwards: recordings share their memory.
    """

    def __init__(self) -> None:
        self._recorded: dict[Hashable, _Recorded | None] = {}

    def __call__(self, run: Callable[..., None], x: Tensor, *key: Any) -> None:
        place = (x.shape, *key)
        if place not in self._recorded:
            self._recorded[place] = None  # libraries and kernels load what they need
            run(x, *key)
            return
        recorded = self._recorded[place]
        if recorded is None:
            recorded = self._recorded[place] = _record(run, x, *key)
        recorded.x.copy_(x)
        with torch.cuda.device(x.device):
            recorded.graph.replay()


def _record(run: Callable[..., None], x: Tensor, *key: Any) -> _Recorded:
    recorded = _Recorded(torch.cuda.CUDAGraph(), torch.empty_like(x))
    # Other threads may call CUDA meanwhile: they load the next batches.
    with (
        torch.cuda.device(x.device),
        torch.cuda.graph(recorded.graph, _memory(x.device), capture_error_mode="thread_local"),
    ):
        run(recorded.x, *key)
    return recorded


@cache
def _memory(device: torch.device) -> Any:
    """Of all recordings on a device, none of which run at the same time."""
    return torch.cuda.graph_pool_handle()
