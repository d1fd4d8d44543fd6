"""Numbers that count or name things: constants that are made once, and sorting."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

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


def sorted_numbers(numbers: Int[Tensor, "... n"], highest: int) -> tuple[Int[Tensor, "... n"], Int[Tensor, "... n"]]:
    """Ascending numbers from 0 to `highest`, and where each was; equal ones stay in order.

    A GPU sorts digit by digit: 32 bits take it half as many passes as 64.
    """
    found = numbers.to(torch.int32 if highest < 2**31 else torch.int64).sort(stable=True)
    return found.values.to(numbers.dtype), found.indices
