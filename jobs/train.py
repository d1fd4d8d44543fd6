"""The training stage: Ray Train fits the grid.

Cells that read the same activations are packed into bundles (`sae_ray.sae.bundle`). A bundle is one `TorchTrainer`,
whose workers read the data once and step every cell on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sae_ray.sae import BundleJob, CellJob, train_cells
from sae_ray.store.files import Folder
from sae_ray.study.plan import StudyPlan, TrainPlan

from .cluster import beside_driver, gpus_or_default, n_gpus, require, user_error
from .progress import Progress, say
from .stage import at_work, unfinished

STEPS_PER_REPORT = 50


def run(plan: StudyPlan) -> None:
    """Trains the SAEs of the study that are not trained yet.

    A cell whose loss stops being finite is recorded as failed and reported; the others go on.

    Raises:
        SaeRayError: the activations are missing, the disk is too full, a bundle kept losing workers, another driver is
            at work on the same cell.
    """
    todo = unfinished(plan.trains)
    if todo:
        with at_work(plan.root, "train", todo):
            _fit(plan, todo)


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
                cells=tuple(CellJob(train.step, train.grid_cell.cell) for train in bundle),
                stream_seed=bundle[0].stream_seed,
                shuffle_rows=plan.study.shuffle_rows,
                checkpoint_every=resources.checkpoint_every,
            )


def _fit(plan: StudyPlan, todo: Sequence[TrainPlan]) -> None:
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
    # The trainer blocks its caller: one task per bundle keeps this process free to be interrupted. It restarts workers
    # that are lost with their node, so it must not be lost itself.
    fit = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=beside_driver())(fit_bundle)

    waiting = list(_bundles(plan, todo))
    running: list[Any] = []
    total = sum(bundle.steps * len(bundle.cells) for bundle in waiting)
    problems: list[Exception] = []
    with Progress(f"train {len(todo)} SAEs", total, "steps") as progress:
        board = progress.board()
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(fit.remote(waiting.pop(0), scaling, plan.root, board))
            finished, running = ray.wait(running)
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
        raise problems[0]


def fit_bundle(bundle: BundleJob, scaling: dict[str, Any], root: Folder, board: Any) -> None:
    """Runs one bundle as a `TorchTrainer`; it resumes from the newest checkpoints when a worker is lost."""
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
            storage_path=(root / ".ray-train").uri,
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
    group = torch.distributed.group.WORLD if context.get_world_size() > 1 else None
    bundle: BundleJob = config["bundle"]

    def report(steps: int) -> None:
        if context.get_world_rank() == 0:
            config["board"].set.remote(bundle.name, steps * len(bundle.cells))

    def after_step(done: int) -> None:
        if done % STEPS_PER_REPORT == 0:
            report(done)

    train_cells(bundle, get_device(), group, after_step)
    report(bundle.steps)


if __name__ == "__main__":
    from .cli import train as command

    command()
