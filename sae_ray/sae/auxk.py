"""AuxK: dead latents learn to explain the residual of the living ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from sae_ray.sae.product import affine, product
from sae_ray.sae.selection import largest_of_rows
from sae_ray.sae.sparse import PaddedPattern, Pattern, decode_entries, encode_entries

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_ray.sae.architectures.base import Forward
    from sae_ray.sae.config import TrainingConfig
    from sae_ray.sae.ranks import Split
    from sae_ray.sae.weights import Weights

_COPIED = 2**24
"""Pre-activations that are copied at once in the search for the strongest: 64 MiB."""
_DENSE = 4096
"""Dead latents up to which dense products in float32 take less time on a GPU than sums over entries. With products on
tensor cores they always do."""


def auxk_loss(
    weights: Weights,
    x: Float[Tensor, "rows d_in"],
    forward: Forward,
    dead: Bool[Tensor, " latents"],
    select: Literal["post", "pre"],
    split: Split,
    gamma: Float[Tensor, " d_in"] | None = None,
) -> Float[Tensor, ""]:
    """Squared error with which each sample's `d_in // 2` strongest dead latents explain the residual, without `b_dec`.

    It is relative to the residual's variance over the whole batch (Gao et al. 2024, arXiv 2406.04093, A.2), and
    0 if no latent is dead or the residual does not vary. With "post", latents with a negative pre-activation are left
    out; with "pre" they take part with that negative value.

    Args:
        dead: of this rank's latents those that are dead. The strongest are those of all ranks.
        gamma: factors of every dimension of the residual and of what explains it.
    """
    dead_latents = dead.nonzero().squeeze(1)
    k_aux = min(x.shape[1] // 2, split.latents.total(len(dead_latents), x.device))
    if k_aux == 0:
        return x.new_zeros(())
    flat = _strongest_dead(forward.pre, dead_latents, min(k_aux, len(dead_latents)))
    if select == "post":  # a value of 0 after the ReLU neither adds to the reconstruction nor has a gradient
        flat = flat[forward.pre.flatten()[flat] > 0]
    flat = largest_of_rows(forward.pre, flat, k_aux, split.latents)
    pattern = Pattern.of_flat(flat, len(x), len(dead))
    b_dec = split.latents.shared(weights.b_dec)
    values = encode_entries(forward.pre.flatten()[flat], x, weights.W_enc_t, weights.b_enc, b_dec, pattern)
    explained = split.latents.joined(decode_entries(values, weights.W_dec, pattern))
    return _relative_error(forward.residual, explained, split, gamma)


def _strongest_dead(pre: Float[Tensor, "rows latents"], dead: Int[Tensor, " dead"], k: int) -> Int[Tensor, " rows*k"]:
    """Flat indices into `pre`, ascending, of the `k` largest dead latents of each row."""
    width, found = max(1, len(dead)), []
    # On a CPU some rows at a time: where many latents are dead, copies of all would be as large as `pre`.
    rows = len(pre) if pre.is_cuda else max(1, _COPIED // width)
    for start in range(0, len(pre), rows):
        places = _strongest(pre[start : start + rows].index_select(1, dead), k)
        found.append((places // width + start) * pre.shape[1] + dead[places % width])
    return torch.cat(found)


def _strongest(matrix: Float[Tensor, "rows width"], k: int) -> Int[Tensor, " rows*k"]:
    """Flat indices, ascending, of the `k` largest of each row."""
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=matrix.device)
    if matrix.device.type == "cpu":
        # numpy finds the k-th largest in a third of the time in which torch finds the k largest.
        least = torch.from_numpy(np.partition(matrix.numpy(), -k, axis=1)[:, -k])
        found = (matrix >= least.unsqueeze(1)).flatten().nonzero().squeeze(1)
        if len(found) == len(matrix) * k:  # else some are equal, or no numbers
            return found
    starts = torch.arange(0, matrix.numel(), matrix.shape[1], device=matrix.device)
    return (starts.unsqueeze(1) + matrix.topk(k, dim=1, sorted=False).indices).flatten().sort().values


def padded_auxk_loss(
    weights: Weights,
    x: Float[Tensor, "rows d_in"],
    forward: Forward,
    dead: Bool[Tensor, " latents"],
    training: TrainingConfig,
    split: Split,
    capacity: int,
    gamma: Float[Tensor, " d_in"] | None = None,
) -> Float[Tensor, ""]:
    """The same with kernels, where latents are not split over ranks. The shapes of all that it does follow from
    `capacity` alone.

    Args:
        capacity: at least the number of dead latents, at most that of all.
    """
    block = (~dead).byte().sort(stable=True).indices[:capacity]  # the dead ones, and others that do not take part
    W_enc_t, b_enc, W_dec = (
        weight.index_select(0, block) for weight in (weights.W_enc_t, weights.b_enc, weights.W_dec)
    )
    idle = ~dead[block]
    if training.dtype == "bfloat16":
        pre = forward.pre.index_select(1, block).masked_fill_(idle, -torch.inf)
    else:
        pre = affine(x - weights.b_dec, W_enc_t, b_enc.detach().masked_fill(idle, -torch.inf))
    top = pre.topk(min(x.shape[1] // 2, capacity), dim=1, sorted=False)
    chosen = top.values > (0 if training.auxk_select == "post" else -torch.inf)
    values = top.values.where(chosen, 0.0)
    if training.dtype == "float32" and capacity > _DENSE:
        missing = forward.pre.numel()
        starts = torch.arange(0, missing, len(dead), device=x.device).unsqueeze(1)
        flat, order = torch.where(chosen, starts + block[top.indices], missing).flatten().sort()
        pattern = PaddedPattern.of_flat(flat, len(x), len(dead))
        values = values.flatten()[order]
        values = encode_entries(values, x, weights.W_enc_t, weights.b_enc, weights.b_dec, pattern)
        explained = decode_entries(values, weights.W_dec, pattern)
    else:
        rounded = torch.bfloat16 if training.dtype == "bfloat16" else torch.float32
        codes = torch.zeros_like(pre, dtype=rounded).scatter_(1, top.indices, values.to(rounded))
        explained = _Block.apply(codes, x, W_enc_t, b_enc, weights.b_dec, W_dec, training.dtype)
        assert isinstance(explained, torch.Tensor)
    return _relative_error(forward.residual, explained, split, gamma) * dead.any()


def _relative_error(
    residual: Float[Tensor, "rows d_in"],
    explained: Float[Tensor, "rows d_in"],
    split: Split,
    gamma: Float[Tensor, " d_in"] | None,
) -> Float[Tensor, ""]:
    """Squared error of the explanation, relative to the residual's variance over the whole batch."""
    if gamma is not None:
        residual, explained = residual * gamma, explained * gamma
    mean = split.rows.mean(residual.mean(0))
    variance = split.rows.mean((residual - mean).square().sum(-1).mean())
    return (residual - explained).square().sum(-1).mean() * torch.where(variance > 0, 1 / variance, 0.0)


class _Block(torch.autograd.Function):
    """`codes @ W_dec`, where the codes that are not 0 are entries of `(x - b_dec) @ W_enc_t.T + b_enc`.

    Codes have the dtype that the factors of a product are rounded to."""

    @staticmethod
    def forward(ctx, codes, x, W_enc_t, b_enc, b_dec, W_dec, dtype):
        W_dec = W_dec.to(codes.dtype)
        ctx.save_for_backward(codes, x, W_enc_t, b_dec, W_dec)
        ctx.dtype = dtype
        return product(codes, W_dec, dtype)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        codes, x, W_enc_t, b_dec, W_dec = ctx.saved_tensors
        dtype = ctx.dtype
        grad_codes = product(grad, W_dec.T, dtype).masked_fill_(codes == 0, 0.0)
        grad_W_enc_t = product(grad_codes.T, x - b_dec, dtype)
        grad_b_enc = grad_codes.sum(0)
        grad_W_dec = product(codes.T, grad, dtype)
        return None, None, grad_W_enc_t, grad_b_enc, -(grad_b_enc @ W_enc_t), grad_W_dec, None
