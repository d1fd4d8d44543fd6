"""The evaluation stage: Ray tasks measure every SAE on held-out activations, one SAE per task."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sae_ray.store.activations import PIECE_BYTES
from sae_ray.store.steps import Step, check_shared
from sae_ray.study.guidance import targets_of
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import EvaluatePlan

from .cluster import PROCESS_BYTES, RETRIES, at_most_a_node, share, take_threads
from .progress import Progress, StageBoard
from .stage import at_work, unfinished

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
    sizes = (one.sae.weight_bytes + 4 * min(PIECE_BYTES, one.activations.bytes) for one in todo)
    memory = at_most_a_node(PROCESS_BYTES + max(sizes), resources.cpus, gpus)
    task = ray.remote(num_cpus=resources.cpus, num_gpus=gpus, memory=memory, max_retries=RETRIES)(evaluated)
    targets = targets_of(plan, (one.sae for one in todo), plan.images["heldout"])
    shared: dict[str, Any] = {source: ray.put(found) for source, found in targets.items()}
    waiting, running = list(todo), []
    total = sum(one.rows for one in todo)
    with Progress(f"evaluate {len(todo)} SAEs", total, "activations", steps=[one.step for one in todo]) as progress:
        board = progress.board()
        while waiting or running:
            while waiting and len(running) < at_once:
                one = waiting.pop(0)
                folders = (one.sae.step.folder, one.activations.step.folder)
                cell = one.sae.grid_cell.cell
                learnt = shared[cell.settings.concepts] if cell.guided else None
                running.append(task.remote(*folders, learnt, one.step, "cuda" if gpus else "cpu", board))
            finished, running = ray.wait(running)
            ray.get(finished)


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
