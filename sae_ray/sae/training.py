"""Training one cell, step by step. Cells may share a stream, but are independent of each other."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.sae.auxk import auxk_loss
from sae_ray.sae.kernels import kernels_for
from sae_ray.sae.model import SAE
from sae_ray.sae.optimizer import RowAdam, RowGradient
from sae_ray.sae.ranks import ALONE
from sae_ray.sae.weights import Weights

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_ray.sae.architectures.base import Forward
    from sae_ray.sae.config import Cell
    from sae_ray.sae.ranks import Split


class NonFiniteLoss(SaeRayError):
    """The loss or its gradient became NaN or infinite. The weights are those before the step."""


class StepMetrics(NamedTuple):
    """Metrics of one step, over the batch of all ranks."""

    step: int
    """Index of the step, from 0."""
    loss: float
    """The whole loss."""
    reconstruction_loss: float
    """Squared error, summed over dimensions, averaged over samples; for Matryoshka averaged twice over prefixes."""
    auxk_loss: float
    """AuxK loss before its weight; 0 while no latent is dead."""
    sparsity_penalty: float
    """Penalty before its coefficient."""
    l0: float
    """Active latents per sample, as selected in training."""
    n_dead: int
    """Latents that have not fired for `dead_after_samples` samples."""
    threshold: float
    """The inference threshold in units of the normalised input (mean over latents); NaN before there is one."""
    gradient_norm: float
    """Before clipping."""
    learning_rate: float
    """Of this step."""


class CellTrainer:
    """Trains the SAE of one cell on batches that the caller has divided by the norm scale.

    Several ranks train together the SAE of one process, up to rounding. Latents are selected among those of the whole
    batch. Where ranks split the rows, each calls `step` with its equal share of the batch, in rank order; gradients are
    averaged, and all ranks hold the same weights. Where they split the latents, each calls `step` with the whole batch
    and holds the weights of its latents and `b_dec`; reconstructions are summed.
    """

    def __init__(
        self,
        cell: Cell,
        d_in: int,
        device: torch.device | str = "cpu",
        split: Split = ALONE,
    ):
        """Raises UsageError when the cell does not fit `d_in`, or has fewer latents than ranks that split them."""
        self.cell = cell
        cell.check(d_in, split.latents.size)
        self.d_in, self.d_sae = d_in, cell.d_sae(d_in)
        self.device = torch.device(device)
        self.split = split
        self.architecture = cell.kind(cell, d_in, split)
        threshold = self.architecture.learned_threshold
        self.weights = Weights(d_in, self.d_sae, cell.seed, threshold, self.device, split)
        self.optimizer = RowAdam(self.weights)
        self.n_steps = 0
        """Steps done."""
        self.samples_since_fired = torch.zeros(len(self.weights.W_dec), dtype=torch.int64, device=self.device)
        """Of this rank's latents."""
        self.threshold = torch.tensor(math.nan, device=self.device)
        """Moving average of the smallest kept value, float32; NaN until there is one."""
        self.failed: str | None = None
        """Why training stopped for good."""

    def step(self, batch: Float[Tensor, "batch d_in"]) -> StepMetrics:
        """One optimiser step.

        Raises:
            UsageError: the batch is not [batch, d_in], or the share of a rank is not `training.batch_size` divided by
                the number of ranks.
            NonFiniteLoss: on all ranks. `failed` then holds the reason, and every later step raises it again.
        """
        if self.failed is not None:
            raise NonFiniteLoss(self.failed)
        if batch.ndim != 2 or batch.shape[1] != self.d_in:
            raise UsageError(f"the batch has shape {list(batch.shape)}; this trainer takes [batch, {self.d_in}]")
        size, sharers = self.cell.training.batch_size, self.split.rows
        if sharers.size > 1 and len(batch) * sharers.size != size:
            raise UsageError(
                f"the share of rank {sharers.rank} has {len(batch)} rows; each of {sharers.size} ranks takes "
                f"training.batch_size = {size} divided by their number"
            )
        x = batch.to(self.device, torch.float32)
        if self.n_steps == 0:
            self.weights.b_dec.data.copy_(geometric_median(sharers.gather(x)))

        forward = self.architecture.forward(self.weights, x)
        self._count_firing(forward, len(x) * sharers.size)
        training = self.cell.training
        auxk = x.new_zeros(())
        if self.architecture.revives and training.auxk_weight > 0:
            auxk = auxk_loss(self.weights, x, forward, self._dead(), training.auxk_select, self.split)
        sparsity = (self.cell.sparsity or 0.0) * training.sparsity_warmup_at(self.n_steps)
        loss = forward.reconstruction_loss + sparsity * forward.sparsity_penalty + training.auxk_weight * auxk
        gradients, gradient_norm = self._gradients(loss)
        self._update_threshold(forward)

        metrics = self._metrics(loss, auxk, forward, gradient_norm)
        if not (math.isfinite(metrics.loss) and math.isfinite(metrics.gradient_norm)):
            self.failed = (
                f"step {self.n_steps}: the loss is {metrics.loss}, the norm of its gradient {metrics.gradient_norm}"
            )
            raise NonFiniteLoss(self.failed)
        self.optimizer.step(gradients, self.n_steps + 1, metrics.learning_rate)
        self.n_steps += 1
        return metrics

    def export(self, norm_scale: float) -> SAE | None:
        """The SAE for inputs that are not normalised; training can continue.

        Where ranks split the latents, all of them make this call: the first gets the SAE, the others None.

        Args:
            norm_scale: what the batches were divided by. `b_enc`, `b_dec` and the threshold are multiplied by it.

        Raises:
            SaeRayError: the threshold has not been estimated yet.
        """
        if self.architecture.estimates_threshold and torch.isnan(self.threshold):
            start = self.cell.training.effective("threshold_start_step")
            raise SaeRayError(
                f"after {self.n_steps} steps no inference threshold has been estimated: it is averaged after step "
                f"training.threshold_start_step = {start}, over batches in which a latent is active; "
                "train longer or lower that step"
            )
        weights = self._whole(self.weights.named(), self.device)
        if not weights:
            return None
        threshold = weights.get("threshold")
        if self.architecture.estimates_threshold:
            threshold = self.threshold.expand(self.d_sae).clone()
        return SAE(
            architecture=self.cell.architecture,
            W_enc=weights["W_enc_t"].T.contiguous(),
            W_dec=weights["W_dec"],
            b_enc=weights["b_enc"] * norm_scale,
            b_dec=weights["b_dec"] * norm_scale,
            threshold=None if threshold is None else threshold * norm_scale,
            k=self.cell.k,
            metadata={"cell": _plain(self.cell), "steps": self.n_steps, "norm_scale": norm_scale},
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that `restore` needs to continue bit-identically: tensors on the CPU, and plain JSON values.

        Where ranks split the latents, all of them make this call: the first gets the tensors, the others none.
        """
        facts = {"d_in": self.d_in, "cell": self.cell.identity(), "n_steps": self.n_steps, "failed": self.failed}
        return self._whole(self._tensors(), torch.device("cpu")), facts

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Restores a state, whatever split its entries. Raises UsageError when it belongs to another cell."""
        own = {"d_in": self.d_in, "cell": self.cell.identity()}
        if own != {name: facts.get(name) for name in own}:
            raise UsageError(f"the checkpoint belongs to another cell: it holds {facts}, this one is {own}; delete it")
        self.n_steps, self.failed = facts["n_steps"], facts["failed"]
        for name, tensor in self._tensors().items():
            tensor.copy_(tensors[name] if _on_all_ranks(name) else self.split.latents.own(tensors[name]))

    def _tensors(self) -> dict[str, Tensor]:
        """What training changes, as this rank holds it."""
        tensors = {name: parameter.detach() for name, parameter in self.weights.named().items()}
        if self.n_steps:
            for name, parameter in self.weights.named().items():
                for moment, value in self.optimizer.state[parameter].items():
                    tensors[f"adam.{moment}.{name}"] = value
        return tensors | {"samples_since_fired": self.samples_since_fired, "threshold_estimate": self.threshold}

    def _whole(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Copies of these tensors for all latents, one after the other; none where another rank gets them."""
        latents, whole = self.split.latents, {}
        for name, tensor in tensors.items():
            if not _on_all_ranks(name):
                whole[name] = latents.whole(tensor.detach(), self.d_sae, device)
            elif latents.rank == 0:
                whole[name] = tensor.detach().to(device, copy=True)
        return whole if latents.rank == 0 else {}

    def _dead(self) -> Bool[Tensor, " d_sae"]:
        return self.samples_since_fired >= self.cell.training.dead_after_samples

    def _count_firing(self, forward: Forward, n_rows: int) -> None:
        fired = self.split.rows.sum(forward.fired.float()) > 0
        self.samples_since_fired += n_rows
        self.samples_since_fired[fired] = 0

    def _gradients(self, loss: Tensor) -> tuple[dict[str, RowGradient], Float[Tensor, ""]]:
        """Of the whole batch, without what only scales decoder rows, clipped; and the norm before clipping."""
        named = self.weights.named()
        gradients = {
            name: RowGradient.of(gradient, self.split.rows)
            for name, gradient in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)
        }
        self._orthogonalise(*gradients["W_dec"])
        latents = self.split.latents
        # What all ranks hold counts once.
        own = [gradient.values for name, gradient in gradients.items() if latents.rank == 0 or not _on_all_ranks(name)]
        norm = latents.sum(torch.nn.utils.get_total_norm(own).square()).sqrt()
        factor = (self.cell.training.gradient_clip / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients.values():
            gradient.values.mul_(factor)
        return gradients, norm

    @torch.no_grad()
    def _orthogonalise(self, rows: Int[Tensor, " n"], values: Float[Tensor, "n d_in"]) -> None:
        """Takes from gradients of decoder rows, in place, what is parallel to the row."""
        W_dec = self.weights.W_dec
        if kernels := kernels_for(W_dec):
            kernels.orthogonalise_rows(values, W_dec, rows)
            return
        for some, part in zip(rows.split(1024), values.split(1024), strict=True):  # parts that stay in the cache
            directions = W_dec.index_select(0, some)
            part.addcmul_(torch.linalg.vecdot(directions, part).unsqueeze(1), directions, value=-1)

    @torch.no_grad()
    def _update_threshold(self, forward: Forward) -> None:
        start = self.cell.training.effective("threshold_start_step")
        if not self.architecture.estimates_threshold or self.n_steps <= start:
            return
        smallest = self.split.ranks.smallest(forward.smallest_active)
        beta = self.cell.training.threshold_beta
        averaged = torch.where(self.threshold.isnan(), smallest, beta * self.threshold + (1 - beta) * smallest)
        self.threshold = torch.where(smallest.isfinite(), averaged, self.threshold)

    @torch.no_grad()
    def _metrics(self, loss: Tensor, auxk: Tensor, forward: Forward, gradient_norm: Tensor) -> StepMetrics:
        learned = self.weights.threshold
        own = [forward.n_active, self._dead().sum(), loss.new_zeros(()) if learned is None else learned.sum()]
        n_active, n_dead, total_threshold = self.split.latents.sum(torch.stack(own))
        losses = [loss, forward.reconstruction_loss, auxk, forward.sparsity_penalty]
        means = self.split.rows.mean(torch.stack([*losses, n_active / len(forward.pre)]))
        threshold = self.threshold if learned is None else total_threshold / self.d_sae
        same_on_all_ranks = torch.stack([n_dead, threshold, gradient_norm])
        # One transfer from the device for all of them.
        *averaged, n_dead, threshold, gradient_norm = torch.cat([means, same_on_all_ranks]).tolist()
        learning_rate = self.cell.training.learning_rate_at(self.n_steps, self.d_sae)
        return StepMetrics._make([self.n_steps, *averaged, int(n_dead), threshold, gradient_norm, learning_rate])


@torch.no_grad()
def geometric_median(points: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The point with the smallest sum of distances to `points`, by Weiszfeld's iteration (at most 100 rounds)."""
    median = points.mean(0)
    for _ in range(100):
        weights = 1 / torch.linalg.vector_norm(points - median, dim=1).clamp_min(1e-12)
        previous, median = median, (weights / weights.sum()) @ points
        if torch.linalg.vector_norm(median - previous) < 1e-5:
            break
    return median


def _on_all_ranks(name: str) -> bool:
    """Whether a tensor of a state is the same on all ranks that split the latents; of others each has its rows."""
    return name.endswith(("b_dec", "threshold_estimate"))


def _plain(cell: Cell) -> dict[str, Any]:
    """The cell as plain JSON values, including its defaults, so that the file is complete by itself."""
    return json.loads(json.dumps(dataclasses.asdict(cell)))
