"""The codes of a few latents, without those of the others where they do not depend on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from sae_ray.sae.model import SAE
    from sae_ray.sae.sparse import SparseCodes


def codes_of(sae: SAE, latents: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Makes what computes the codes of a few latents: activations `[n, d_in]` to codes `[n, latents]`.

    It keeps and computes the other latents only where they compete with these. They equal those of `SAE.encode` up to
    rounding: a product of another shape adds up in another order.
    """
    if sae.kind.latents_compete:
        return lambda x: divided(sae.encode_sparse(x), latents)[0]
    where = torch.tensor(latents, dtype=torch.int64, device=sae.device)
    few = replace(
        sae,
        W_enc=sae.W_enc[:, where],
        W_dec=sae.W_dec[where],
        b_enc=sae.b_enc[where],
        threshold=None if sae.threshold is None else sae.threshold[where],
        concepts=(),
    )
    return few.encode


def divided(codes: SparseCodes, latents: Sequence[int]) -> tuple[Float[Tensor, "n_rows latents"], SparseCodes]:
    """The codes of these latents, dense, and those of all others."""
    device = codes.latents.device
    column = torch.full((codes.d_sae,), -1, device=device)
    column[torch.tensor(latents, dtype=torch.int64, device=device)] = torch.arange(len(latents), device=device)
    column = column[codes.latents]
    chosen = column >= 0
    few = codes.values.new_zeros(codes.n_rows, len(latents))
    few[codes.rows[chosen], column[chosen]] = codes.values[chosen]
    others = codes._replace(rows=codes.rows[~chosen], latents=codes.latents[~chosen], values=codes.values[~chosen])
    return few, others
