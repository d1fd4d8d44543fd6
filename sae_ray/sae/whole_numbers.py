"""Numbers that count or name things: constants that are made once, and their order."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from sae_ray.sae.kernels import kernels_for

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor


def first_numbers(n: int, device: torch.device) -> Int[Tensor, " n"]:
    """0, 1, …, n - 1. All that ask share them: they are not to be changed."""
    return _power_of_two(max(0, n - 1).bit_length(), device)[:n]


@cache
def _power_of_two(bits: int, device: torch.device) -> Int[Tensor, " 2**bits"]:
    # Recordings share the memory of what they make, so that it would not last.
    recorded = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    assert not recorded, "work runs as it is before it is recorded"
    with torch.inference_mode(False):
        return torch.arange(2**bits, device=device)


def stable_order(numbers: Int[Tensor, "... n"], highest: int) -> Int[Tensor, "... n"]:
    """The permutation that sorts numbers from 0 to `highest` along the last axis, and leaves equal ones in order."""
    if numbers.device.type == "cpu" and kernels_for(numbers) is None and highest < 2**16:
        # numpy sorts numbers of 16 bits digit by digit, in a tenth of the time.
        return torch.from_numpy(numbers.numpy().astype(np.uint16).argsort(kind="stable"))
    # A GPU sorts digit by digit: 32 bits take it half as many passes as 64.
    return numbers.to(torch.int32 if highest < 2**31 else torch.int64).argsort(stable=True)
