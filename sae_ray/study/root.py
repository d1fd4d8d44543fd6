"""What a root remembers about its study, so that later commands need only the root, and neither folders nor models."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sae_ray.errors import UsageError
from sae_ray.images.manifest import describe_change
from sae_ray.images.skipping import skipped_line
from sae_ray.store.files import Folder, address_shown
from sae_ray.store.steps import Step
from sae_ray.store.tables import StoredTable
from sae_ray.study.config import Images, Study
from sae_ray.study.plan import StudyPlan
from sae_ray.study.survey import (
    Survey,
    concept_paths,
    named_inputs,
    survey_files,
    survey_images,
    survey_inputs,
    survey_models,
)

FILE = "study.json"
LAYOUT = 3
"""Version of a root as a whole; each stage has a schema version of its own."""


@dataclass(frozen=True)
class Memory:
    """The study and survey of the last command that worked under a root."""

    study: Study
    survey: Survey


def remember(plan: StudyPlan) -> None:
    """Writes what later commands need.

    Raises UsageError when the root cannot be written.
    """
    values = {"layout": LAYOUT, "study": plan.study.to_dict(), "survey": plan.survey.to_dict()}
    try:
        plan.root.write_json(FILE, values)
    except OSError as error:
        raise UsageError(f"--root {plan.root} cannot be written ({error}); choose a directory of your own") from error


def recall(root: Folder) -> Memory | None:
    """What a root remembers; None where it is new.

    Raises UsageError when the root cannot be read, or was written by another version of sae-ray.
    """
    try:
        root.check_reachable()
        values = root.read_json(FILE) if root.exists(FILE) else None
    except OSError as error:
        raise UsageError(f"--root {root} cannot be read ({error}); check it or choose another") from error
    if values is None:
        return None
    if values.get("layout") != LAYOUT:
        raise UsageError(
            f"{root} was written by another version of sae-ray, whose steps this one cannot reuse (layout "
            f"{values.get('layout', 'unknown')} instead of {LAYOUT}); choose another --root, or delete this one"
        )
    # A root that does not say how thresholds were found is older than the choice, and than its present default.
    training = {"threshold": "average", **values["study"].get("training", {})}
    return Memory(Study.from_dict(values["study"] | {"training": training}), Survey.from_dict(values["survey"]))


def plan_study(
    study: Study, root: Folder, memory: Memory | None, list_again: bool = False, describe_again: bool = False
) -> StudyPlan:
    """The plan of a study. It uses the survey that its root remembers, if that is of the same images and models.

    Args:
        memory: what the root remembers (`recall`).
        list_again: list the image folders, and read the files of concepts and what training is given by a path, even if
            the root remembers them.
        describe_again: describe the models even if the root remembers them, but for directories that have not changed.

    Raises:
        UsageError: a folder, file, model, site or cell is invalid.
        SaeRayError: there are no images.
    """
    if study.imported:
        return StudyPlan(study, root)
    same_images = memory is not None and _images(memory.study) == _images(study)
    same_models = memory is not None and _models(memory.study) == _models(study)
    images = memory.survey.images if memory and same_images and not list_again else survey_images(study.images)
    models = memory.survey.models if memory and same_models else None
    if models is None or describe_again:
        models = survey_models(study, models)
    same_files = memory is not None and concept_paths(memory.study) == concept_paths(study)
    files = memory.survey.files if memory and same_files and not list_again else survey_files(study)
    same_inputs = memory is not None and named_inputs(memory.study) == named_inputs(study)
    inputs = memory.survey.inputs if memory and same_inputs and not list_again else survey_inputs(study)
    return StudyPlan(study, root, Survey(images, models, files, inputs))


def recalled_plan(root: str) -> StudyPlan:
    """The plan of the study that a root remembers.

    Raises UsageError when it remembers none; or as `recall`.
    """
    folder = Folder(root)
    memory = recall(folder)
    if memory is None:
        raise UsageError(
            f"root = {address_shown(root)!r} has no {FILE}; name the root of a study that `sae-ray run` wrote"
        )
    return StudyPlan(memory.study, folder, memory.survey)


def changed_folders(plan: StudyPlan, memory: Memory | None) -> list[str]:
    """One line for every image set that has changed since the last command that worked under its root."""
    if memory is None or plan.study.imported or _images(memory.study) != _images(plan.study):
        return []
    lines = []
    for name, images in plan.images.items():
        before = memory.survey.images[name]
        if before.manifest_digest != images.surveyed.manifest_digest:
            step = Step(plan.root, "manifest", f"manifest-{name}", {"images": before.manifest_digest})
            known = StoredTable(step.folder, "manifest.parquet").groups() if step.finished else ()
            what = describe_change(known, images.stored("manifest").groups())
            lines.append(
                f"images.{name}: {images.folder} has changed since the last run ({what}); its steps are redone"
            )
        elif before.labels_digest != images.surveyed.labels_digest:
            lines.append(
                f"images.{name}: the labels have changed since the last run; the steps that read them are redone"
            )
    return lines


def skipped_lines(plan: StudyPlan) -> list[str]:
    """One line for every image folder that holds what is no image by its name."""
    lines = {}
    for name, images in plan.images.items():
        if skipped := images.surveyed.skipped:
            where = f"skipped in {address_shown(images.path)}, since their names are not those of images"
            lines.setdefault(images.path, f"images.{name}: {where}: {skipped_line(skipped)}")
    return list(lines.values())


def _images(study: Study) -> Images:
    return dataclasses.replace(study.images, max_bad_fraction=0, background=None, white=None)


def _models(study: Study) -> Any:
    steering = study.steering
    named = [(study.encoder.model, study.encoder.revision), (study.judge.model, study.judge.revision)]
    if steering is not None:
        named += [(steering.llava, steering.revision), (steering.scorer, steering.scorer_revision)]
    return named
