"""The steering stage: Ray actors ask a LLaVA the questions of the protocol, with edits, and the answers are evaluated.

When all answers exist they are evaluated together: `answers.parquet`, `concepts.parquet`, and the rates in `step.json`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, reduce
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from sae_ray.concepts.image_codes import image_codes
from sae_ray.concepts.labelling import Concept, label_concepts, mean_embeddings
from sae_ray.concepts.naming import class_names
from sae_ray.concepts.naming_by_answers import Trials, trials
from sae_ray.encoders.sources import named_by
from sae_ray.encoders.text import load_text_encoder
from sae_ray.scores.tables import ScoreTables
from sae_ray.steering.diffmean import ClassSums, class_sums, diffmean
from sae_ray.steering.evaluation import Yardstick, answer_table, best_scales, concept_table, rates, texts
from sae_ray.steering.interventions import load_max_token
from sae_ray.steering.profiles import Profile, TopImages, code_sums, profiles, top_images
from sae_ray.steering.protocol import (
    Added,
    Subjects,
    calibration_questions,
    choose_subjects,
    main_questions,
    sample,
)
from sae_ray.steering.respondent import Directions
from sae_ray.store.activations import ActivationStore
from sae_ray.store.files import Folder
from sae_ray.store.steps import check_shared
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import ScorePlan, SteeringPlan

from .asking import Actor, Actors, Images
from .stage import at_work, unfinished

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

DIRECTIONS = "directions.parquet"
DIRECTIONS_SCHEMA = pa.schema([("label", pa.string()), ("vector", pa.list_(pa.float64()))])
PROFILES = "profiles.parquet"
PROFILES_SCHEMA = pa.schema(
    [("latent", pa.int64()), ("latents", pa.list_(pa.int64())), ("changes", pa.list_(pa.float64()))]
)


def run(plan: StudyPlan) -> Actors | None:
    """Evaluates steering with each SAE that can steer the study's LLaVA. Finished evaluations are skipped.

    Returns the actors that answered, if there was anything to ask; they stop when nobody holds them any more.

    Raises:
        SaeRayError: an input step is missing, the disk is too full, or another driver works on the same step.
    """
    todo = unfinished(plan.steerings)
    if not todo:
        return None
    with at_work(plan.root, "steering", todo):
        actors = Actors(todo[0].steering, plan.study.resources.steering, SteeringActor)
        for one in todo:
            Evaluation(one, plan.study.seed).run(actors)
    return actors


class Evaluation:
    """The evaluation of steering with one SAE."""

    def __init__(self, plan: SteeringPlan, seed: int):
        self.plan = plan
        self.steering = plan.steering
        self.folder = plan.step.folder
        self.seed = seed
        self.train = Images(plan.train, self.steering.ignore_labels, plan.scores.activations.step.folder)
        self.heldout = Images(plan.heldout, self.steering.ignore_labels, plan.heldout_activations.step.folder)
        self.class_name = class_names(self.train.labels | self.heldout.labels)

    def run(self, actors: Actors) -> None:
        """Asks, judges and finishes the step."""
        started = time.monotonic()
        directions = Directions(self._diffmean(actors), self._profiles(actors))
        added = self._added(directions)
        asked = calibration_questions(added, self.train.classes, self.train.usable, self.steering, self.seed)
        answers = actors.answers(self.plan, "calibration", asked, self.train, directions)
        scales = best_scales(added, asked, answers, self.class_name)
        images = sample(self.heldout.usable, self.steering.n_images, self.seed)
        asked = main_questions(self.subjects, scales, self.heldout.classes, images, self.steering)
        answers = actors.answers(self.plan, "answers", asked, self.heldout, directions)
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

    def _added(self, directions: Directions) -> list[Added]:
        """What is compared with setting the best latent of each class."""
        found: list[Added] = []
        for one in self.subjects.best:
            if one.label is not None and one.label in directions.diffmean:
                found.append(Added("diffmean", -1, one.label))
            if one.label is not None and one.latent in directions.profiles:
                found.append(Added("profile", one.latent, one.label))
        return found

    def _diffmean(self, actors: Actors) -> dict[str, Float[Tensor, " d_in"]]:
        """The DiffMean vectors by class; they are written first."""
        import torch

        if not self.folder.exists(DIRECTIONS):
            labels = [one.label for one in self.subjects.best if one.label is not None]
            code_of = {label: code for code, label in enumerate(labels)}
            codes = np.array([code_of.get(label or "", -1) for label in self.train.classes])
            vectors = diffmean(self._class_sums(actors, codes, len(labels))) if labels else np.zeros((0, 0))
            known = np.flatnonzero(np.isfinite(vectors).all(axis=1))
            columns = [[labels[place] for place in known], vectors[known].tolist()]
            self.folder.write_parquet(DIRECTIONS, pa.table(columns, schema=DIRECTIONS_SCHEMA))
        table = self.folder.read_parquet(DIRECTIONS)
        return dict(zip(table["label"].to_pylist(), map(torch.tensor, table["vector"].to_pylist()), strict=True))

    def _profiles(self, actors: Actors) -> dict[int, Profile]:
        """The profiles of the best latents; they are written first."""
        if not self.folder.exists(PROFILES):
            latents = [one.latent for one in self.subjects.best]
            found = profiles(self._code_sums(actors, latents)) if latents else []
            rows = [[latent, *one] for latent, one in zip(latents, found, strict=True) if one is not None]
            columns = list(zip(*rows, strict=True)) or [[]] * len(PROFILES_SCHEMA)
            self.folder.write_parquet(PROFILES, pa.table([list(column) for column in columns], schema=PROFILES_SCHEMA))
        rows = self.folder.read_parquet(PROFILES).to_pylist()
        return {row["latent"]: Profile(tuple(row["latents"]), tuple(row["changes"])) for row in rows}

    def _code_sums(self, actors: Actors, latents: Sequence[int]) -> Iterator[ClassSums]:
        """Of each part of the training activations, in order, with the top images of each latent as a class."""
        import ray

        store, sae = ActivationStore(self.plan.scores.activations.step.folder), self.plan.sae.step.folder
        usable = np.zeros(len(self.train.ids), bool)
        usable[self.train.usable] = True

        n_parts, shared = len(store.parts), ray.put(usable)
        top = reduce(
            lambda one, two: TopImages.merged([one, two]),
            actors.map(
                lambda actor, part: actor.top_images.remote(self.folder, sae, store, part, latents, shared),
                range(n_parts),
            ),
        )
        members = ray.put(top.members(len(usable)))
        return actors.map(
            lambda actor, part: actor.code_sums.remote(self.folder, sae, store, part, members), range(n_parts)
        )

    def _class_sums(self, actors: Actors, codes: Int[np.ndarray, " images"], n_classes: int) -> Iterator[ClassSums]:
        """Of each part of the training activations, in order."""
        import ray

        store, shared = ActivationStore(self.plan.scores.activations.step.folder), ray.put(codes)
        return actors.map(
            lambda actor, part: actor.class_sums.remote(self.folder, store, part, shared, n_classes),
            range(len(store.parts)),
        )

    def _yardstick(self, actors: Actors, answers: Sequence[str]) -> Yardstick:
        words = texts(answers, self.class_name)
        latents = {one.latent for one in (*self.subjects.concepts, *self.subjects.best, *self.subjects.impure)}
        targets: dict = self._means("latent", self.plan.scores, latents)
        targets |= {("class", one.label): targets["latent", one.latent] for one in self.subjects.best}
        targets |= self._means("neuron", self.plan.raw_scores, {one.latent for one in self.subjects.neurons})
        embeddings = dict(zip(words, _embedded(actors, words), strict=True)) if words else {}
        return Yardstick(self.steering.prompt, self.class_name, targets, embeddings)

    def _means(self, unit: str, scores: ScorePlan, wanted: Iterable[int]) -> dict[tuple[str, int], np.ndarray]:
        numbers = sorted(wanted)
        top_image = ScoreTables(scores.step.folder).top_images.image
        means = mean_embeddings(top_image, ActivationStore(self.plan.embeddings.step.folder), numbers)
        return {(unit, number): mean for number, mean in zip(numbers, means, strict=True)}


class SteeringActor(Actor):
    """Also sums activations and codes by class, embeds texts, and draws the images that names are tried on."""

    def class_sums(
        self, step: Folder, activations: ActivationStore, part: int, codes: Int[np.ndarray, " images"], n_classes: int
    ) -> ClassSums:
        """Class sums of one part, for the DiffMean vectors."""
        check_shared(step)
        return class_sums(activations, part, codes, n_classes)

    def top_images(
        self,
        step: Folder,
        sae: Folder,
        activations: ActivationStore,
        part: int,
        latents: Sequence[int],
        usable: Bool[np.ndarray, " images"],
    ) -> TopImages:
        """The top images of one part, for the profiles."""
        check_shared(step)
        return top_images(self._sae(sae), activations, part, latents, usable)

    def code_sums(
        self,
        step: Folder,
        sae: Folder,
        activations: ActivationStore,
        part: int,
        members: Bool[np.ndarray, "latents images"],
    ) -> ClassSums:
        """Sums of the codes of one part, for the profiles."""
        check_shared(step)
        return code_sums(self._sae(sae), activations, part, members)

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "texts d"]:
        """Embeds texts with the scorer."""
        with named_by("steering.scorer", self.steering.scorer):
            encoder = load_text_encoder(self.steering.scorer, self.steering.scorer_revision, self.device)
        return encoder.embed_texts(texts).double().numpy()

    def trials(self, step: Folder, sae: Folder, store: ActivationStore, latents: Sequence[int], seed: int) -> Trials:
        """By `image_index`, from one pass over the held-out images."""
        check_shared(step)
        with one_thread():
            found = image_codes(self._sae(sae), store)
        drawn = trials(found.codes, latents, seed)
        return Trials(*(np.where(places >= 0, found.image_index[places], -1) for places in drawn))


@contextmanager
def one_thread() -> Iterator[None]:
    """The last bits depend on the number of threads, and so would the images that are drawn."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _embedded(actors: Actors, texts: Sequence[str]) -> Float[np.ndarray, "texts d"]:
    import ray

    return ray.get(actors.all[0].embed_texts.remote(texts))


if __name__ == "__main__":
    from .cli import steering as command

    command()
