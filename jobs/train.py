"""The training stage: Ray tasks, or Ray Train, fit the grid.

Cells that read the same activations are packed into bundles (`placement.py`). The worker of a bundle reads the data
once and steps every cell on it (`sae_ray.sae.bundle`). A bundle of one worker is a task, which begins within a second
or two in a process that Ray has at hand. One of several workers is a `TorchTrainer`, which lets them find one another
and starts them together, in processes of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sae_ray.sae import BundleJob, CellReport, train_cells
from sae_ray.sae.weighing import told
from sae_ray.store.files import Folder
from sae_ray.store.steps import check_shared
from sae_ray.study.config import TrainResources
from sae_ray.study.guidance import targets_of
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import TrainPlan
from sae_ray.study.trained import cautions
from sae_ray.study.weights import weights_ratio

from . import score
from .cluster import (
    beside_driver,
    gpus_or_default,
    is_taken_away,
    require,
    slots,
    take_threads,
    user_error,
)
from .metrics import count_failure
from .placement import bundles, memory
from .progress import Progress, StageBoard, pace_of, say
from .stage import Failures, at_work, unfinished
from .tasks import Workers, ended
from .tracking import Trackers, Tracking, tracking_of

if TYPE_CHECKING:
    from sae_ray.sae.targets import Targets

REPORT_SECONDS = 1.0
"""Between what workers tell of their cells."""
STEPS_PER_LOOK = 200
"""After which workers ask whether a node of theirs is about to be taken away: they wait for one another to ask."""
WORTH_ANOTHER_TRY = [OSError, RuntimeError]
"""What disks and devices raise, by torch, which may not come again; what a user has to fix would."""


def run(plan: StudyPlan) -> None:
    """Trains the SAEs of the study that are not trained yet, and before that scores raw neurons that weigh dimensions.

    A cell whose loss stops being finite is recorded as failed and reported; the others go on.

    Raises:
        UsageError: guided SAEs cannot learn what they are told to (`targets_of`), or there is no such tracker
            (`tracking_of`).
        SaeRayError: the activations are missing, the disk is too full, a bundle kept losing workers, another driver is
            at work on the same cell.
    """
    todo = unfinished(plan.trains)
    score.run_only(plan, [train.raw_scores for train in todo if train.raw_scores is not None])
    if todo:
        for caution in cautions(plan.study):
            say(caution)
        with at_work(plan.root, "train", todo) as failures:
            _fit(plan, todo, targets_of(plan, todo, plan.images["train"]), failures)


def check(plan: StudyPlan) -> None:
    """Reads what the unfinished guided SAEs are to learn, for both image sets, and opens the trackers if there are any.

    Raises as `targets_of` and `tracking_of`.
    """
    todo = unfinished(plan.trains)
    if todo:
        tracking_of(plan)
    for images in plan.images.values():
        targets_of(plan, todo, images)


def _fit(plan: StudyPlan, todo: Sequence[TrainPlan], targets: dict[str, Targets], failures: Failures) -> None:
    import ray

    resources = plan.study.resources.train
    gpus = gpus_or_default(resources.gpus)
    least, most = (number * resources.shards for number in resources.workers_span)
    require("resources.train", least, resources.cpus, gpus)
    at_once = resources.bundles or max(1, int(slots(resources.cpus, gpus) / most))
    device = "cuda" if gpus else "cpu"
    waiting = bundles(plan, todo, at_once, device, targets)
    of_step = {train.step.name: train for train in todo}

    def wanted(bundle: BundleJob) -> int:
        trains = [of_step[job.step.name] for job in bundle.cells]
        return memory(trains, bundle.shuffle_rows, device, resources.shards)

    total = sum(bundle.steps * len(bundle.cells) for bundle in waiting)
    problems: list[Exception] = []
    told_early = {train.step.name for train in todo if tell_weights(train)}
    with Progress(f"train {len(todo)} SAEs", total, "steps", steps=[train.step for train in todo]) as progress:
        board = progress.board()
        telling = Telling(board, tracking_of(plan))
        fit = _by_task(plan, gpus, telling) if most == 1 else _by_ray_train(plan, (least, most), gpus, telling)
        workers = Workers(resources.cpus, gpus, least)
        for bundle, finished in ended("train", waiting, at_once, workers, wanted, fit, moves=most == 1):
            try:
                if not ray.get(finished):
                    waiting.insert(0, bundle)
            except Exception as error:  # the other bundles go on
                problems.append(error)
                failures.note([job.step for job in bundle.cells], error)
    for train in todo:
        if reason := train.step.failure:
            count_failure(train.step)
            say(f"{train.grid_cell.name} failed: {reason}")
        elif train.step.name not in told_early:
            tell_weights(train)
    for problem in problems[1:]:
        say(f"another bundle failed: {user_error(problem) or problem}")
    if problems:
        raise problems[0]


def tell_weights(train: TrainPlan) -> bool:
    """Says how much the weights of a cell differ, if it is known."""
    ratio = weights_ratio(train)
    if ratio is not None:
        say(f"{train.grid_cell.name}: {told(ratio)}")
    return ratio is not None


class Telling(NamedTuple):
    """Whom workers tell of their cells."""

    board: StageBoard
    tracking: Tracking


def _by_task(plan: StudyPlan, gpus: float, telling: Telling) -> Callable[[BundleJob, int], Any]:
    """Begins a bundle of one worker with so many bytes; what it returns resolves to whether the bundle is done."""
    import ray

    resources = plan.study.resources.train
    task = ray.remote(
        num_cpus=resources.cpus,
        num_gpus=gpus,
        max_retries=resources.max_failures,
        retry_exceptions=WORTH_ANOTHER_TRY,  # pyright: ignore[reportArgumentType]
    )(fit_bundle)
    return lambda bundle, memory: task.options(memory=memory).remote(bundle, "cuda" if gpus else "cpu", telling)


def fit_bundle(bundle: BundleJob, device: str, telling: Telling) -> bool:
    """The task: returns whether the bundle is done. It is not if the node is about to be taken away: another one is to
    go on from the checkpoints that were just written. Begun again, it resumes from the newest checkpoints.
    """
    check_shared(bundle.cells[0].step.folder)
    take_threads()
    teller = Teller(bundle, telling)
    leaving = False

    def after_step(done: int, reports: dict[str, CellReport]) -> bool:
        nonlocal leaving
        if leaving:
            raise _Leaves
        teller.step(done, reports)
        leaving = done % STEPS_PER_LOOK == 0 and is_taken_away()
        return leaving

    try:
        train_cells(bundle, device, after_step=after_step)
    except _Leaves:
        return False
    finally:
        teller.trackers.close()
    teller.end()
    return True


class _Leaves(Exception):
    """Ends the training of a bundle whose checkpoints have just been written."""


def _by_ray_train(
    plan: StudyPlan, workers: tuple[int, int], gpus: float, telling: Telling
) -> Callable[[BundleJob, int], Any]:
    """As `_by_task`, with at least and at most so many workers."""
    import ray

    # The trainer blocks its caller: one task per bundle keeps this process free to be interrupted. It restarts workers
    # that are lost with their node, so it must not be lost itself.
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=beside_driver())(fit_together)
    resources, root = plan.study.resources.train, plan.root
    return lambda bundle, memory: task.remote(bundle, resources, workers, gpus, memory, root, telling)


def fit_together(
    bundle: BundleJob,
    resources: TrainResources,
    workers: tuple[int, int],
    gpus: float,
    memory: int,
    root: Folder,
    telling: Telling,
) -> bool:
    """Runs one bundle as a `TorchTrainer`; it resumes from the newest checkpoints when a worker is lost.

    Args:
        workers: at least, and at most.
        gpus: of each.
        memory: bytes of each.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    least, most = workers
    trainer = TorchTrainer(
        train_bundle,
        train_loop_config={"bundle": bundle, "sharded": resources.shards > 1, "telling": telling},
        scaling_config=ScalingConfig(
            num_workers=workers if least < most else most,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": resources.cpus, "GPU": gpus, "memory": memory},
        ),
        run_config=RunConfig(
            name=bundle.name,
            storage_path=(root / ".ray-train").uri,
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
    )
    trainer.fit()
    return True


def train_bundle(config: dict[str, Any]) -> None:
    """What every worker of a `TorchTrainer` runs."""
    import torch
    from ray import train as ray_train
    from ray.train.torch import get_device

    from sae_ray.sae.ranks import Ranks, Split

    bundle: BundleJob = config["bundle"]
    check_shared(bundle.cells[0].step.folder)
    context = ray_train.get_context()
    world, rank = context.get_world_size(), context.get_world_rank()
    # Where Ray Train chose a number of workers which does not divide the batch, some of them have nothing to do.
    used = world if config["sharded"] else most_that_divide(bundle.cells[0].cell.training.batch_size, world)
    group: Any = torch.distributed.new_group(range(used)) if world > 1 else None
    if rank >= used:
        return
    ranks = Ranks(group if used > 1 else None)
    split = Split(latents=ranks) if config["sharded"] else Split(rows=ranks)

    teller = Teller(bundle, config["telling"])
    warned = False

    def after_step(done: int, reports: dict[str, CellReport]) -> bool:
        nonlocal warned
        if rank == 0:
            teller.step(done, reports)
        if warned or used < world or done % STEPS_PER_LOOK:
            return False
        warned = ray_train.get_preemption_info() is not None
        return warned

    try:
        train_cells(bundle, get_device(), split, after_step)
    finally:
        teller.trackers.close()  # only the first rank has opened some
    if rank == 0:
        teller.end()


class Teller:
    """Tells the board of the cells of a bundle, now and then, and their trackers of all that their history keeps."""

    def __init__(self, bundle: BundleJob, telling: Telling):
        self.bundle = bundle
        self.board = telling.board
        self.trackers = Trackers(bundle, telling.tracking)
        self.last = time.monotonic()
        self.began: tuple[int, float] | None = None
        """Steps done, and when: the first step is slower than others."""

    def step(self, done: int, reports: dict[str, CellReport]) -> None:
        self.trackers.tell(reports)
        now, steps = time.monotonic(), self.bundle.steps
        self.began = first, began = self.began or (done, now)
        if reports and (now - self.last >= REPORT_SECONDS or done == steps):
            self.last = now
            pace = pace_of(done, steps, "steps", done - first, now - began)
            self._set(done, {name: pace | cell_figures(report) for name, report in reports.items()})

    def end(self) -> None:
        """However many cells failed, or were finished before."""
        self._set(self.bundle.steps, {})

    def _set(self, done: int, cells: dict[str, dict[str, Any]]) -> None:
        self.board.set(self.bundle.name, done * len(self.bundle.cells), cells)


def most_that_divide(batch_size: int, workers: int) -> int:
    """How many of the workers can have equal shares of a batch."""
    return next(number for number in range(workers, 0, -1) if batch_size % number == 0)


def cell_figures(report: CellReport) -> dict[str, Any]:
    """What is shown of a cell beside its pace."""
    metrics = report.metrics
    return {"of": "cell", "loss": metrics.loss, "l0": metrics.l0, "n_dead": metrics.n_dead, "d_sae": report.d_sae}


if __name__ == "__main__":
    from .cli import train as command

    command()
