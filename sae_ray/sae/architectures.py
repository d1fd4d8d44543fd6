"""The trainable architectures: which latents of a batch are active, and what the loss is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn import Parameter

from sae_ray.sae.product import affine
from sae_ray.sae.selection import BatchSelection, largest_positive_per_row
from sae_ray.sae.sparse import Pattern, decode_entries, encode_entries

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_ray.sae.config import ArchitectureName, Cell
    from sae_ray.sae.ranks import Ranks


class Weights:
    """The trained parameters, float32. The encoder is stored transposed, so that one latent is one contiguous row."""

    def __init__(self, d_in: int, d_sae: int, seed: int, threshold: float | None, device: torch.device):
        """Decoder rows are random directions of unit norm, the encoder is their transpose, the biases are 0."""
        generator = torch.Generator().manual_seed(seed)
        W_dec = F.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
        self.W_dec = Parameter(W_dec.to(device))
        self.W_enc_t = Parameter(self.W_dec.detach().clone())
        self.b_enc = Parameter(torch.zeros(d_sae, device=device))
        self.b_dec = Parameter(torch.zeros(d_in, device=device))
        self.threshold = None if threshold is None else Parameter(torch.full_like(self.b_enc, threshold))
        """Only of architectures that learn it."""

    def named(self) -> dict[str, Parameter]:
        return {name: value for name, value in vars(self).items() if value is not None}

    @torch.no_grad()
    def constrain(self, name: str, part: slice) -> None:
        """Some rows of a weight: those of the decoder back to unit norm, a learned threshold back to 0 or more."""
        rows = self.named()[name][part]
        if name == "W_dec":
            rows /= torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(torch.finfo().tiny)
        elif name == "threshold":
            rows.clamp_(min=0)


class Forward(NamedTuple):
    """One batch through an SAE in training."""

    reconstruction_loss: Float[Tensor, ""]
    """With gradient."""
    sparsity_penalty: Float[Tensor, ""]
    """With gradient, before its coefficient; 0 where sparsity is by selection."""
    residual: Float[Tensor, "batch d_in"]
    """x minus the reconstruction from all latents; no gradient."""
    pre: Float[Tensor, "batch d_sae"]
    """Pre-activations; no gradient. On a CPU they hold until the next forward pass in this thread, of any cell."""
    fired: Bool[Tensor, " d_sae"]
    """Latents that were active at least once."""
    n_active: Float[Tensor, ""]
    """Number of active entries."""
    smallest_active: Float[Tensor, ""]
    """The smallest active value, infinite when there is none."""


class Architecture(ABC):
    """An architecture, for one cell."""

    estimates_threshold: ClassVar[bool] = False
    """Whether the inference threshold is the moving average of the smallest kept value."""
    revives: ClassVar[bool] = False
    """Whether AuxK revives dead latents."""

    def __init__(self, cell: Cell, d_in: int, ranks: Ranks):
        """`ranks`: they hold equal shares of a batch; a selection over the batch is over all of them."""
        self.cell = cell
        self.group_sizes = cell.group_sizes(d_in)

    @property
    def learned_threshold(self) -> float | None:
        """Initial value of a threshold per latent that is trained like a weight; None without one."""
        return None

    @abstractmethod
    def forward(self, weights: Weights, x: Float[Tensor, "batch d_in"]) -> Forward: ...

    def pre_activations(self, weights: Weights, x: Tensor) -> Tensor:
        """With gradients, where they are asked for."""
        centred = x - weights.b_dec
        if self.cell.training.dtype == "bfloat16":
            rough, W_enc = centred.bfloat16(), weights.W_enc_t.bfloat16().T
            if x.is_cuda and not torch.is_grad_enabled():
                return torch.addmm(weights.b_enc, rough, W_enc, out_dtype=torch.float32)
            return (rough @ W_enc).float() + weights.b_enc
        if torch.is_grad_enabled():
            return torch.addmm(weights.b_enc, centred, weights.W_enc_t.T)
        return affine(centred, weights.W_enc_t, weights.b_enc)


class SelectingArchitecture(Architecture):
    """Architectures that select `k` latents per sample: all gradients follow the selected entries alone."""

    revives = True

    @abstractmethod
    def select(self, pre: Float[Tensor, "batch d_sae"]) -> Int[Tensor, " nnz"]:
        """Ascending flat indices of the active entries, all of them above 0."""

    def forward(self, weights: Weights, x: Tensor) -> Forward:
        with torch.no_grad():
            pre = self.pre_activations(weights, x)
            flat = self.select(pre)
        pattern = Pattern.of_flat(flat, *pre.shape)
        values = encode_entries(pre.flatten()[flat], x, weights.W_enc_t, weights.b_enc, weights.b_dec, pattern)
        errors = x - self._reconstruct_prefixes(values, pattern, weights)
        n_prefixes = len(errors)
        kept = values.detach()
        return Forward(
            # The reference averages over the prefixes twice; so do we, and losses stay comparable with its own.
            reconstruction_loss=errors.square().sum(-1).mean() / n_prefixes,
            sparsity_penalty=x.new_zeros(()),
            residual=errors[-1].detach(),
            pre=pre,
            fired=pre.new_zeros(pre.shape[1], dtype=torch.bool).index_fill_(0, pattern.latents, True),
            n_active=x.new_tensor(float(len(kept))),
            smallest_active=torch.cat([kept, kept.new_tensor([torch.inf])]).amin(),
        )

    def _reconstruct_prefixes(
        self, values: Float[Tensor, " nnz"], pattern: Pattern, weights: Weights
    ) -> Float[Tensor, "n_prefixes batch d_in"]:
        if len(self.group_sizes) == 1:
            return (decode_entries(values, weights.W_dec, pattern) + weights.b_dec).unsqueeze(0)
        ends = torch.tensor(list(accumulate(self.group_sizes)), device=values.device)
        group = torch.bucketize(pattern.latents, ends, right=True)
        # Each group decodes into a batch of its own; a prefix is the sum of the groups up to its end.
        rows = group * pattern.n_rows + pattern.rows
        order = rows.argsort(stable=True)
        grouped = Pattern(rows[order], pattern.latents[order], len(ends) * pattern.n_rows, pattern.n_latents)
        parts = decode_entries(values[order], weights.W_dec, grouped)
        return parts.view(len(ends), pattern.n_rows, -1).cumsum(0) + weights.b_dec


class BatchTopK(SelectingArchitecture):
    """The `k * batch` largest values of the whole batch, over all ranks (Bussmann et al. 2024, arXiv 2412.06410)."""

    estimates_threshold = True

    def __init__(self, cell: Cell, d_in: int, ranks: Ranks):
        super().__init__(cell, d_in, ranks)
        assert cell.k is not None
        self._selection = BatchSelection(cell.k, ranks)

    def select(self, pre: Tensor) -> Tensor:
        return self._selection(pre)


class MatryoshkaBatchTopK(BatchTopK):
    """BatchTopK whose every nested prefix of the dictionary reconstructs (Bussmann et al. 2025, arXiv 2503.17547).

    One selection serves all prefixes. With a single prefix it is BatchTopK: the group sizes are all that differs.
    """


class TopK(SelectingArchitecture):
    """The `k` largest values of each sample (Gao et al. 2024, arXiv 2406.04093)."""

    def select(self, pre: Tensor) -> Tensor:
        assert self.cell.k is not None
        return largest_positive_per_row(pre, self.cell.k)


class PenalisedArchitecture(Architecture):
    """Architectures whose sparsity is a penalty. How many latents are active is unbounded, so they train densely."""

    @abstractmethod
    def activate(self, pre: Tensor, weights: Weights) -> tuple[Float[Tensor, "batch d_sae"], Float[Tensor, ""]]:
        """Codes and sparsity penalty."""

    def forward(self, weights: Weights, x: Tensor) -> Forward:
        pre = self.pre_activations(weights, x)
        codes, penalty = self.activate(pre, weights)
        error = x - (codes @ weights.W_dec + weights.b_dec)
        kept = codes.detach()
        active = kept > 0
        return Forward(
            reconstruction_loss=error.square().sum(-1).mean(),
            sparsity_penalty=penalty,
            residual=error.detach(),
            pre=pre.detach(),
            fired=active.any(0),
            n_active=active.sum().to(x.dtype),
            smallest_active=torch.where(active, kept, torch.inf).amin(),
        )


class ReLU(PenalisedArchitecture):
    """ReLU with the L1 norm of the codes as penalty (decoder rows have unit norm)."""

    def activate(self, pre: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        codes = pre.relu()
        return codes, codes.sum(-1).mean()


class JumpReLU(PenalisedArchitecture):
    """A learned threshold per latent, with the number of active latents as penalty (Rajamanoharan et al. 2024).

    The threshold itself is trained, not its logarithm, and kept from falling below 0.
    """

    @property
    def learned_threshold(self) -> float:
        return self.cell.training.jumprelu_initial_threshold

    def activate(self, pre: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        bandwidth = self.cell.training.jumprelu_bandwidth
        result = _JumpReLU.apply(pre, weights.threshold, bandwidth)
        assert result is not None
        codes, active = result
        return codes, active.sum(-1).mean()


class _JumpReLU(torch.autograd.Function):
    """(z * H(z - threshold), H(z - threshold)) with the pseudo-derivatives of arXiv 2407.14435, eq. 11 and 12."""

    @staticmethod
    def forward(ctx, z, threshold, bandwidth):
        active = z > threshold
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(active & (z > 0), z, 0.0), active.to(z.dtype)

    @staticmethod
    def backward(ctx, grad_codes, grad_active):  # pyright: ignore[reportIncompatibleMethodOverride]
        z, threshold = ctx.saved_tensors
        window = ((z - threshold).abs() < ctx.bandwidth / 2).to(z.dtype) / ctx.bandwidth
        grad_threshold = -(window * (threshold * grad_codes + grad_active)).sum(0)
        return grad_codes * ((z > threshold) & (z > 0)), grad_threshold, None


ARCHITECTURES: dict[ArchitectureName, type[Architecture]] = {
    "batch_topk": BatchTopK,
    "matryoshka_batch_topk": MatryoshkaBatchTopK,
    "topk": TopK,
    "relu": ReLU,
    "jumprelu": JumpReLU,
}
