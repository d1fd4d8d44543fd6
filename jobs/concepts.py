"""The stage of concepts: Ray tasks measure what the neurons of every SAE mean, one SAE per task.

A task makes one pass over the held-out images and computes everything from the codes, in an order that its inputs alone
determine. So the result is bit-identical for any number of workers, and what a killed run finished is not repeated.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from sae_ray.concepts.config import Concepts, Patches
from sae_ray.concepts.summary import Cell, comparison_lines, concept_lines
from sae_ray.concepts.tables import ConceptTables
from sae_ray.encoders.sources import named_by
from sae_ray.store.activations import PIECE_BYTES
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step, check_shared
from sae_ray.study.concepts import Asked, asked
from sae_ray.study.plan import ConceptsPlan, StudyPlan
from sae_ray.study.survey import check_files

from .cluster import PROCESS_BYTES, RETRIES, at_most_a_node, share
from .progress import Progress, say
from .score import active_per_token
from .stage import at_work, unfinished

WORKING_BYTES = 2**30
"""Of blocks of neurons and concepts."""


def run(plan: StudyPlan) -> None:
    """Measures the SAEs of the study and the raw neurons that are not measured yet. Failed cells are left out.

    Raises:
        UsageError: the concept file or the vocabulary cannot be read or does not fit the images.
        SaeRayError: activations or SAEs are missing, the disk is too full, another driver is at work on the same step.
    """
    todo = unfinished(plan.concepts)
    if todo:
        with at_work(plan.root, "concepts", todo):
            _measure(plan, todo)


def check(plan: StudyPlan) -> None:
    """Reads the labels and words that unfinished steps need, and says what they cannot measure.

    Raises as `run`; and UsageError if the concept file or the vocabulary has changed since the root was planned.
    """
    check_files(plan.study, plan.survey)
    if unfinished(plan.concepts):
        for note in asked(plan).notes:
            say(f"concepts: {note}")


def cells(plan: StudyPlan) -> list[Cell]:
    """What is measured so far."""
    records = [(one, one.step.record()) for one in plan.concepts]
    return [
        Cell(one.name, one.activations.site.name, one.sae is not None, record["counts"])
        for one, record in records
        if record is not None
    ]


def lines(plan: StudyPlan) -> list[str]:
    """A table for every SAE and for the raw neurons, and one that compares them."""
    found = {one.name: one for one in cells(plan)}
    texts = []
    for one in plan.concepts:
        if one.name in found:
            texts += [*concept_lines(found[one.name], ConceptTables(one.step.folder)), ""]
    return [*texts, *comparison_lines(list(found.values()))]


class Job(NamedTuple):
    """What a task needs to know about one SAE."""

    step: Step
    sae: Folder | None
    activations: Folder
    embeddings: Folder | None
    patches: Patches | None
    counterpart: Folder | None
    settings: Concepts
    seed: int


def _measure(plan: StudyPlan, todo: list[ConceptsPlan]) -> None:
    import ray

    resources = plan.study.resources.concepts
    gpus, at_once = share("resources.concepts", resources)
    given = asked(plan)
    shared = ray.put((given, _embedded(plan, given)))
    memory = at_most_a_node(max(map(_bytes, todo)), resources.cpus, gpus)
    task = ray.remote(num_cpus=resources.cpus, num_gpus=gpus, memory=memory, max_retries=RETRIES)(measured)
    waiting = sorted(todo, key=lambda one: one.neurons, reverse=True)  # so that none starts late and runs alone
    running: list[Any] = []
    total = sum(one.images.n_images for one in todo)
    with Progress(f"concepts of {len(todo)} cells", total, "images", steps=[one.step for one in todo]) as progress:
        board = progress.board()
        while waiting or running:
            while waiting and len(running) < at_once:
                job = _job(waiting.pop(0), plan.study.seed)
                running.append(task.remote(job, shared, "cuda" if gpus else "cpu", board))
            finished, running = ray.wait(running)
            ray.get(finished)


def _job(one: ConceptsPlan, seed: int) -> Job:
    sae, embeddings, counterpart = (
        read and read.step.folder for read in (one.sae, one.embeddings, one.living_counterpart)
    )
    return Job(one.step, sae, one.activations.step.folder, embeddings, one.patches, counterpart, one.settings, seed)


def _embedded(plan: StudyPlan, given: Asked) -> Any:
    """The embeddings of the words; None without any."""
    if given.words is None or plan.naming_space is None:
        return None
    from sae_ray.encoders.text import load_text_encoder

    space = plan.naming_space
    with named_by(space.field, space.info.model):
        encoder = load_text_encoder(space.info.model, space.info.revision)
    return encoder.embed_texts(given.words.words).double().numpy()


def _bytes(one: ConceptsPlan) -> int:
    """Memory of a task, approximately: above all three copies of the codes of all images."""
    tokens = one.rows // max(1, one.images.n_images)
    codes = 36 * one.images.n_images * min(one.neurons, tokens * active_per_token(one))
    weights = one.sae.weight_bytes if one.sae else 0
    return PROCESS_BYTES + WORKING_BYTES + codes + weights + 4 * min(PIECE_BYTES, one.activations.bytes)


def measured(job: Job, shared: tuple[Asked, Any], device: str, board: Any) -> None:
    """The task: measures one SAE and finishes its step."""
    import torch

    from sae_ray.concepts.measuring import measure
    from sae_ray.concepts.word_names import Texts
    from sae_ray.sae import load_sae
    from sae_ray.store import ActivationStore
    from sae_ray.store.copies import shared_activations

    started = time.monotonic()
    check_shared(job.step.folder)
    torch.set_num_threads(1)  # the last bits depend on the number of threads
    (labels, words, _), embeddings = shared
    with shared_activations(job.activations) as place:
        store = ActivationStore(place)
        texts = None
        if words is not None and job.embeddings is not None:
            same = job.embeddings == job.activations
            space = store if same else ActivationStore(job.embeddings)
            texts = Texts.of(words.words, embeddings, space, words.word_of, holds_decoder=same)
        found = measure(
            load_sae(job.sae).to(device) if job.sae else None,
            store,
            labels,
            job.settings,
            texts=texts,
            patches=job.patches,
            counterpart=job.counterpart and _live_rows(job.counterpart),
            seed=job.seed,
            after_images=lambda images: board.set.remote(job.step.name, images),
        )
    found.write(job.step.folder)
    job.step.finish(time.monotonic() - started, found.counts)


def _live_rows(sae: Folder) -> Any:
    """The decoder rows of the latents that fired in training."""
    from sae_ray.sae import load_sae
    from sae_ray.steering.interventions import load_max_token

    return load_sae(sae).W_dec.detach().double().numpy()[load_max_token(sae).numpy() > 0]


if __name__ == "__main__":
    from .cli import concepts as command

    command()
