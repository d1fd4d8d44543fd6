"""Which SAEs are trained together, and in what order: the bundles of the training stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from sae_ray.sae import BundleJob, CellJob
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import TrainPlan
from sae_ray.study.weights import significance

from .cluster import PROCESS_BYTES

if TYPE_CHECKING:
    from sae_ray.sae.targets import Targets

ALONE = 4096 * 2**26
"""Multiply-adds per step of a cell that hides the reading of its batches: 65,536 latents of 1,024 dimensions."""


class Pace(NamedTuple):
    """What a device does at its pace, in multiply-adds."""

    step: float
    """In the time that a step takes besides its products."""
    worker: float
    """In the time that starting a worker takes: less work is not worth one of its own."""


PACES = {"cpu": Pace(step=4e7, worker=2e10), "cuda": Pace(step=1e11, worker=2e14)}
"""From steps of small and of large widths, on a core and on an H200 (`docs/speed.md`). A worker takes two seconds to
start, and where it has a GPU about ten."""


def bundles(
    plan: StudyPlan,
    todo: Sequence[TrainPlan],
    slots: int,
    device: str,
    targets: Mapping[str, Targets] = MappingProxyType({}),
) -> list[BundleJob]:
    """Cells that read the same activations in the same order, packed so that the bundles keep `slots` busy; the most
    work comes first.

    A bundle holds at most `resources.train.cells_per_bundle` cells, and several cells only if their work is at most
    half a fair share of all work, so that the last bundles end at about the same time though work is only estimated;
    and not more than that of one cell which hides the reading.

    Args:
        slots: how many bundles are trained at once.
        device: `cpu` or `cuda`.
        targets: of `targets_of`, for guided cells.
    """
    resources, pace = plan.study.resources.train, PACES[device]
    parts = 2 * slots if slots > 1 else 1
    share = max(sum(work(train, pace) for train in todo) / parts, pace.worker)
    packed: list[tuple[float, list[TrainPlan]]] = []
    # The sort is stable: cells of equal work stay in the order of the study.
    for train in sorted(todo, key=lambda train: work(train, pace), reverse=True):
        own = work(train, pace)
        limit = min(share, train.grid_cell.cell.training.steps * (ALONE + pace.step))
        for place, (load, bundle) in enumerate(packed):
            same = stream(bundle[0]) == stream(train)
            if same and len(bundle) < resources.cells_per_bundle and load + own <= limit:
                packed[place] = load + own, [*bundle, train]
                break
        else:
            packed.append((own, [train]))
    packed.sort(key=lambda one: one[0], reverse=True)
    return [
        BundleJob(
            activations=bundle[0].activations.step.folder,
            cells=tuple(cell_job(train, targets) for train in bundle),
            stream_seed=bundle[0].stream_seed,
            shuffle_rows=plan.study.shuffle_rows,
            checkpoint_every=resources.checkpoint_every,
        )
        for _, bundle in packed
    ]


def cell_job(train: TrainPlan, targets: Mapping[str, Targets]) -> CellJob:
    """With what the driver reads for it. Raises as `significance` does."""
    cell, found = train.grid_cell.cell, significance(train)
    return CellJob(
        train.step,
        cell,
        targets=targets[cell.settings.concepts] if cell.guided else None,
        significance=None if found is None else tuple(found.tolist()),
        init_digest=train.step.config["init"],
        embeddings=train.embeddings and train.embeddings.step.folder,
    )


def memory(trains: Sequence[TrainPlan], shuffle_rows: int, device: str = "cpu", shards: int = 1) -> int:
    """Bytes of the host's memory that a worker takes which trains these cells as one bundle, approximately.

    Cells are stepped, restored and saved one after the other. A checkpoint is whole in memory when it is read, and when
    it is written from a GPU or from several shards.

    Args:
        device: `cpu` or `cuda`.
        shards: workers that share the latents. Each has all activations.
    """
    activations = trains[0].activations
    rows = min(1.0, shuffle_rows / max(1, activations.rows)) * activations.bytes
    judged = {train.embeddings.step.name: train.embeddings.bytes for train in trains if train.embeddings is not None}
    held = 0 if device == "cuda" else sum(train.held_bytes for train in trains) / shards
    step = 0 if device == "cuda" else max(train.step_bytes for train in trains) / shards
    checkpoint = max(train.held_bytes for train in trains)
    return int(PROCESS_BYTES + rows + sum(judged.values()) + held + max(step, checkpoint))


def stream(train: TrainPlan) -> tuple[str, int]:
    """What a cell reads: the activations, and the seed of their order."""
    return train.activations.step.name, train.stream_seed


def work(train: TrainPlan, pace: Pace) -> float:
    """Multiply-adds, approximately."""
    return train.rows * train.activations.width * train.d_sae + train.grid_cell.cell.training.steps * pace.step
