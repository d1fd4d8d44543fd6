"""The inference threshold of a trained SAE, from activations that it was not trained on."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from sae_ray.sae.model import SAE

_ENTRIES = 2**24
"""Codes held at once: 64 MiB."""


@torch.no_grad()
def calibrated(sae: SAE, rows: Float[Tensor, "n d_in"]) -> SAE:
    """The same SAE with the one threshold at which `k` latents per row are active on average.

    It lies halfway between the last value that is kept and the first that is not; where fewer values than `k` per row
    are above 0 it is 0. The average over training batches (Bussmann et al. 2024, arXiv 2412.06410) is another one where
    rows that an SAE has seen often give other values than new ones.
    """
    assert sae.k is not None
    wanted = sae.k * len(rows)
    everything = dataclasses.replace(sae, threshold=torch.zeros(sae.d_sae, device=sae.device))
    largest = torch.zeros(0, device=sae.device)
    for some in rows.split(max(1, _ENTRIES // sae.d_sae)):
        codes = everything.encode(some.float())
        floor = largest.min() if len(largest) > wanted else codes.new_zeros(())
        largest = torch.cat([largest, codes[codes > floor]])
        largest = largest.topk(min(len(largest), wanted + 1), sorted=False).values
    threshold = largest.new_zeros(())
    if len(largest) > wanted:
        last, kept = largest.topk(2, largest=False).values
        threshold = (last + kept) / 2
    return dataclasses.replace(sae, threshold=threshold.float().expand(sae.d_sae).clone())
