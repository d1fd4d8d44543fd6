"""Training a bundle: cells that read the same activations share one stream and resume from their newest checkpoints.

A cell keeps its own optimizer, counters, checkpoints and failure. Its SAE does not depend on the bundle nor, up to
rounding, on the number of ranks and on what they split.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.sae.calibration import calibrated
from sae_ray.sae.formats import load_sae, save_latents, save_sae
from sae_ray.sae.history import HISTORY_FILE, History
from sae_ray.sae.metrics import measure_latents
from sae_ray.sae.monosemanticity import embeddings_by_image
from sae_ray.sae.product import release
from sae_ray.sae.ranks import ALONE
from sae_ray.sae.scaling import AS_THEY_ARE, Scaling
from sae_ray.sae.second_moment import SecondMoment
from sae_ray.sae.starting import start_from, start_whitened, weights_digest
from sae_ray.sae.training import CellTrainer, NonFiniteLoss, StepMetrics
from sae_ray.sae.weighing import Weighing, by_variance
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
    from sae_ray.sae.model import SAE
    from sae_ray.sae.ranks import Split
    from sae_ray.sae.targets import Targets
    from sae_ray.store.files import Folder
    from sae_ray.store.sample import Location
    from sae_ray.store.steps import Step

CHECKPOINTS = "checkpoints"
_HISTORY = "history"
"""Beside the trainer's tensors in a checkpoint."""


@dataclass(frozen=True)
class CellJob:
    """One SAE and where it is written."""

    step: Step
    cell: Cell
    targets: Targets | None = None
    """Of the images of the activations; for guided cells."""
    significance: tuple[float, ...] | None = None
    """Of the dimensions, for a cell with weights, unless they are measured on the activations."""
    init_digest: str | None = None
    """`weights_digest` of the SAE that `cell.training.init` names."""
    embeddings: Folder | None = None
    """The judge's, of the images of the activations, for a cell whose goal is MonoSemanticity."""


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
    kept: list[StepMetrics]
    """Those that its history kept since the last report."""


class _Run(NamedTuple):
    job: CellJob
    trainer: CellTrainer
    attempts: list[dict[str, Any]]
    """First step, workers, shards and device of every attempt; this attempt is the last."""
    targets: Targets | None
    """On the device."""
    weighing: Weighing | None
    """None where all dimensions count alike."""
    embeddings: Float[Tensor, "images d"] | None
    """The judge's, by `image_index`, on the device; None where they are of no use."""
    history: History


def train_cells(
    bundle: BundleJob,
    device: torch.device | str = "cpu",
    split: Split = ALONE,
    after_step: Callable[[int, dict[str, CellReport]], bool] = lambda done, reports: False,
) -> None:
    """Trains the cells of a bundle that are not finished and writes each one's step.

    A step holds the SAE, `latents.parquet` (statistics of its latents on the training activations, see
    `measure_latents`), `metrics.parquet` (see `History`), why latents are dead, and a record of the attempts that led
    to it. A cell whose loss stops being finite is recorded as failed; the others continue. All cells fail if there are
    no activations, or all are 0.

    Args:
        split: every rank of it makes this call, the first one writes. Another attempt may have another.
        after_step: called on every rank after each step, with the number of steps done and a report of every cell that
            made this step and whose metrics are known (on a GPU not after each step), by the name of the cell's own
            step. Says whether checkpoints are to be written at once, on all ranks alike.

    Raises:
        UsageError: the batch or the latents of a cell cannot be split over the ranks.
        SaeRayError: the activations are not finished, or torn; the SAE to start from has changed.
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
    given = _Given(store, bundle.cells[0].cell.training, device)
    running = [_resumed(job, given, device, split) for job in bundle.cells if not job.step.finished]
    if unusable := _unusable(store):
        for run in running:
            _fail(run, unusable, time.monotonic() - started)
        return
    first = min((run.trainer.n_steps for run in running), default=bundle.steps)
    stream = TrainingStream(store, batch_size, bundle.stream_seed, bundle.shuffle_rows, device, given.without)
    with_images = any(run.targets or run.embeddings is not None for run in running)
    batches = stream.batches_with_images(first) if with_images else ((rows, None) for rows in stream.batches(first))
    waited = 0.0
    for step in range(first, bundle.steps):
        asked = time.monotonic()
        rows, images = next(batches)
        waited += time.monotonic() - asked
        batch = given.scaling(rows[share])
        done = step + 1
        save = done % bundle.checkpoint_every == 0 or done == bundle.steps
        reports: dict[str, CellReport] = {}
        for run in list(running):
            if run.trainer.n_steps > step:
                continue  # it resumed from a newer checkpoint than the others
            try:
                own = batch if run.trainer.architecture.scales_inputs else rows[share].float()
                targets = embeddings = None
                if images is not None:
                    targets = run.targets and run.targets.rows(images[share])
                    if run.embeddings is not None:
                        embeddings = run.embeddings.index_select(0, images[share])
                metrics = run.trainer.advance(own, targets, embeddings)
                if save:
                    metrics += run.trainer.report()
            except NonFiniteLoss as error:
                running.remove(run)
                _fail(run, _explained(error, store), time.monotonic() - started)
                continue
            if metrics:
                reports[run.job.step.name] = CellReport(metrics[-1], run.trainer.d_sae, run.history.add(metrics))
        if (after_step(done, reports) or save) and workers.rank == 0:
            for run in running:
                _save(run)
        if not running:
            break
    del batches, stream  # and the activations that they hold
    release()  # the process may serve others next
    if workers.rank == 0:
        _write(running, given, started, waited)


class _Given:
    """What the cells of a bundle are given; each is read once."""

    def __init__(self, store: ActivationStore, training: TrainingConfig, device: torch.device):
        self.store, self.training, self.device = store, training, device
        self.sample = Sample(store)
        self.without = self.sample if training.threshold == "calibrated" else None
        """Says which activations are kept out of training; None if none are."""
        self.moment = cache(lambda: SecondMoment.of_store(store))
        self.embeddings = cache(lambda folder: embeddings_by_image(ActivationStore(folder), store).to(device))

    @cached_property
    def location(self) -> Location:
        return self.sample.location()

    @cached_property
    def scaling(self) -> Scaling:
        """What training makes of the activations, for architectures that take them so."""
        return Scaling.of(self.store, self.location, self.training, self.device)

    def scaling_for(self, trainer: CellTrainer) -> Scaling:
        return self.scaling if trainer.architecture.scales_inputs else AS_THEY_ARE

    def kept_out_rows(self) -> Float[Tensor, "n d_in"]:
        """In the stored dtype."""
        return torch.from_numpy(self.without.kept_out_rows()) if self.without else torch.empty(0, self.store.d)


def _resumed(job: CellJob, given: _Given, device: torch.device, split: Split) -> _Run:
    store, concepts = given.store, job.targets.concepts if job.targets else ()
    weighing = _weighing(job, given) if job.cell.weighted else None
    # Sums on another machine may differ in their last bits, but ranks must agree.
    gamma = weighing and split.ranks.smallest(torch.from_numpy(weighing.gamma).to(device, torch.float32))
    trainer = CellTrainer(job.cell, store.d, device, split, concepts, gamma)
    earlier: list[dict[str, Any]] = []
    past = None
    checkpoint = newest_checkpoint(job.step.folder / CHECKPOINTS)
    if checkpoint is not None:
        tensors, facts = checkpoint
        past = tensors.pop(_HISTORY, None)
        trainer.restore(tensors, facts)
        earlier = facts["attempts"]
    elif job.cell.training.init is not None:
        start_from(trainer, _initial(job, concepts), *given.scaling_for(trainer))
    elif job.cell.kind.starts_whitened(job.cell.settings):
        start_whitened(trainer, given.moment(), centred=given.scaling_for(trainer).centre is not None)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    this = {"first_step": trainer.n_steps, "workers": split.rows.size, "shards": split.latents.size, "device": kind}
    targets = job.targets.to(device) if job.targets else None
    history = History(job.cell.training.steps, past)
    embeddings = job.embeddings and given.embeddings(job.embeddings)
    return _Run(job, trainer, [*earlier, this], targets, weighing, embeddings, history)


def _weighing(job: CellJob, given: _Given) -> Weighing:
    if job.significance is not None:
        return Weighing.of(np.array(job.significance), job.cell.alpha)
    return Weighing.of(by_variance(job.cell.weights, given.moment().variances), job.cell.alpha)


def _initial(job: CellJob, concepts: tuple[str, ...]) -> SAE:
    path = job.cell.training.init
    assert path is not None, "it is asked for"
    sae = load_sae(path)
    if weights_digest(sae) != job.init_digest:
        raise SaeRayError(
            f"training.init = {path!r}: this SAE has changed since the study was planned, or is another one on this "
            "node; run the same command again"
        )
    if sae.concepts != concepts:
        raise SaeRayError(
            f"training.init = {path!r}: its first latents stand for {list(sae.concepts)}, but {job.step.label} is to "
            f"learn {list(concepts)}; start from an SAE of the same concepts"
        )
    return sae


def _save(run: _Run) -> None:
    """On all ranks that hold a part of it; the first writes."""
    job, trainer, attempts, *_ = run
    tensors, facts = trainer.state(copied=False)
    if tensors:
        tensors[_HISTORY] = run.history.tensor()
        save_checkpoint(job.step.folder / CHECKPOINTS, trainer.n_steps, tensors, facts | {"attempts": attempts})


def _fail(run: _Run, reason: str, seconds: float) -> None:
    """On all ranks; the first writes."""
    if run.trainer.split.ranks.rank == 0:
        ran = {"attempts": run.attempts}
        run.job.step.folder.write_parquet(HISTORY_FILE, run.history.table())
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


def _write(running: list[_Run], given: _Given, started: float, waited: float) -> None:
    """`waited`: seconds of training spent waiting for data."""
    trained = time.monotonic() - started
    kept_out, saes = given.kept_out_rows(), []
    while running:
        run = running.pop(0)  # frees its moments before the next SAE is made
        try:
            scaling = given.scaling_for(run.trainer)
            sae, dead = run.trainer.export(scaling.scale, scaling.centre), run.trainer.deaths()
        except SaeRayError as error:
            _fail(run, _explained(error, given.store), trained)
            continue
        if sae is not None:
            if sae.kind.estimates_threshold and len(kept_out):
                sae = calibrated(sae, kept_out)
            saes.append((run.job.step, run.attempts, run.history, run.weighing, dead, sae))
    measured = measure_latents([sae for *_, sae in saes], given.store)
    for (step, attempts, history, weighing, dead, sae), latents in zip(saes, measured, strict=True):
        step.folder.write_parquet(HISTORY_FILE, history.table())
        save_sae(sae, step.folder)
        save_latents(latents, step.folder, sae.concepts)
        counts = {
            "steps": sae.metadata["steps"],
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "mean_over_spread": given.location.offset,
            **dead._asdict(),
            "kept_out": len(kept_out),
            "kept_out_l0": len(sae.encode_sparse(kept_out.float()).values) / len(kept_out) if len(kept_out) else None,
            "waiting_for_data": round(waited / trained, 4),
        }
        if weighing is not None:
            weighing.write(step.folder)
            counts["gamma_ratio"] = weighing.ratio
        step.finish(time.monotonic() - started, counts, ran={"attempts": attempts})
