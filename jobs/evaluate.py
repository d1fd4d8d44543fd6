"""The evaluation stage: Ray tasks measure every SAE on held-out activations, one SAE per task."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sae_ray.store.activations import PIECE_BYTES
from sae_ray.store.steps import Step, check_shared
from sae_ray.study.guidance import targets_of
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import EvaluatePlan

from .cluster import PROCESS_BYTES, RETRIES, share, take_threads
from .progress import Progress, StageBoard
from .stage import at_work, unfinished
from .tasks import Workers, ended

if TYPE_CHECKING:
    from sae_ray.sae.targets import Targets
    from sae_ray.store.files import Folder


def run(plan: StudyPlan) -> None:
    """Measures the fidelity of every SAE of the study that is not evaluated yet, and how its latents fire.

    Failed cells are left out.

    Raises:
        UsageError: what guided SAEs learn cannot be read for the held-out images (`targets_of`).
        SaeRayError: activations or SAEs are missing, the disk is too full, another driver is at work on the same step.
    """
    todo = unfinished(plan.evaluations)
    if todo:
        with at_work(plan.root, "evaluate", todo):
            _evaluate(plan, todo)


def _evaluate(plan: StudyPlan, todo: list[EvaluatePlan]) -> None:
    import ray

    resources = plan.study.resources.evaluate
    gpus, at_once = share("resources.evaluate", resources)

    def memory(one: EvaluatePlan) -> int:
        return memory_of(one.sae.weight_bytes, one.activations.bytes)

    task = ray.remote(num_cpus=resources.cpus, num_gpus=gpus, max_retries=RETRIES)(evaluated)
    targets = targets_of(plan, (one.sae for one in todo), plan.images["heldout"])
    shared: dict[str, Any] = {source: ray.put(found) for source, found in targets.items()}
    total = sum(one.rows for one in todo)
    with Progress(f"evaluate {len(todo)} SAEs", total, "activations", steps=[one.step for one in todo]) as progress:
        board = progress.board()

        def begin(one: EvaluatePlan, asked: int) -> Any:
            folders = (one.sae.step.folder, one.activations.step.folder)
            cell = one.sae.grid_cell.cell
            learnt = shared[cell.settings.concepts] if cell.guided else None
            device = "cuda" if gpus else "cpu"
            return task.options(memory=asked).remote(*folders, learnt, one.step, device, board)

        workers = Workers(resources.cpus, gpus)
        for _, finished in ended("evaluate", list(todo), at_once, workers, memory, begin):
            ray.get(finished)


def memory_of(weights: int, activations: int) -> int:
    """Bytes of a task, by those of its SAE's weights, which are there twice while they are loaded, and of all
    activations: pieces of them, in the stored dtype and in float32."""
    return PROCESS_BYTES + weights + max(weights, 4 * min(PIECE_BYTES, activations))


def evaluated(
    sae: Folder, activations: Folder, targets: Targets | None, step: Step, device: str, board: StageBoard
) -> None:
    """The task: measures one SAE and finishes its step. `targets`: of the images, for a guided SAE."""
    from sae_ray.sae import load_sae, save_latents
    from sae_ray.sae.guidance import ConceptSums
    from sae_ray.sae.metrics import evaluate_store
    from sae_ray.store import ActivationStore
    from sae_ray.store.copies import shared_activations

    started = time.monotonic()
    check_shared(step.folder)
    take_threads()
    opened = load_sae(sae).to(device)
    concepts = ConceptSums(opened, targets) if targets is not None else None
    with shared_activations(activations) as place:
        fidelity = evaluate_store(
            opened,
            ActivationStore(place),
            lambda rows: board.set(step.name, rows),
            concepts.update if concepts else None,
        )
    save_latents(fidelity.latents(), step.folder, opened.concepts)
    learnt = concepts.summary() if concepts else {}
    step.finish(time.monotonic() - started, fidelity.summary()._asdict() | learnt)


if __name__ == "__main__":
    from .cli import evaluate as command

    command()
