"""Training a bundle: cells that read the same activations share one stream and resume from their newest checkpoints.

A cell keeps its own optimizer, counters, checkpoints and failure. Its SAE does not depend on the bundle nor, up to
rounding, on the number of ranks and on what they split.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.sae.calibration import calibrated
from sae_ray.sae.formats import save_latents, save_sae
from sae_ray.sae.metrics import measure_latents
from sae_ray.sae.ranks import ALONE
from sae_ray.sae.scaling import Scaling
from sae_ray.sae.training import CellTrainer, NonFiniteLoss, StepMetrics
from sae_ray.store.activations import ActivationStore
from sae_ray.store.checkpoints import newest_checkpoint, save_checkpoint
from sae_ray.store.copies import shared_activations
from sae_ray.store.sample import Sample
from sae_ray.store.steps import digest
from sae_ray.store.stream import TrainingStream

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from sae_ray.sae.config import Cell, TrainingConfig
    from sae_ray.sae.ranks import Split
    from sae_ray.store.files import Folder
    from sae_ray.store.sample import Location
    from sae_ray.store.steps import Step

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class CellJob:
    """One SAE and where it is written."""

    step: Step
    cell: Cell


@dataclass(frozen=True)
class BundleJob:
    """Cells to train together."""

    activations: Folder
    """A finished extraction step."""
    cells: tuple[CellJob, ...]
    """They agree in `training.batch_size`, `steps`, `centre` and `threshold`."""
    stream_seed: int
    """Decides the order of the activations."""
    shuffle_rows: int
    """Activations held at once."""
    checkpoint_every: int
    """Steps between checkpoints; one more comes after the last step."""

    @property
    def name(self) -> str:
        """Stable, so that the same bundle is the same run."""
        return f"bundle-{digest([job.step.name for job in self.cells])[:12]}"

    @property
    def steps(self) -> int:
        return self.cells[0].cell.training.steps


class CellReport(NamedTuple):
    """A cell after a step."""

    metrics: StepMetrics
    d_sae: int


class _Run(NamedTuple):
    job: CellJob
    trainer: CellTrainer
    attempts: list[dict[str, Any]]
    """First step, workers, shards and device of every attempt; this attempt is the last."""


class _Inputs(NamedTuple):
    """What a bundle is trained on."""

    store: ActivationStore
    location: Location
    """Of its activations."""
    scaling: Scaling
    """What training makes of them."""
    without: Sample | None
    """Says which of them are kept out of training; None if none are."""

    @classmethod
    def of(cls, store: ActivationStore, training: TrainingConfig, device: torch.device) -> _Inputs:
        sample = Sample(store)
        location = sample.location()
        without = sample if training.threshold == "calibrated" else None
        return cls(store, location, Scaling.of(store, location, training, device), without)

    def kept_out_rows(self) -> Float[Tensor, "n d_in"]:
        """In the stored dtype."""
        return torch.from_numpy(self.without.kept_out_rows()) if self.without else torch.empty(0, self.store.d)


def train_cells(
    bundle: BundleJob,
    device: torch.device | str = "cpu",
    split: Split = ALONE,
    after_step: Callable[[int, dict[str, CellReport]], bool] = lambda done, reports: False,
) -> None:
    """Trains the cells of a bundle that are not finished and writes each one's step.

    A step holds the SAE, `latents.parquet` (statistics of its latents on the training activations, see
    `measure_latents`), why latents are dead, and a record of the attempts that led to it. A cell whose loss stops being
    finite is recorded as failed; the others continue. All cells fail if there are no activations, or all are 0.

    Args:
        split: every rank of it makes this call, the first one writes. Another attempt may have another.
        after_step: called on every rank after each step, with the number of steps done and a report of every cell that
            made this step and whose metrics are known (on a GPU not after each step), by the name of the cell's own
            step. Says whether checkpoints are to be written at once, on all ranks alike.

    Raises:
        UsageError: the batch or the latents of a cell cannot be split over the ranks.
        SaeRayError: the activations are not finished, or torn.
    """
    workers, batch_size = split.rows.size, bundle.cells[0].cell.training.batch_size
    if batch_size % workers:
        raise UsageError(f"resources.train.workers = {workers}: choose a divisor of training.batch_size = {batch_size}")
    with shared_activations(bundle.activations) as activations:
        _train(bundle, ActivationStore(activations), torch.device(device), split, after_step)


def _train(
    bundle: BundleJob,
    store: ActivationStore,
    device: torch.device,
    split: Split,
    after_step: Callable[[int, dict[str, CellReport]], bool],
) -> None:
    started = time.monotonic()
    workers, batch_size = split.rows, bundle.cells[0].cell.training.batch_size
    rows_per_rank = batch_size // workers.size
    share = slice(workers.rank * rows_per_rank, (workers.rank + 1) * rows_per_rank)
    running = [_resumed(job, store.d, device, split) for job in bundle.cells if not job.step.finished]
    if unusable := _unusable(store):
        for run in running:
            _fail(run, unusable, time.monotonic() - started)
        return
    inputs = _Inputs.of(store, bundle.cells[0].cell.training, device)
    first = min((run.trainer.n_steps for run in running), default=bundle.steps)
    stream = TrainingStream(store, batch_size, bundle.stream_seed, bundle.shuffle_rows, device, inputs.without)
    batches = stream.batches(first)
    waited = 0.0
    for step in range(first, bundle.steps):
        asked = time.monotonic()
        rows = next(batches)
        waited += time.monotonic() - asked
        batch = inputs.scaling(rows[share])
        done = step + 1
        save = done % bundle.checkpoint_every == 0 or done == bundle.steps
        reports: dict[str, CellReport] = {}
        for run in list(running):
            if run.trainer.n_steps > step:
                continue  # it resumed from a newer checkpoint than the others
            try:
                metrics = run.trainer.advance(batch)
                if save:
                    metrics += run.trainer.report()
            except NonFiniteLoss as error:
                running.remove(run)
                _fail(run, _explained(error, store), time.monotonic() - started)
                continue
            if metrics:
                reports[run.job.step.name] = CellReport(metrics[-1], run.trainer.d_sae)
        if (after_step(done, reports) or save) and workers.rank == 0:
            for run in running:
                _save(run)
        if not running:
            break
    del batches, stream  # and the activations that they hold
    if workers.rank == 0:
        _write(running, inputs, started, waited)


def _resumed(job: CellJob, d_in: int, device: torch.device, split: Split) -> _Run:
    trainer = CellTrainer(job.cell, d_in, device, split)
    earlier: list[dict[str, Any]] = []
    checkpoint = newest_checkpoint(job.step.folder / CHECKPOINTS)
    if checkpoint is not None:
        tensors, facts = checkpoint
        trainer.restore(tensors, facts)
        earlier = facts["attempts"]
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    this = {"first_step": trainer.n_steps, "workers": split.rows.size, "shards": split.latents.size, "device": kind}
    return _Run(job, trainer, [*earlier, this])


def _save(run: _Run) -> None:
    """On all ranks that hold a part of it; the first writes."""
    job, trainer, attempts = run
    tensors, facts = trainer.state()
    if tensors:
        save_checkpoint(job.step.folder / CHECKPOINTS, trainer.n_steps, tensors, facts | {"attempts": attempts})


def _fail(run: _Run, reason: str, seconds: float) -> None:
    """On all ranks; the first writes."""
    if run.trainer.split.ranks.rank == 0:
        ran = {"attempts": run.attempts}
        run.job.step.finish(seconds, {"steps": run.trainer.n_steps}, "failed", reason, ran)


def _unusable(store: ActivationStore) -> str | None:
    """Why nothing can be learnt from these activations, and what to do; None if something can."""
    if store.n_rows == 0:
        return "this site has no activations: no image could be read; rejects.parquet of its step says why"
    if store.root_mean_square_norm < torch.finfo(torch.float32).tiny:
        return (
            f"all {store.n_rows:,} activations of this site are 0, so there is nothing to learn; check the weights of "
            "the encoder, or choose another site"
        )
    return None


def _explained(error: SaeRayError, store: ActivationStore) -> str:
    """The reason of a failure; where all activations are equal, that too. Reads no more than it takes to see that."""
    first = None
    for number in store.parts:
        for images in store.pieces(number):
            rows = store.read(number, images)[2]
            first = rows[0] if first is None else first
            if (rows != first).any():
                return str(error)
    return (
        f"all {store.n_rows:,} activations of this site are equal, so that nothing is left for latents to explain: "
        f"{error}"
    )


def _write(running: list[_Run], inputs: _Inputs, started: float, waited: float) -> None:
    """`waited`: seconds of training spent waiting for data."""
    trained = time.monotonic() - started
    kept_out = inputs.kept_out_rows()
    saes, deaths, of = [], [], []
    while running:
        run = running.pop(0)  # frees its moments before the next SAE is made
        try:
            sae, dead = run.trainer.export(inputs.scaling.scale, inputs.scaling.centre), run.trainer.deaths()
        except SaeRayError as error:
            _fail(run, _explained(error, inputs.store), trained)
            continue
        if sae is not None:
            saes.append(calibrated(sae, kept_out) if sae.kind.estimates_threshold and len(kept_out) else sae)
            deaths.append(dead)
            of.append((run.job.step, run.attempts))
    latents = measure_latents(saes, inputs.store)
    for (step, attempts), sae, dead, measured in zip(of, saes, deaths, latents, strict=True):
        save_sae(sae, step.folder)
        save_latents(measured, step.folder)
        counts = {
            "steps": sae.metadata["steps"],
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "mean_over_spread": inputs.location.offset,
            **dead._asdict(),
            "kept_out": len(kept_out),
            "kept_out_l0": len(sae.encode_sparse(kept_out.float()).values) / len(kept_out) if len(kept_out) else None,
            "waiting_for_data": round(waited / trained, 4),
        }
        step.finish(time.monotonic() - started, counts, ran={"attempts": attempts})
