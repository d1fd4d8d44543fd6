"""Guidance (Härle et al. 2025, arXiv 2506.19382): the first latents of an SAE learn to detect concepts.

Latent c is that of concept c. A loss on its pre-activation, before anything is selected, trains it also where it is not
among the active ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from sae_ray.sae.kernels import kernels_for

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from sae_ray.sae.architectures.guided_topk import GuidanceSettings
    from sae_ray.sae.model import SAE
    from sae_ray.sae.ranks import Split
    from sae_ray.sae.sparse import SparseCodes
    from sae_ray.sae.targets import Targets
    from sae_ray.sae.weights import Weights


def concept_loss(
    weights: Weights,
    inputs: Float[Tensor, "rows d_in"],
    targets: Float[Tensor, "rows concepts"],
    settings: GuidanceSettings,
    scale: float,
    split: Split,
) -> Float[Tensor, ""]:
    """The cross entropy of `sigmoid(scale * pre_c)` and the target, summed or averaged over concepts, mean over rows.

    What is unknown counts as no loss. Where latents are split over ranks, each finds the part of its own.

    Args:
        inputs: what the encoder reads.
        scale: `logit_scale` of the architecture.
        targets: of all concepts, NaN where they are unknown.
    """
    n_concepts = targets.shape[1]
    own = targets[:, split.latents.rank :: split.latents.size]
    pre = _FirstPre.apply(inputs, weights.W_enc_t, weights.b_enc, split.latents.shared(weights.b_dec), own.shape[1])
    assert isinstance(pre, torch.Tensor)
    pre = scale * pre
    if settings.positive_weight != 1:  # as in the reference it is the gradient that is multiplied, not the loss
        weight = torch.where(own == 1, settings.positive_weight, 1.0)
        pre = pre.detach() + weight * (pre - pre.detach())
    known = ~own.isnan()
    total = F.binary_cross_entropy_with_logits(pre, own.nan_to_num(), known.float(), reduction="sum") / len(own)
    if settings.concept_reduction == "mean":
        total = total / n_concepts
    return split.latents.joined(total)


class _FirstPre(torch.autograd.Function):
    """`(x - b_dec) @ W_enc_t.T + b_enc` of the first latents."""

    @staticmethod
    def forward(ctx, x, W_enc_t, b_enc, b_dec, n):
        ctx.save_for_backward(x, W_enc_t, b_dec)
        return torch.addmm(b_enc[:n], x - b_dec, W_enc_t[:n].T)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W_enc_t, b_dec = ctx.saved_tensors
        n = grad.shape[1]
        left = len(W_enc_t) - n
        rows, sums = grad.T @ (x - b_dec), grad.sum(0)
        if kernels_for(W_enc_t):
            grad_W = F.pad(rows, (0, 0, 0, left))
        else:  # as the gradients of selected entries are
            first = torch.arange(n, device=grad.device).unsqueeze(0)
            grad_W = torch.sparse_coo_tensor(first, rows, W_enc_t.shape, is_coalesced=True, check_invariants=False)
        return None, grad_W, F.pad(sums, (0, left)), -(sums @ W_enc_t[:n]), None


class ConceptSums:
    """How well the guided latents of an SAE detect their concepts, as sums over rows."""

    def __init__(self, sae: SAE, targets: Targets):
        """`targets`: of the images that rows belong to, of any concepts."""
        self.sae = sae
        self.targets = targets.of(sae.concepts)
        # Concepts were learnt on activations that training had divided by their scale.
        self.scale = sae.kind.logit_scale(sae.d_in) / float(sae.metadata.get("norm_scale", 1.0))
        self.sums = torch.zeros(5, len(sae.concepts), dtype=torch.float64)
        """Per concept: rows that it is known of, those told right, positives, selected positives, cross entropy."""

    def update(self, x: Float[Tensor, "n d_in"], codes: SparseCodes, image_index: Int[Tensor, " n"]) -> None:
        """Adds rows, with their codes and the images that they belong to."""
        n = len(self.sae.concepts)
        wanted = self.targets.rows(image_index)
        pre = self.sae.pre_of_first(x, n).cpu()
        known, shown = ~wanted.isnan(), wanted >= 0.5
        selected = torch.zeros(len(x), n, dtype=torch.bool)
        guided = (codes.latents < n).cpu()
        selected[codes.rows.cpu()[guided], codes.latents.cpu()[guided]] = True
        entropy = F.binary_cross_entropy_with_logits(
            self.scale * pre.double(), wanted.nan_to_num().double(), known.double(), reduction="none"
        )
        found = (known, known & ((pre > 0) == shown), shown, shown & selected, entropy)
        self.sums += torch.stack([one.double().sum(0) for one in found])

    def summary(self) -> dict[str, Any]:
        """For `step.json`. None stands for what cannot be measured: nothing is known of a concept, or no row shows it.

        `bce` is the mean cross entropy, summed over concepts. Of each concept: `rows` that it is known of, how many of
        them are `positive`, the `accuracy` of `pre > 0`, and the share of positives whose code is `selected`.
        """
        concepts, total = {}, 0.0
        for name, sums in zip(self.sae.concepts, self.sums.T.tolist(), strict=True):
            rows, right, positive, selected, entropy = sums
            total += entropy / rows if rows else 0.0
            concepts[name] = {
                "rows": int(rows),
                "positive": int(positive),
                "accuracy": right / rows if rows else None,
                "selected": selected / positive if positive else None,
            }
        return {"bce": total, "concepts": concepts}
