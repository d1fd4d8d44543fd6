"""The training stage: Ray Train fits the grid.

Cells that read the same activations are packed into bundles; a bundle is one `TorchTrainer` whose workers read the data
once and step every cell on it. A cell keeps its own optimizer, counters, checkpoints and failure, and is the same SAE
whatever bundle it was trained in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sae_ray.errors import SaeRayError
from sae_ray.sae import Cell, CellTrainer, NonFiniteLoss, evaluate, save_sae
from sae_ray.store.activations import ActivationStore
from sae_ray.store.checkpoints import newest_checkpoint, save_checkpoint
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step, digest, hold
from sae_ray.store.stream import TrainingStream
from sae_ray.study.plan import StudyPlan, TrainPlan

from .cluster import connect, gpus_or_default, n_gpus, require, user_error
from .progress import Board, Progress, say
from .stage import check_disk

if TYPE_CHECKING:
    import torch

CHECKPOINTS = "checkpoints"
ROWS_PER_BATCH = 4096
STEPS_PER_REPORT = 50


def run(plan: StudyPlan) -> None:
    """Trains every SAE of the study that is not there yet.

    A cell whose loss stops being finite is recorded as failed and reported; the others go on.

    Raises:
        SaeRayError: the activations are missing, the disk is too full, a bundle kept losing workers, another driver is
            at work on the same cell.
    """
    todo = [train for train in plan.trains if not train.step.finished]
    if not todo:
        return
    for train in todo:
        for needed in (train.activations, train.heldout):
            if not needed.step.finished:
                raise SaeRayError(f"{needed.step.label} has not been extracted yet; run the extract stage first")
    check_disk(plan.root, "train", sum(train.bytes for train in todo))
    with hold([train.step for train in todo]):
        _fit(plan, todo)


@dataclass(frozen=True)
class CellJob:
    """One SAE and where it is written."""

    step: Step
    cell: Cell


@dataclass(frozen=True)
class BundleJob:
    """What the workers of one bundle need to know."""

    activations: Folder
    heldout: Folder
    cells: tuple[CellJob, ...]
    stream_seed: int
    shuffle_rows: int
    checkpoint_every: int

    @property
    def name(self) -> str:
        """Stable, so that the same bundle is the same run."""
        return f"bundle-{digest([job.step.name for job in self.cells])[:12]}"

    @property
    def steps(self) -> int:
        return self.cells[0].cell.training.steps


def _bundles(plan: StudyPlan, todo: Sequence[TrainPlan]) -> Iterator[BundleJob]:
    resources = plan.study.resources.train
    by_stream: dict[str, list[TrainPlan]] = {}
    for train in todo:
        by_stream.setdefault(train.activations.step.name, []).append(train)
    for trains in by_stream.values():
        for start in range(0, len(trains), resources.cells_per_bundle):
            bundle = trains[start : start + resources.cells_per_bundle]
            yield BundleJob(
                activations=bundle[0].activations.step.folder,
                heldout=bundle[0].heldout.step.folder,
                cells=tuple(CellJob(train.step, train.grid_cell.cell) for train in bundle),
                stream_seed=bundle[0].stream_seed,
                shuffle_rows=plan.study.shuffle_rows,
                checkpoint_every=resources.checkpoint_every,
            )


def _fit(plan: StudyPlan, todo: Sequence[TrainPlan]) -> None:
    connect()
    import ray

    resources = plan.study.resources.train
    gpus = gpus_or_default(resources.gpus)
    require("resources.train", resources.workers, resources.cpus, gpus)
    at_once = resources.bundles or (max(1, int(n_gpus() / (gpus * resources.workers))) if gpus else 1)
    scaling = {
        "workers": resources.workers,
        "cpus": resources.cpus,
        "gpus": gpus,
        "max_failures": resources.max_failures,
    }
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    # The trainer blocks its caller: one task per bundle keeps this process free to show progress and to be interrupted.
    fit = ray.remote(num_cpus=0, max_retries=0)(fit_bundle)

    waiting = list(_bundles(plan, todo))
    running: list[Any] = []
    total = sum(bundle.steps * len(bundle.cells) for bundle in waiting)
    problems: list[Exception] = []
    with Progress(f"train {len(todo)} SAEs", total, "steps") as progress:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(fit.remote(waiting.pop(0), scaling, str(plan.root), board))
            finished, running = ray.wait(running, timeout=1.0)
            done: Any = ray.get(board.total.remote())
            progress.advance(done - progress.done)
            for reference in finished:
                try:
                    ray.get(reference)
                except Exception as error:  # the other bundles go on
                    problems.append(error)
    for train in todo:
        if reason := train.step.failure:
            say(f"{train.grid_cell.name} failed: {reason}")
    for problem in problems[1:]:
        say(f"another bundle failed: {user_error(problem) or problem}")
    if problems:
        known = user_error(problems[0])
        if known is not None:
            raise known from None
        raise problems[0]


def _write_sae(
    job: CellJob, trainer: CellTrainer, scale: float, heldout: ActivationStore, seconds: float, waiting: float
) -> None:
    """`waiting`: the share of the time in which the bundle waited for data."""
    folder = job.step.folder
    try:
        sae = trainer.export(scale)
    except SaeRayError as error:
        _fail(job, trainer, error, seconds)
        return
    fidelity = evaluate(sae, _batches(heldout))
    latents = fidelity.latents()
    columns = {name: getattr(latents, name).numpy() for name in latents._fields}
    save_sae(sae, folder)
    folder.write_parquet("latents.parquet", pa.table({"latent": np.arange(sae.d_sae), **columns}))
    sizes = {"steps": trainer.n_steps, "d_in": sae.d_in, "d_sae": sae.d_sae}
    counts = {**sizes, **fidelity.summary()._asdict(), "waiting_for_data": round(waiting, 4)}
    job.step.finish(seconds, counts)


def _fail(job: CellJob, trainer: CellTrainer, error: SaeRayError, seconds: float) -> None:
    job.step.finish(seconds, {"steps": trainer.n_steps}, "failed", str(error))


def _batches(store: ActivationStore) -> Iterator[torch.Tensor]:
    import torch

    for number in range(len(store.parts)):
        yield from torch.tensor(store.read(number)[2]).float().split(ROWS_PER_BATCH)


def _resumed(job: CellJob, d_in: int, device: torch.device, group: Any) -> CellTrainer:
    trainer = CellTrainer(job.cell, d_in, device, group)
    checkpoint = newest_checkpoint(job.step.folder / CHECKPOINTS)
    if checkpoint is not None:
        trainer.restore(*checkpoint)
    return trainer


def fit_bundle(bundle: BundleJob, scaling: dict[str, Any], root: str, board: Any) -> None:
    """Runs one bundle as a `TorchTrainer`; a lost worker is replaced and goes on from the newest checkpoints."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = {"CPU": scaling["cpus"], "GPU": scaling["gpus"]}
    trainer = TorchTrainer(
        train_bundle,
        train_loop_config={"bundle": bundle, "board": board},
        scaling_config=ScalingConfig(
            num_workers=scaling["workers"], use_gpu=scaling["gpus"] > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=bundle.name,
            storage_path=(Folder(root) / ".ray-train").uri,
            failure_config=FailureConfig(max_failures=scaling["max_failures"]),
        ),
        torch_config=TorchConfig(backend="nccl" if scaling["gpus"] else "gloo"),
    )
    trainer.fit()


def train_bundle(config: dict[str, Any]) -> None:
    """What every worker of a bundle runs."""
    import torch
    from ray import train as ray_train
    from ray.train.torch import get_device

    context = ray_train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    group = torch.distributed.group.WORLD if world > 1 else None
    bundle: BundleJob = config["bundle"]

    def report(steps: int) -> None:
        if rank == 0:
            config["board"].set.remote(bundle.name, steps)

    train_cells(bundle, get_device(), rank, world, group, report)


def train_cells(
    bundle: BundleJob, device: torch.device, rank: int, world: int, group: Any, report: Callable[[int], None]
) -> None:
    """Trains the cells of a bundle on one stream, from whichever checkpoints survived, and writes the SAEs."""

    started = time.monotonic()
    store = ActivationStore(bundle.activations)
    heldout = ActivationStore(bundle.heldout)
    scale = store.root_mean_square_norm
    active = [(job, _resumed(job, store.d, device, group)) for job in bundle.cells if not job.step.finished]
    batch_size = bundle.cells[0].cell.training.batch_size
    share = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
    first = min((trainer.n_steps for _, trainer in active), default=bundle.steps)
    batches = TrainingStream(store, batch_size, bundle.stream_seed, bundle.shuffle_rows, device).batches(first)

    waited = 0.0
    for step in range(first, bundle.steps):
        asked = time.monotonic()
        rows = next(batches)
        waited += time.monotonic() - asked
        batch = rows.float() / scale
        for job, trainer in list(active):
            if trainer.n_steps > step:
                continue  # its checkpoint is newer than that of the others
            try:
                trainer.step(batch[share])
            except NonFiniteLoss as error:
                active.remove((job, trainer))
                if rank == 0:
                    _fail(job, trainer, error, time.monotonic() - started)
        done = step + 1
        if rank == 0 and (done % bundle.checkpoint_every == 0 or done == bundle.steps):
            for job, trainer in active:
                save_checkpoint(job.step.folder / CHECKPOINTS, trainer.n_steps, *trainer.state())
        if done % STEPS_PER_REPORT == 0:
            report(done * len(bundle.cells))
        if not active:
            break

    if rank == 0:
        seconds = time.monotonic() - started
        for job, trainer in active:
            _write_sae(job, trainer, scale, heldout, seconds, waited / seconds)
        report(bundle.steps * len(bundle.cells))


if __name__ == "__main__":
    from .cli import train as command

    command()
