"""Training one cell, step by step. Cells may share a stream, but are independent of each other."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_ray.errors import SaeRayError, UsageError, check
from sae_ray.sae.auxk import auxk_loss, padded_auxk_loss
from sae_ray.sae.guidance import concept_loss
from sae_ray.sae.kernels import fixed_shapes, kernels_for
from sae_ray.sae.model import SAE
from sae_ray.sae.monosemanticity import batch_monosemanticity
from sae_ray.sae.optimizer import RowAdam, RowGradient, adam_scalars
from sae_ray.sae.product import tf32
from sae_ray.sae.ranks import ALONE
from sae_ray.sae.replay import Replayed
from sae_ray.sae.weights import Weights
from sae_ray.sae.window import Window

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from sae_ray.sae.architectures.base import Forward
    from sae_ray.sae.config import Cell
    from sae_ray.sae.ranks import Split


REPORT_EVERY = 50
"""Steps after which the host waits for a GPU that trains alone, for their metrics."""
_SMALLEST_ROOM = 512
"""Dead latents for which AuxK has room at least; more room is a power of two of it."""


class NonFiniteLoss(SaeRayError):
    """The loss or its gradient became NaN or infinite. The weights are those before the step."""


class StepMetrics(NamedTuple):
    """Metrics of one step, over the batch of all ranks."""

    step: int
    """Index of the step, from 0."""
    loss: float
    """The whole loss."""
    reconstruction_loss: float
    """Squared error, summed over dimensions, averaged over samples; for Matryoshka averaged twice over prefixes, for
    `guided_topk` relative to the sample's squared norm."""
    auxk_loss: float
    """AuxK loss before its weight; 0 while no latent is dead."""
    sparsity_penalty: float
    """Penalty before its coefficient."""
    concept_loss: float
    """Loss of the concepts before its weight; 0 for SAEs that are not guided."""
    monosemanticity: float
    """Mean score of the latents that are active on two rows of the batch or more; 0 where it is no goal."""
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


class Deaths(NamedTuple):
    """Why latents are dead after some steps, as training counts it; numbers of latents, but for the last."""

    never_fired: int
    """In no batch."""
    stopped_firing: int
    """They fired once, but not for `dead_after_samples` samples."""
    revived: int
    """They were dead, and are not now."""
    revivals: int
    """How often a dead latent fired again; a latent may die several times."""


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
        concepts: tuple[str, ...] = (),
        gamma: Float[Tensor, " d_in"] | None = None,
    ):
        """`concepts`: those that the first latents learn. `gamma`: the weights of the dimensions, for a cell that has
        some (`Weighing.gamma`); the same on all ranks.

        Raises UsageError when the cell does not fit `d_in` or `gamma`, or has fewer latents than concepts, or than
        ranks that split them.
        """
        self.cell = cell
        self.concepts = concepts
        cell.check(d_in, split.latents.size)
        cell.check_concepts(d_in, len(concepts))
        check(cell.weighted == (gamma is not None), "cell.weights", cell.weights, "give gamma if it is not uniform")
        self.d_in, self.d_sae = d_in, cell.d_sae(d_in)
        self.device = torch.device(device)
        self.split = split
        self.architecture = cell.kind(cell, d_in, split)
        self.architecture.gamma = None if gamma is None else gamma.to(self.device, torch.float32)
        threshold = self.architecture.learned_threshold
        unit_decoder = self.architecture.unit_decoder
        self.weights = Weights(d_in, self.d_sae, cell.seed, threshold, self.device, split, unit_decoder)
        self.weights.freeze(self.architecture.frozen)
        self.optimizer = RowAdam(self.weights)
        self.n_steps = 0
        """Steps done."""
        self.starts_at_median = True
        """Whether the first step sets `b_dec` to the geometric median of its batch."""
        self.samples_since_fired = torch.zeros(len(self.weights.W_dec), dtype=torch.int64, device=self.device)
        """Of this rank's latents."""
        self.revivals = torch.zeros_like(self.samples_since_fired)
        """How often each of them fired again after it was dead."""
        self.ever_fired = torch.zeros_like(self.samples_since_fired, dtype=torch.bool)
        self.threshold = torch.tensor(math.nan, device=self.device)
        """Moving average of the smallest kept value, float32; NaN until there is one."""
        self.failed: str | None = None
        """Why training stopped for good."""
        fixed = fixed_shapes(self.samples_since_fired, split)
        self._window = Window(REPORT_EVERY if fixed else 1, 3, len(StepMetrics._fields) - 2, self.device)
        self._room: int | None = None
        """Of AuxK with kernels: how many latents can be dead until metrics are due, rounded up; 0 if none can."""
        self._replayed = Replayed() if fixed and self.device.type == "cuda" else None

    def step(
        self,
        batch: Float[Tensor, "batch d_in"],
        targets: Float[Tensor, "batch concepts"] | None = None,
        embeddings: Float[Tensor, "batch d"] | None = None,
    ) -> StepMetrics:
        """`advance`, and the metrics of this step at once: on a GPU the host waits for them."""
        return (self.advance(batch, targets, embeddings) or self.report())[-1]

    def advance(
        self,
        batch: Float[Tensor, "batch d_in"],
        targets: Float[Tensor, "batch concepts"] | None = None,
        embeddings: Float[Tensor, "batch d"] | None = None,
    ) -> list[StepMetrics]:
        """One optimiser step.

        Args:
            targets: how far each row shows each of the concepts, from 0 to 1, NaN where that is unknown; wanted if
                there are concepts.
            embeddings: the judge's, of the image that each row belongs to, of any length but 0; wanted if
                MonoSemanticity is a goal of the cell.

        Returns:
            The metrics of all steps since the last report, in turn, where they are known: a GPU that trains alone is
            waited for every `REPORT_EVERY` steps, elsewhere they are known at once. Otherwise nothing.

        Raises:
            UsageError: the batch is not [batch, d_in], or the share of a rank is not `training.batch_size` divided by
                the number of ranks.
            NonFiniteLoss: of this step, or one since the last report; on all ranks. `failed` then holds the reason, and
                every later step raises it again.
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
        wanted = x.new_zeros(len(x), 0) if targets is None else targets.to(self.device, torch.float32)
        if wanted.shape != (len(x), len(self.concepts)):
            raise UsageError(
                f"the targets have shape {list(wanted.shape)}; {len(x)} rows with {len(self.concepts)} concepts need "
                f"{[len(x), len(self.concepts)]}"
            )
        judged = self._judged(x, embeddings)
        if self.n_steps == 0 and self.starts_at_median and not self.architecture.standardises_rows:
            self.weights.b_dec.data.copy_(geometric_median(sharers.gather(x)))
        if self._window.done == 0:
            self._open_window(max(size, len(x) * sharers.size))
        averages = self.architecture.estimates_threshold
        averages = averages and self.n_steps > self.cell.training.effective("threshold_start_step")
        with tf32(self.device, self.cell.training.dtype):
            if self._replayed:
                self._replayed(self._work, (x, wanted, judged), averages, self._room)
            else:
                self._work(x, wanted, judged, averages, self._room)
        self.n_steps += 1
        self._window.done += 1
        return self.report() if self.n_steps % self._window.length == 0 else []

    def report(self) -> list[StepMetrics]:
        """The metrics of the steps since the last report, for which the host waits. Raises NonFiniteLoss as they do."""
        rows = self._window.close()
        found = []
        for step, (*averaged, n_dead, threshold, gradient_norm) in enumerate(rows, self.n_steps - len(rows)):
            learning_rate = self.cell.training.learning_rate_at(step, self.d_sae)
            metrics = StepMetrics._make([step, *averaged, int(n_dead), threshold, gradient_norm, learning_rate])
            if not (math.isfinite(metrics.loss) and math.isfinite(gradient_norm)):
                self.n_steps = step
                self.failed = f"step {step}: the loss is {metrics.loss}, the norm of its gradient {gradient_norm}"
                raise NonFiniteLoss(self.failed)
            found.append(metrics)
        return found

    def deaths(self) -> Deaths:
        """Of all latents. The host waits; where ranks split the latents, all of them make this call."""
        dead = self._dead()
        stopped, revived = dead & self.ever_fired, (self.revivals > 0) & ~dead
        own = torch.stack([(~self.ever_fired).sum(), stopped.sum(), revived.sum(), self.revivals.sum()])
        return Deaths(*self.split.latents.sum(own).tolist())

    def export(self, norm_scale: float, centre: Float[Tensor, " d_in"] | None = None) -> SAE | None:
        """The SAE for inputs that are not normalised; training can continue.

        Where ranks split the latents, all of them make this call: the first gets the SAE, the others None.

        Args:
            norm_scale: what the batches were divided by. `b_enc`, `b_dec` and the threshold are multiplied by it.
            centre: what was subtracted from them before, if anything. It is added to `b_dec`, which is all it takes:
                `b_dec` is what is subtracted from inputs and added to reconstructions.

        Raises:
            NonFiniteLoss: as a step does, for those whose metrics are not known yet.
            SaeRayError: the threshold has not been estimated yet.
        """
        self.report()
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
        threshold, b_dec = weights.get("threshold"), weights["b_dec"] * norm_scale
        if self.architecture.estimates_threshold:
            threshold = self.threshold.expand(self.d_sae).clone()
        return SAE(
            architecture=self.cell.architecture,
            W_enc=weights["W_enc_t"].T.contiguous(),
            W_dec=weights["W_dec"],
            b_enc=weights["b_enc"] * norm_scale,
            b_dec=b_dec if centre is None else b_dec + centre.to(b_dec),
            threshold=None if threshold is None else threshold * norm_scale,
            k=self.cell.k,
            concepts=self.concepts,
            metadata={"cell": _plain(self.cell), "steps": self.n_steps, "norm_scale": norm_scale},
        )

    def state(self, copied: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that `restore` needs to continue bit-identically: tensors on the CPU, and plain JSON values.

        Where ranks split the latents, all of them make this call: the first gets the tensors, the others none.

        Args:
            copied: Copies stay as they are when training goes on. Otherwise tensors may be the trainer's own, to be
                written at once: moments and weights of a wide SAE are gigabytes.
        """
        with contextlib.suppress(NonFiniteLoss):  # `failed` tells of it
            self.report()
        facts = {"d_in": self.d_in, "cell": self.cell.identity(), "n_steps": self.n_steps, "failed": self.failed}
        if self._room is not None and self._window.length > 1:  # room for one step is of no use to others
            facts["auxk_room"] = self._room
        if not self.starts_at_median:
            facts["starts_at_median"] = False
        return self._whole(self._tensors(), torch.device("cpu"), copied), facts

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Restores a state, whatever split its entries.

        Raises UsageError when it belongs to another cell, or lacks what is counted now.
        """
        own = {"d_in": self.d_in, "cell": self.cell.identity()}
        if own != {name: facts.get(name) for name in own}:
            raise UsageError(f"the checkpoint belongs to another cell: it holds {facts}, this one is {own}; delete it")
        if missing := sorted(self._tensors().keys() - tensors.keys()):
            raise UsageError(f"the checkpoint lacks {', '.join(missing)}: an earlier sae-ray wrote it; delete it")
        self._window.close()
        self.n_steps, self.failed, self._room = facts["n_steps"], facts["failed"], facts.get("auxk_room")
        self.starts_at_median = facts.get("starts_at_median", True)
        for name, tensor in self._tensors().items():
            tensor.copy_(tensors[name] if _on_all_ranks(name) else self.split.latents.own(tensors[name]))

    def _tensors(self) -> dict[str, Tensor]:
        """What training changes, as this rank holds it."""
        tensors = {name: parameter.detach() for name, parameter in self.weights.named().items()}
        if self.n_steps:
            for name, parameter in self.weights.trained().items():
                for moment, value in self.optimizer.state[parameter].items():
                    tensors[f"adam.{moment}.{name}"] = value
        counted = {name: getattr(self, name) for name in ("samples_since_fired", "revivals", "ever_fired")}
        return tensors | counted | {"threshold_estimate": self.threshold}

    def _whole(self, tensors: Mapping[str, Tensor], device: torch.device, copied: bool = True) -> dict[str, Tensor]:
        """These tensors for all latents, one after the other; none where another rank gets them."""
        latents, whole = self.split.latents, {}
        for name, tensor in tensors.items():
            if latents.size == 1:
                whole[name] = tensor.detach().to(device, copy=copied)
            elif not _on_all_ranks(name):
                whole[name] = latents.whole(tensor.detach(), self.d_sae, device)
            elif latents.rank == 0:
                whole[name] = tensor.detach().to(device, copy=True)
        return whole if latents.rank == 0 else {}

    def _dead(self) -> Bool[Tensor, " d_sae"]:
        return self.samples_since_fired >= self.cell.training.dead_after_samples

    def _open_window(self, n_rows: int) -> None:
        """Tells the device what is known of the steps to come, and looks how many latents can be dead in them.

        It looks when metrics were due, so that a run which is interrupted in between goes on as it would have.
        """
        training, steps = self.cell.training, range(self.n_steps, self.n_steps + self._window.length)
        sparsity = self.cell.sparsity or 0.0
        scalars = [adam_scalars(n + 1, training.learning_rate_at(n, self.d_sae)) for n in steps]
        self._window.open(
            [(sparsity * training.sparsity_warmup_at(n), *of) for n, of in zip(steps, scalars, strict=True)]
        )
        if not self._revives or self.split.latents.size > 1 or kernels_for(self.threshold) is None:
            self._room = None
        elif self._room is None or self.n_steps % len(steps) == 0:
            near = self.samples_since_fired >= training.dead_after_samples - len(steps) * n_rows
            n_dead = int(near.sum())
            self._room = min(self.d_sae, max(_SMALLEST_ROOM, 2 ** (n_dead - 1).bit_length())) if n_dead else 0

    @property
    def _revives(self) -> bool:
        return self.architecture.revives and self.cell.training.auxk_weight > 0

    def _work(
        self,
        x: Float[Tensor, "batch d_in"],
        targets: Float[Tensor, "batch concepts"],
        judged: Float[Tensor, "batch d"],
        averages: bool,
        room: int | None,
    ) -> None:
        """What a step does on the device. With fixed shapes it follows from these arguments, but for what tensors hold.

        Args:
            averages: whether the threshold is averaged over this step, too.
            room: `_room`.
        """
        sparsity, *adam = self._window.numbers()
        forward = self.architecture.forward(self.weights, x)
        self._count_firing(forward, len(x) * self.split.rows.size)
        auxk = self._auxk_loss(x, forward, room)
        weighted = self.cell.training.auxk_weight * auxk
        loss = forward.reconstruction_loss + sparsity * forward.sparsity_penalty + weighted
        guidance = self._concept_loss(x, targets)
        if guidance is not None:
            loss = loss + self.cell.settings.concept_weight * guidance
        score = None
        if self.cell.monosemanticity and forward.entries is not None:
            score = batch_monosemanticity(*forward.entries, judged, self.split)
            loss = loss - self.cell.monosemanticity * score
        gradients, norm = self._gradients(loss)
        if averages:
            self._update_threshold(forward)
        figures = self._figures(loss, auxk, guidance, score, forward, norm)
        self._window.note(figures, ~(figures[0].isfinite() & norm.isfinite()))  # of all ranks, so that they agree

        factor = (self.cell.training.gradient_clip / (norm + 1e-6)).clamp(max=1.0)
        if kernels_for(x):
            running = 1 - self._window.stopped.float()
            self.optimizer.step_with_kernels(gradients, torch.stack([*adam, factor, running]))
        elif not self._window.stopped:
            learning_rate = self.cell.training.learning_rate_at(self.n_steps, self.d_sae)
            self.optimizer.step(gradients, factor, self.n_steps + 1, learning_rate)

    def _count_firing(self, forward: Forward, n_rows: int) -> None:
        rows = self.split.rows
        fired = forward.fired if rows.size == 1 else rows.sum(forward.fired.float()) > 0
        self.revivals += fired & self._dead()
        self.ever_fired |= fired
        self.samples_since_fired += n_rows
        self.samples_since_fired.masked_fill_(fired, 0)

    def _auxk_loss(self, x: Tensor, forward: Forward, room: int | None) -> Float[Tensor, ""]:
        training = self.cell.training
        if not self._revives or room == 0:
            return x.new_zeros(())
        gamma = self.architecture.gamma
        if room is not None:
            return padded_auxk_loss(self.weights, x, forward, self._dead(), training, self.split, room, gamma)
        return auxk_loss(self.weights, x, forward, self._dead(), training.auxk_select, self.split, gamma)

    def _judged(self, x: Tensor, embeddings: Tensor | None) -> Float[Tensor, "rows d"]:
        """Embeddings of length 1; of no width where they are of no use."""
        if not self.cell.monosemanticity:
            return x.new_zeros(len(x), 0)
        if embeddings is None or embeddings.ndim != 2 or len(embeddings) != len(x):
            shape = None if embeddings is None else list(embeddings.shape)
            raise UsageError(f"the embeddings have shape {shape}; give [{len(x)}, d], since MonoSemanticity is a goal")
        return torch.nn.functional.normalize(embeddings.to(self.device, torch.float32), dim=1)

    def _concept_loss(self, x: Tensor, targets: Tensor) -> Float[Tensor, ""] | None:
        """None without concepts."""
        if not self.concepts:
            return None
        inputs, scale = self.architecture.inputs(x), self.architecture.logit_scale(self.d_in)
        return concept_loss(self.weights, inputs, targets, self.cell.settings, scale, self.split)

    def _gradients(self, loss: Tensor) -> tuple[dict[str, RowGradient], Float[Tensor, ""]]:
        """Of the whole batch, without what only scales decoder rows; and their norm."""
        named = self.weights.trained()
        if not named:
            return {}, loss.new_zeros(())
        gradients = {
            name: RowGradient.of(gradient, self.split.rows)
            for name, gradient in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)
        }
        if "W_dec" in gradients and self.architecture.unit_decoder:
            self._orthogonalise(*gradients["W_dec"])
        latents = self.split.latents
        # What all ranks hold counts once.
        own = [gradient.values for name, gradient in gradients.items() if latents.rank == 0 or not _on_all_ranks(name)]
        return gradients, latents.sum(torch.nn.utils.get_total_norm(own).square()).sqrt()

    @torch.no_grad()
    def _orthogonalise(self, rows: Int[Tensor, " n"], values: Float[Tensor, "n d_in"]) -> None:
        """Takes from gradients of decoder rows, in place, what is parallel to the row."""
        W_dec = self.weights.W_dec
        if kernels := kernels_for(W_dec):
            kernels.orthogonalise_rows(values, W_dec)
            return
        for some, part in zip(rows.split(1024), values.split(1024), strict=True):  # parts that stay in the cache
            directions = W_dec.index_select(0, some)
            part.addcmul_(torch.linalg.vecdot(directions, part).unsqueeze(1), directions, value=-1)

    @torch.no_grad()
    def _update_threshold(self, forward: Forward) -> None:
        smallest = self.split.ranks.smallest(forward.smallest_active)
        beta = self.cell.training.threshold_beta
        averaged = torch.where(self.threshold.isnan(), smallest, beta * self.threshold + (1 - beta) * smallest)
        self.threshold.copy_(torch.where(smallest.isfinite(), averaged, self.threshold))

    @torch.no_grad()
    def _figures(
        self,
        loss: Tensor,
        auxk: Tensor,
        guidance: Tensor | None,
        score: Tensor | None,
        forward: Forward,
        gradient_norm: Tensor,
    ) -> Float[Tensor, " n_figures"]:
        """The fields of `StepMetrics`, but for the first and the last."""
        learned = self.weights.threshold
        own = [forward.n_active, self._dead().sum(), loss.new_zeros(()) if learned is None else learned.sum()]
        n_active, n_dead, total_threshold = self.split.latents.sum(torch.stack(own))
        of_concepts, of_batch = (loss.new_zeros(()) if one is None else one for one in (guidance, score))
        losses = [loss, forward.reconstruction_loss, auxk, forward.sparsity_penalty, of_concepts, of_batch]
        means = self.split.rows.mean(torch.stack([*losses, n_active / len(forward.pre)]))
        threshold = self.threshold if learned is None else total_threshold / self.d_sae
        return torch.cat([means, torch.stack([n_dead, threshold, gradient_norm])])


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
