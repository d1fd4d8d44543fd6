"""Work on a GPU that is always the same, recorded once as a CUDA graph: the host then starts it in one call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import torch

if TYPE_CHECKING:
    from torch import Tensor


class _Memory:
    """Of all recordings on a device, none of which run at the same time."""

    def __init__(self) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()


_memories: WeakValueDictionary[torch.device, _Memory] = WeakValueDictionary()
"""CUDA gives a pool up with the last recording in it; later ones then need another."""


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Sequence[Tensor]
    """What it reads."""
    memory: _Memory


class Replayed:
    """Calls a function `run(*inputs, *key)`, always the same, whose work on the GPU follows from the key and the shapes
    of the inputs.

    It runs as it is the first time, is recorded the second, and replayed from then on. All tensors that it changes
    are there before, and nothing else that it makes is used afterwards: recordings share their memory.
    """

    def __init__(self) -> None:
        self._recorded: dict[Hashable, _Recorded | None] = {}

    def __call__(self, run: Callable[..., None], inputs: Sequence[Tensor], *key: Any) -> None:
        place = (*(one.shape for one in inputs), *key)
        if place not in self._recorded:
            self._recorded[place] = None  # libraries and kernels load what they need
            run(*inputs, *key)
            return
        recorded = self._recorded[place]
        if recorded is None:
            recorded = self._recorded[place] = _record(run, inputs, *key)
        for held, one in zip(recorded.inputs, inputs, strict=True):
            held.copy_(one)
        with torch.cuda.device(inputs[0].device):
            recorded.graph.replay()


def _record(run: Callable[..., None], inputs: Sequence[Tensor], *key: Any) -> _Recorded:
    device = inputs[0].device
    memory = _memories.get(device) or _memories.setdefault(device, _Memory())
    recorded = _Recorded(torch.cuda.CUDAGraph(), [torch.empty_like(one) for one in inputs], memory)
    # Other threads may call CUDA meanwhile: they load the next batches.
    with (
        torch.cuda.device(device),
        torch.cuda.graph(recorded.graph, memory.pool, capture_error_mode="thread_local"),
    ):
        run(*recorded.inputs, *key)
    return recorded
