"""The largest entries of a batch in the memory of one process on a CPU: numpy takes fewer and faster passes than torch
(`docs/speed.md`), and finds the same entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

SMALL = 2**23
"""Entries up to which `at_least` takes less time than torch's search by blocks, which uses several threads."""


def at_least(flat: Float[Tensor, " n"], bound: float) -> Int[Tensor, " found"]:
    """Ascending indices of the values that are not below a bound."""
    return torch.from_numpy(np.flatnonzero(flat.numpy() >= bound))


def largest(flat: Float[Tensor, " n"], found: Int[Tensor, " found"], count: int) -> Int[Tensor, " count"]:
    """Of these ascending indices those of the `count` largest values; the first of those that are equal."""
    values = flat.numpy()[found.numpy()]
    place = len(values) - count
    smallest = np.partition(values, place)[place]
    kept = values >= smallest
    if surplus := np.count_nonzero(kept) - count:
        kept[np.flatnonzero(values == smallest)[-surplus:]] = False
    return found[torch.from_numpy(kept)]
