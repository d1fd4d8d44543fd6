"""AuxK: dead latents learn to explain the residual of the living ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from sae_ray.sae.selection import largest_of_rows
from sae_ray.sae.sparse import Pattern, decode_entries, encode_entries

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from sae_ray.sae.architectures.base import Forward
    from sae_ray.sae.ranks import Split
    from sae_ray.sae.weights import Weights


def auxk_loss(
    weights: Weights,
    x: Float[Tensor, "rows d_in"],
    forward: Forward,
    dead: Bool[Tensor, " latents"],
    select: Literal["post", "pre"],
    split: Split,
) -> Float[Tensor, ""]:
    """Squared error with which each sample's `d_in // 2` strongest dead latents explain the residual, without `b_dec`.

    It is relative to the residual's variance over the whole batch (Gao et al. 2024, arXiv 2406.04093, A.2), and
    0 if no latent is dead or the residual does not vary. With "post", latents with a negative pre-activation are left
    out; with "pre" they take part with that negative value.

    Args:
        dead: of this rank's latents those that are dead. The strongest are those of all ranks.
    """
    dead_latents = dead.nonzero().squeeze(1)
    k_aux = min(x.shape[1] // 2, split.latents.total(len(dead_latents), x.device))
    if k_aux == 0:
        return x.new_zeros(())
    top = forward.pre.index_select(1, dead_latents).topk(min(k_aux, len(dead_latents)), dim=1, sorted=False)
    # A value of 0 after the ReLU neither adds to the reconstruction nor has a gradient.
    chosen = top.values > 0 if select == "post" else torch.ones_like(top.values, dtype=torch.bool)
    rows, columns = chosen.nonzero(as_tuple=True)
    flat = (rows * len(dead) + dead_latents[top.indices[rows, columns]]).sort().values
    flat = largest_of_rows(forward.pre, flat, k_aux, split.latents)
    pattern = Pattern.of_flat(flat, len(x), len(dead))
    b_dec = split.latents.shared(weights.b_dec)
    values = encode_entries(forward.pre.flatten()[flat], x, weights.W_enc_t, weights.b_enc, b_dec, pattern)
    error = forward.residual - split.latents.joined(decode_entries(values, weights.W_dec, pattern))
    mean = split.rows.mean(forward.residual.mean(0))
    variance = split.rows.mean((forward.residual - mean).square().sum(-1).mean())
    return error.square().sum(-1).mean() * torch.where(variance > 0, 1 / variance, 0.0)
