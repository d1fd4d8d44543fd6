"""The stage of concepts: Ray tasks measure what the neurons of every SAE mean, one SAE per task.

A task makes one pass over the held-out images and computes everything from the codes, in an order that its inputs alone
determine. So the result is bit-identical for any number of workers, and what a killed run finished is not repeated.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from sae_ray.concepts.config import Concepts, Patches
from sae_ray.concepts.summary import Cell, comparison_lines, concept_lines
from sae_ray.concepts.tables import ConceptTables
from sae_ray.encoders.sites import Site
from sae_ray.encoders.sources import named_by
from sae_ray.images.rendering import Rendering
from sae_ray.store.activations import PIECE_BYTES
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step, check_shared
from sae_ray.store.tables import StoredTable
from sae_ray.study.concepts import Asked, asked
from sae_ray.study.config import ExtractResources
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import ConceptsPlan
from sae_ray.study.survey import check_files

from .cluster import PROCESS_BYTES, RETRIES, share
from .encoding import EncoderJob, job_of, preparation
from .extract import encoder_bytes
from .progress import Progress, StageBoard, say
from .score import active_per_token
from .stage import at_work, unfinished
from .tasks import Workers, ended

if TYPE_CHECKING:
    from sae_ray.sae import SAE
    from sae_ray.steering.accuracy import ByName
    from sae_ray.store import ActivationStore

WORKING_BYTES = 2**30
"""Of blocks of neurons and concepts."""
PROMPT = "a photo of a {}"
"""What the name of a class is put into, to classify images by its embedding."""


def run(plan: StudyPlan) -> None:
    """Measures the SAEs of the study and the raw neurons that are not measured yet. Failed cells are left out.

    Raises:
        UsageError: the concept file, the vocabulary or the taxonomy cannot be read or does not fit the images.
        SaeRayError: activations or SAEs are missing, the disk is too full, another driver is at work on the same step.
    """
    todo = unfinished(plan.concepts)
    if todo:
        with at_work(plan.root, "concepts", todo):
            _measure(plan, todo)


def check(plan: StudyPlan) -> None:
    """Reads the labels and words that unfinished steps need, and says what they cannot measure.

    Raises as `run`; and UsageError if one of these files has changed since the root was planned.
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


class Splicing(NamedTuple):
    """Where the reconstructions of an SAE are put, and what is read for it."""

    site: Site
    """That it was trained on."""
    readout: Site
    is_zero_shot: bool
    trained_on: Folder
    """Activations."""
    images: Folder
    manifest: StoredTable
    rendering: Rendering
    encoder: EncoderJob


class Job(NamedTuple):
    """What a task needs to know about one SAE."""

    step: Step
    sae: Folder | None
    activations: Folder
    embeddings: Folder | None
    patches: Patches | None
    counterpart: Folder | None
    group_sizes: list[int]
    splicing: Splicing | None
    settings: Concepts
    seed: int


class Shared(NamedTuple):
    """What all tasks read."""

    given: Asked
    words: Any
    """Embeddings of the words; None without any."""
    by_name: ByName | None
    """What images are classified by; None if the encoder embeds no texts or classes have no names."""


def _measure(plan: StudyPlan, todo: list[ConceptsPlan]) -> None:
    import ray

    resources = plan.study.resources.concepts
    gpus, at_once = share("resources.concepts", resources)
    given = asked(plan)
    shared = ray.put(Shared(given, _embedded(plan, given), _by_name(plan, given)))
    task = ray.remote(num_cpus=resources.cpus, num_gpus=gpus, max_retries=RETRIES)(measured)
    waiting = sorted(todo, key=lambda one: one.neurons, reverse=True)  # so that none starts late and runs alone
    total = sum(one.images.n_images * (2 if _spliced(one, given) else 1) for one in todo)
    with Progress(f"concepts of {len(todo)} cells", total, "images", steps=[one.step for one in todo]) as progress:
        board = progress.board()

        def begin(one: ConceptsPlan, memory: int) -> Any:
            job, device = _job(one, given, plan.study.seed), "cuda" if gpus else "cpu"
            return task.options(memory=memory).remote(job, shared, device, board)

        workers = Workers(resources.cpus, gpus)
        for _, finished in ended("concepts", waiting, at_once, workers, lambda one: _bytes(one, gpus), begin):
            ray.get(finished)


def _spliced(one: ConceptsPlan, given: Asked) -> bool:
    return one.readout is not None and given.classes is not None


def _job(one: ConceptsPlan, given: Asked, seed: int) -> Job:
    sae, embeddings, counterpart = (
        read and read.step.folder for read in (one.sae, one.embeddings, one.living_counterpart)
    )
    activations, patches, sizes = one.activations.step.folder, one.patches, one.group_sizes
    splicing = _splicing(one) if _spliced(one, given) else None
    return Job(one.step, sae, activations, embeddings, patches, counterpart, sizes, splicing, one.settings, seed)


def _splicing(one: ConceptsPlan) -> Splicing:
    assert one.sae is not None, "raw neurons have no reconstruction"
    assert one.readout is not None, "it was asked for"
    images, trained_on = one.images, one.sae.activations.step.folder
    manifest = StoredTable(images.step.folder, "manifest.parquet")
    site, encoder = one.sae.grid_cell.site, job_of(one.activations)
    return Splicing(site, one.readout, one.is_zero_shot, trained_on, images.folder, manifest, images.rendering, encoder)


def _embedded(plan: StudyPlan, given: Asked) -> Any:
    """The embeddings of the words; None without any."""
    if given.words is None or plan.naming_space is None:
        return None
    from sae_ray.encoders.text import load_text_encoder

    space = plan.naming_space
    with named_by(space.field, space.info.model):
        encoder = load_text_encoder(space.info.model, space.info.revision)
    return encoder.embed_texts(given.words.words).double().numpy()


def _by_name(plan: StudyPlan, given: Asked) -> ByName | None:
    if given.classes is None or not any(one.is_zero_shot for one in plan.concepts):
        return None
    worded = [place for place, word in enumerate(given.classes.words) if word is not None]
    if len(worded) < 2:
        return None
    import numpy as np

    from sae_ray.encoders.text import load_text_encoder
    from sae_ray.steering.accuracy import ByName

    place = np.full(len(given.classes.words) + 1, -1)  # the last one is that of -1
    place[worded] = np.arange(len(worded))
    with named_by("encoder.model", plan.encoder.model):
        encoder = load_text_encoder(plan.encoder.model, plan.encoder.revision)
    texts = encoder.embed_texts([PROMPT.format(given.classes.words[one]) for one in worded])
    return ByName(place[given.classes.of_image], texts.numpy())


def _bytes(one: ConceptsPlan, gpus: float) -> int:
    """Memory of a task, approximately: above all three copies of the codes of all images."""
    tokens = one.rows // max(1, one.images.n_images)
    codes = 36 * one.images.n_images * min(one.neurons, tokens * active_per_token(one))
    weights = one.sae.weight_bytes if one.sae else 0
    process = (
        PROCESS_BYTES
        if one.readout is None
        else encoder_bytes([one.activations.info], ExtractResources.batch_size, gpus)
    )
    return process + WORKING_BYTES + codes + weights + 4 * min(PIECE_BYTES, one.activations.bytes)


def measured(job: Job, shared: Shared, device: str, board: StageBoard) -> None:
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
    words = shared.given.words
    sae = load_sae(job.sae).to(device) if job.sae else None

    def tell(images: int) -> None:
        board.set(job.step.name, images)

    with shared_activations(job.activations) as place:
        store = ActivationStore(place)
        texts = None
        if words is not None and job.embeddings is not None:
            same = job.embeddings == job.activations
            space = store if same else ActivationStore(job.embeddings)
            texts = Texts.of(words.words, shared.words, space, words.word_of, holds_decoder=same)
        found = measure(
            sae,
            store,
            shared.given.labels,
            job.settings,
            texts=texts,
            patches=job.patches,
            counterpart=job.counterpart and _live_rows(job.counterpart),
            paths=shared.given.paths,
            group_sizes=job.group_sizes,
            seed=job.seed,
            after_images=tell,
        )
        if sae is not None and job.splicing is not None:
            done = store.n_images
            found.counts |= _recovered(sae, store, job.splicing, shared, job.seed, lambda images: tell(done + images))
    found.write(job.step.folder)
    job.step.finish(time.monotonic() - started, found.counts)


def _recovered(
    sae: SAE, store: ActivationStore, splicing: Splicing, shared: Shared, seed: int, after_images: Callable[[int], None]
) -> dict[str, Any]:
    """The figures of the accuracy with the reconstruction in place; none if there are no two classes to tell apart."""
    from sae_ray.encoders import load_encoder
    from sae_ray.steering.accuracy import encoded_batches, mean_activation, recovered, stored_batches
    from sae_ray.store import ActivationStore

    site, readout, job = splicing.site, splicing.readout, splicing.encoder
    classes = shared.given.classes
    assert classes is not None, "there are some if this was asked for"
    if site == readout:
        batches = stored_batches(store, sae.device)
    else:
        with named_by(job.field, job.model):
            encoder, prepared = load_encoder(job.model, job.revision, str(sae.device), job.dtype), preparation(job)
        ids = splicing.manifest.read()["image_id"].to_pylist()
        batches = encoded_batches(encoder, prepared, splicing.images, ids, splicing.rendering, site, readout)
    mean = mean_activation(ActivationStore(splicing.trained_on)).to(sae.device)
    by_name = shared.by_name if splicing.is_zero_shot else None
    found = recovered(sae, mean, batches, classes.of_image, by_name, seed=seed, after_images=after_images)
    return {} if found is None else found.counts


def _live_rows(sae: Folder) -> Any:
    """The decoder rows of the latents that fired in training."""
    from sae_ray.sae import load_sae
    from sae_ray.steering.interventions import load_max_token

    return load_sae(sae).W_dec.detach().double().numpy()[load_max_token(sae).numpy() > 0]


if __name__ == "__main__":
    from .cli import concepts as command

    command()
