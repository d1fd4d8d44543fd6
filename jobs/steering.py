"""The steering stage: Ray actors ask a LLaVA the questions of the protocol, with edits, and the answers are evaluated.

Questions are asked in blocks of fixed size, and an actor writes the answers of a block as one part. So a killed run
redoes at most one block per actor, and the answers do not depend on the number of actors. When all answers exist they
are evaluated together: `answers.parquet`, `concepts.parquet`, and the rates in `step.json`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sae_ray.concepts.labelling import Concept, image_classes, label_concepts, mean_embeddings
from sae_ray.concepts.naming import class_names
from sae_ray.encoders.sources import named_by
from sae_ray.encoders.text import load_text_encoder
from sae_ray.errors import SaeRayError
from sae_ray.images import decode_image
from sae_ray.images.part import read_file
from sae_ray.images.rendering import Rendering
from sae_ray.sae import load_sae
from sae_ray.scores.tables import ScoreTables
from sae_ray.steering.config import Steering
from sae_ray.steering.diffmean import ClassSums, class_sums, diffmean
from sae_ray.steering.evaluation import Yardstick, answer_table, best_scales, concept_table, rates, texts
from sae_ray.steering.interventions import load_max_token
from sae_ray.steering.llava import load_llava
from sae_ray.steering.protocol import (
    WHITE,
    Question,
    Subjects,
    calibration_questions,
    choose_subjects,
    main_questions,
    sample,
    usable_images,
)
from sae_ray.steering.respondent import Respondent
from sae_ray.store.activations import ActivationStore
from sae_ray.store.files import Folder
from sae_ray.store.steps import check_shared, digest
from sae_ray.study.config import SteeringResources
from sae_ray.study.plan import ImagePlan, ScorePlan, SteeringPlan, StudyPlan

from .cluster import RETRIES, gpus_or_default, n_gpus, require
from .progress import Progress
from .stage import at_work, unfinished

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from PIL import Image

QUESTIONS_PER_BLOCK = 256
DIRECTIONS = "directions.parquet"
DIRECTIONS_SCHEMA = pa.schema([("label", pa.string()), ("vector", pa.list_(pa.float64()))])


def run(plan: StudyPlan) -> None:
    """Evaluates steering with each SAE that can steer the study's LLaVA. Finished evaluations are skipped.

    Raises:
        SaeRayError: an input step is missing, the disk is too full, or another driver works on the same step.
    """
    todo = unfinished(plan.steerings)
    if todo:
        with at_work(plan.root, "steering", todo):
            for one in todo:
                Evaluation(one, plan.study.seed).run(plan.study.resources.steering)


class Evaluation:
    """The evaluation of steering with one SAE."""

    def __init__(self, plan: SteeringPlan, seed: int):
        self.plan = plan
        self.steering = plan.steering
        self.folder = plan.step.folder
        self.seed = seed
        self.train = Images(plan.train, self.steering, plan.scores.activations.step.folder)
        self.heldout = Images(plan.heldout, self.steering, plan.heldout_activations.step.folder)
        self.class_name = class_names(self.train.labels | self.heldout.labels)

    def run(self, resources: SteeringResources) -> None:
        """Asks, judges and finishes the step."""
        started = time.monotonic()
        actors = Actors(self.plan, resources)
        asked = calibration_questions(
            self._directions(actors), self.train.classes, self.train.usable, self.steering, self.seed
        )
        answers = actors.answers("calibration", asked, self.train)
        scales = best_scales(asked, answers, self.class_name)
        images = sample(self.heldout.usable, self.steering.n_images, self.seed)
        asked = main_questions(self.subjects, scales, self.heldout.classes, images, self.steering)
        answers = actors.answers("answers", asked, self.heldout)
        yardstick = self._yardstick(actors, answers)
        judged, concepts = answer_table(asked, answers, yardstick), concept_table(self.subjects, yardstick)
        self.folder.write_parquet("answers.parquet", judged)
        self.folder.write_parquet("concepts.parquet", concepts)
        counts = {"rows": judged.num_rows} | rates(judged, concepts, self.steering.prompt)
        self.plan.step.finish(time.monotonic() - started, counts)

    @cached_property
    def subjects(self) -> Subjects:
        """The latents and neurons to steer with."""
        of_latents, of_neurons = (ScoreTables(one.step.folder) for one in (self.plan.scores, self.plan.raw_scores))
        latents = self._concepts(of_latents, load_max_token(self.plan.sae.step.folder).numpy())
        neurons = self._concepts(of_neurons, of_neurons.scores.max_token)
        return choose_subjects(latents, neurons, self.steering)

    def _concepts(self, tables: ScoreTables, max_token: Float[np.ndarray, " neurons"]) -> list[Concept]:
        return label_concepts(tables.scores, tables.top_images.image, self.train.classes, max_token)

    def _directions(self, actors: Actors) -> list[str]:
        """Writes the DiffMean vectors and returns the labels of their classes."""
        if not self.folder.exists(DIRECTIONS):
            labels = [one.label for one in self.subjects.best if one.label is not None]
            code_of = {label: code for code, label in enumerate(labels)}
            codes = np.array([code_of.get(label or "", -1) for label in self.train.classes])
            vectors = diffmean(actors.class_sums(codes, len(labels))) if labels else np.zeros((0, 0))
            known = np.flatnonzero(np.isfinite(vectors).all(axis=1))
            columns = [[labels[place] for place in known], vectors[known].tolist()]
            self.folder.write_parquet(DIRECTIONS, pa.table(columns, schema=DIRECTIONS_SCHEMA))
        return self.folder.read_parquet(DIRECTIONS)["label"].to_pylist()

    def _yardstick(self, actors: Actors, answers: Sequence[str]) -> Yardstick:
        words = texts(answers, self.class_name)
        latents = {one.latent for one in (*self.subjects.concepts, *self.subjects.best, *self.subjects.impure)}
        targets: dict = self._means("latent", self.plan.scores, latents)
        targets |= {("class", one.label): targets["latent", one.latent] for one in self.subjects.best}
        targets |= self._means("neuron", self.plan.raw_scores, {one.latent for one in self.subjects.neurons})
        embeddings = dict(zip(words, actors.embed_texts(words), strict=True)) if words else {}
        return Yardstick(self.steering.prompt, self.class_name, targets, embeddings)

    def _means(self, unit: str, scores: ScorePlan, wanted: Iterable[int]) -> dict[tuple[str, int], np.ndarray]:
        numbers = sorted(wanted)
        top_image = ScoreTables(scores.step.folder).top_images.image
        means = mean_embeddings(top_image, ActivationStore(self.plan.embeddings.step.folder), numbers)
        return {(unit, number): mean for number, mean in zip(numbers, means, strict=True)}


class Images:
    """One image set to ask questions about."""

    def __init__(self, plan: ImagePlan, steering: Steering, extracted: Folder):
        rejected = set(extracted.read_parquet("rejects.parquet")["image_id"].to_pylist())
        self.folder, self.rendering = plan.folder, plan.rendering
        self.ids = plan.manifest["image_id"].to_pylist()
        label_names = plan.labels["label_name"].to_pylist()
        self.classes = image_classes(plan.labels, steering.ignore_labels)
        self.usable = usable_images(self.ids, label_names, rejected, steering.ignore_labels)
        self.labels = set(label_names) - {None, *steering.ignore_labels}


class Actors:
    """The actors of one evaluation; they stop when it ends."""

    def __init__(self, plan: SteeringPlan, resources: SteeringResources):
        import ray
        from ray.util import ActorPool

        gpus = gpus_or_default(resources.gpus)
        n_actors = resources.workers or (max(1, int(n_gpus() / gpus)) if gpus else 1)
        require("resources.steering", n_actors, resources.cpus, gpus)
        actor = ray.remote(num_cpus=resources.cpus, num_gpus=gpus, max_restarts=RETRIES, max_task_retries=RETRIES)(
            Actor
        )
        activations = ActivationStore(plan.scores.activations.step.folder)
        given = (plan.steering, plan.sae.step.folder, activations, plan.step.folder, resources.batch_size, gpus > 0)
        self.name, self.step = plan.name, plan.step
        self._n_parts = len(activations.parts)
        self._actors: list[Any] = [actor.remote(*given) for _ in range(n_actors)]
        self._pool = ActorPool(self._actors)

    def class_sums(self, codes: Int[np.ndarray, " images"], n_classes: int) -> Iterator[ClassSums]:
        """The class sums of each part of the training activations, in order."""
        import ray

        shared = ray.put(codes)
        parts: Any = list(range(self._n_parts))
        sums: Any = self._pool.map(lambda actor, part: actor.class_sums.remote(part, shared, n_classes), parts)
        return sums

    def answers(self, phase: str, asked: Sequence[Question], images: Images) -> list[str]:
        """The answers to all questions, in order. Answers of finished parts are read, not asked again.

        A part is named after its questions, so parts of other questions or of another block size are not taken for it.
        """
        folder = self.step.folder / phase
        blocks = [asked[start : start + QUESTIONS_PER_BLOCK] for start in range(0, len(asked), QUESTIONS_PER_BLOCK)]
        files = [f"part-{number:05d}-{digest(block)[:16]}.parquet" for number, block in enumerate(blocks)]
        present = folder.files()
        missing = [place for place, file in enumerate(files) if file not in present]

        def submit(actor: Any, place: int) -> Any:
            wanted = {question.image_index for question in blocks[place]} - {WHITE}
            ids = {index: images.ids[index] for index in wanted}
            return actor.answer.remote(folder, files[place], blocks[place], images.folder, ids, images.rendering)

        done = len(asked) - sum(len(blocks[place]) for place in missing)
        with Progress(f"steer {self.name}: {phase}", len(asked), "answers", done, [self.step]) as progress:
            answered: Any = self._pool.map_unordered(submit, missing)
            for found in answered:
                if isinstance(found, SaeRayError):
                    raise found
                progress.advance(found)
        return [answer for file in files for answer in folder.read_parquet(file)["answer"].to_pylist()]

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "texts d"]:
        """Embeds texts with the scorer."""
        import ray

        return ray.get(self._actors[0].embed_texts.remote(texts))


class Actor:
    """Holds a LLaVA and an SAE, which are loaded at the first question."""

    def __init__(
        self, steering: Steering, sae: Folder, activations: ActivationStore, step: Folder, batch_size: int, on_gpu: bool
    ):
        self.steering = steering
        self.sae = sae
        self.activations = activations
        self.step = step
        self.batch_size = batch_size
        self.device = "cuda" if on_gpu else "cpu"

    def class_sums(self, part: int, codes: Int[np.ndarray, " images"], n_classes: int) -> ClassSums:
        """Class sums of one part, for the DiffMean vectors."""
        check_shared(self.step)
        return class_sums(self.activations, part, codes, n_classes)

    def answer(
        self,
        folder: Folder,
        file: str,
        asked: Sequence[Question],
        images: Folder,
        ids: Mapping[int, str],
        rendering: Rendering,
    ) -> int | SaeRayError:
        """Answers one block, writes its part, and returns the number of answers or the error."""

        def image(index: int) -> Image.Image:
            return decode_image(read_file(images, ids[index]), rendering=rendering)

        try:
            check_shared(self.step)
            answers = self._respondent.answers(asked, image, self.batch_size)
        except SaeRayError as error:  # not raised: Ray would also report errors that the driver no longer waits for
            return error
        folder.write_parquet(file, pa.table({"answer": answers}))
        return len(answers)

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "texts d"]:
        """Embeds texts with the scorer."""
        with named_by("steering.scorer", self.steering.scorer):
            encoder = load_text_encoder(self.steering.scorer, self.steering.scorer_revision, self.device)
        return encoder.embed_texts(texts).double().numpy()

    @cached_property
    def _respondent(self) -> Respondent:
        """Loaded late: an error in the actor's constructor would kill it and reach the driver without its type."""
        import torch

        steering = self.steering
        with named_by("steering.llava", steering.llava):
            llava = load_llava(steering.llava, steering.revision, self.device, steering.dtype)
        table = self.step.read_parquet(DIRECTIONS)
        vectors = (torch.tensor(vector) for vector in table["vector"].to_pylist())
        directions = dict(zip(table["label"].to_pylist(), vectors, strict=True))
        return Respondent(llava, load_sae(self.sae).to(self.device), directions, steering)


if __name__ == "__main__":
    from .cli import steering as command

    command()
