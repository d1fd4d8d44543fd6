"""How an SAE starts where random directions are not all."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from sae_ray.sae.second_moment import whitening

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from sae_ray.sae.model import SAE
    from sae_ray.sae.second_moment import SecondMoment
    from sae_ray.sae.training import CellTrainer

WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def weights_digest(sae: SAE) -> str:
    """A hex sha256 of the weights in float32, wherever and in whatever format they lie."""
    found = hashlib.sha256()
    for name in WEIGHTS:
        if (tensor := getattr(sae, name)) is not None:
            found.update(f"{name} {list(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return found.hexdigest()


@torch.no_grad()
def start_from(trainer: CellTrainer, sae: SAE, norm_scale: float, centre: Float[Tensor, " d_in"] | None = None) -> None:
    """Gives a trainer that has made no step the weights of a trained SAE of its architecture and widths.

    Decoder rows of another length than 1 get that length where training keeps it; encoder and threshold make up for it.
    An inference threshold that is estimated is estimated anew.

    Args:
        norm_scale: what the batches are divided by.
        centre: what is subtracted from them before, if anything.
    """
    weights, own = trainer.weights, trainer.split.latents.own
    lengths = own(torch.linalg.vector_norm(sae.W_dec, dim=1)).clamp_min(torch.finfo().tiny)
    if not trainer.architecture.unit_decoder:
        lengths = torch.ones_like(lengths)
    weights.W_dec.copy_(own(sae.W_dec) / lengths.unsqueeze(1))
    weights.W_enc_t.copy_(own(sae.W_enc.T) * lengths.unsqueeze(1))
    weights.b_enc.copy_(own(sae.b_enc) * lengths / norm_scale)
    b_dec = sae.b_dec if centre is None else sae.b_dec - centre.to(sae.b_dec)
    weights.b_dec.copy_(b_dec / norm_scale)
    if weights.threshold is not None and sae.threshold is not None:
        weights.threshold.copy_(own(sae.threshold) * lengths / norm_scale)
    trainer.starts_at_median = False


@torch.no_grad()
def start_whitened(trainer: CellTrainer, moment: SecondMoment, centred: bool = False) -> None:
    """Starts a trainer that has made no step as a TSAE (arXiv 2509.20784): `W_enc = W_decᵀ S`, biases 0.

    S is the inverse of the second moment of the activations: of what training makes of them, so that `centred` says
    whether their mean is subtracted. Atoms there have the length 1 under S; here decoder rows keep the length 1, and
    the encoder is divided by d S dᵀ instead: a row encodes itself as 1 either way.

    Raises SaeRayError if the moment has fewer than 20 rows per dimension.
    """
    metric = torch.from_numpy(whitening(moment.matrix(centred)).matrix)
    W_dec = trainer.weights.W_dec.detach().cpu().double()
    whitened = W_dec @ metric @ metric
    W_enc_t = (whitened / (whitened * W_dec).sum(1, keepdim=True)).to(trainer.device, torch.float32)
    # Sums on another machine may differ in their last bits, but ranks must agree.
    trainer.weights.W_enc_t.copy_(trainer.split.rows.smallest(W_enc_t))
    trainer.starts_at_median = False
