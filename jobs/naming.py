"""The naming stage: the study's LLaVA names the latents of each SAE, and its names are tried on held-out images.

All images are known before the first question: those that names rest on, and those that they are tried on. Ray actors
are asked about each once, or about grids of the former, and the driver counts: `names.parquet`, `answers.parquet`, and
the figures in `step.json`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sae_ray.concepts.labelling import image_classes, label_concepts
from sae_ray.concepts.naming import class_names
from sae_ray.concepts.naming_by_answers import N_IMAGES, Trials, random_images
from sae_ray.scores.tables import ScoreTables
from sae_ray.steering.config import ONE_WORD_FOR_ALL
from sae_ray.steering.interventions import load_max_token
from sae_ray.steering.latent_names import (
    NAMES,
    Answers,
    Shown,
    image_questions,
    name_rates,
    name_table,
    nameable,
)
from sae_ray.steering.protocol import WHITE, white_questions
from sae_ray.store.activations import ActivationStore
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import NamingPlan

from .asking import Actors, Images
from .stage import at_work, unfinished
from .steering import SteeringActor


def run(plan: StudyPlan, actors: Actors | None = None) -> None:
    """Names the latents of each SAE that are not named yet.

    Args:
        actors: those that the evaluation of steering leaves: they have loaded the LLaVA already.

    Raises:
        SaeRayError: an input step is missing, the disk is too full, or another driver works on the same step.
    """
    todo = unfinished(plan.namings)
    if todo:
        with at_work(plan.root, "naming", todo):
            if actors is None or actors.steering != todo[0].steering:
                actors = Actors(todo[0].steering, plan.study.resources.steering, SteeringActor)
            for one in todo:
                _name(one, actors, plan.study.seed)


def _name(plan: NamingPlan, actors: Actors, seed: int) -> None:
    started = time.monotonic()
    steering, folder = plan.steering, plan.step.folder
    tables = ScoreTables(plan.scores.step.folder)
    top, max_token = tables.top_images.image, load_max_token(plan.sae.step.folder).numpy()
    train = Images(plan.train, (), plan.scores.activations.step.folder)
    heldout = Images(plan.heldout.images, (), plan.heldout.step.folder)
    classes = image_classes(plan.train.labels, steering.ignore_labels)
    subjects = nameable(label_concepts(tables.scores, top, classes, max_token), plan.n_latents)
    latents = [one.latent for one in subjects]
    shown = Shown(top[latents], random_images(train.usable, len(latents), seed), _trials(plan, actors, latents, seed))

    def about(name: str, wanted: list[int], images: Images) -> dict[int, str]:
        asked = image_questions(wanted, steering.prompt)
        return dict(zip(wanted, actors.answers(plan, f"answers/{name}", asked, images), strict=True))

    training, grids = {}, []
    if "vlm" in plan.methods and plan.images == "grid":
        rows = [row[row >= 0].tolist() for kind in (shown.top[:, :N_IMAGES], shown.random) for row in kind]
        asked = image_questions(range(len(rows)), ONE_WORD_FOR_ALL)
        grids = actors.answers(plan, "answers/grids", asked, train.in_grids(rows))
    elif "vlm" in plan.methods:
        training = about("train", shown.training, train)
    told = about("heldout", shown.heldout, heldout)
    white = []
    if "steering" in plan.methods:
        asked = [*image_questions([WHITE], steering.prompt), *white_questions("white", subjects, steering)]
        white = actors.answers(plan, "answers/white", asked, train)
    answers = Answers(training, told, white[1:], "".join(white[:1]), grids)

    names = name_table(subjects, shown, answers, plan.methods)
    folder.write_parquet(NAMES, names)
    folder.write_parquet("answers.parquet", answers.table(latents))
    rates = name_rates(names, subjects, class_names(train.labels), steering.min_images, steering.min_purity)
    counts = {"rows": len(training) + len(grids) + len(told) + len(white), "methods": rates}
    plan.step.finish(time.monotonic() - started, counts)


def _trials(plan: NamingPlan, actors: Actors, latents: Sequence[int], seed: int) -> Trials:
    import ray

    store: Any = ActivationStore(plan.heldout.step.folder)
    return ray.get(actors.all[0].trials.remote(plan.step.folder, plan.sae.step.folder, store, latents, seed))


if __name__ == "__main__":
    from .cli import naming as command

    command()
