"""The pictures stage: Ray tasks make the thumbnails and heat maps of the report, one sprite per task."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from sae_ray.report.pictures import PicturesJob, Shown, Sprite, finish_pictures, make_sprite, pictures_job
from sae_ray.store.steps import check_shared
from sae_ray.study.config import PicturesResources
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import PicturesPlan

from .cluster import RETRIES, share, take_threads
from .progress import Progress, StageBoard
from .stage import at_work, unfinished


def run(plan: StudyPlan) -> None:
    """Makes the pictures of the study's cells that are not made yet. Failed cells are left out.

    Raises:
        SaeRayError: a cell is not scored, an encoder cannot be loaded, the disk is too full, another driver is at work
            on the same step.
    """
    run_only(plan, plan.pictures)


def run_only(plan: StudyPlan, pictures: PicturesPlan) -> None:
    """As `run`, for some of the cells."""
    todo = unfinished([pictures])
    if todo:
        with at_work(plan.root, "pictures", todo):
            _make(plan, pictures, plan.study.resources.pictures)


def _make(plan: StudyPlan, pictures: PicturesPlan, resources: PicturesResources) -> None:
    import ray

    started = time.monotonic()
    shown = Shown(plan, pictures)
    job, waiting = pictures_job(plan, pictures, shown, shown.heat_cells)
    # Thumbnails alone need no GPU.
    gpus, at_once = share("resources.pictures", resources if job.cells else replace(resources, gpus=0))
    task = ray.remote(num_cpus=resources.cpus, num_gpus=gpus, max_retries=RETRIES)(made)
    shared = ray.put(job)
    total = shown.album.n_pictured
    left = sum(len(sprite.images) for sprite in waiting)
    running: dict[Any, int] = {}
    with Progress("pictures", total, "images", total - left, [pictures.step]) as progress:
        board = progress.board()
        while waiting or running:
            while waiting and len(running) < at_once:
                sprite = waiting.pop(0)
                running[task.remote(shared, sprite, "cuda" if gpus else "cpu", board)] = len(sprite.images)
            finished, _ = ray.wait(list(running), num_returns=1)
            ray.get(finished)
            progress.advance(running.pop(finished[0]))
    finish_pictures(pictures, shown.album, time.monotonic() - started)


def made(job: PicturesJob, sprite: Sprite, device: str, board: StageBoard) -> None:
    """The task."""
    piece = str(sprite.number)
    check_shared(job.step)
    take_threads()
    make_sprite(job, sprite, device, lambda done: board.set(piece, done))
    board.set(piece, 0)  # the driver counts it now


if __name__ == "__main__":
    from .cli import pictures as command

    command()
