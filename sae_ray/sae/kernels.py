"""Where Triton kernels replace the plain torch formulation."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

    from sae_ray.sae.ranks import Split


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """`triton_kernels`, for a tensor on a CUDA device of a machine that has Triton; None elsewhere."""
    return _kernels() if tensor.is_cuda else None


def fixed_shapes(tensor: Tensor, split: Split) -> bool:
    """Whether a step on this tensor has the same shapes whatever its numbers are: with kernels, in a single process."""
    return kernels_for(tensor) is not None and split.ranks.size == 1


@cache
def _kernels() -> ModuleType | None:
    if find_spec("triton") is None:
        return None
    from sae_ray.sae import triton_kernels

    return triton_kernels
