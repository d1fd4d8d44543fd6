"""What a study gives guided SAEs: which concepts its images show."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sae_ray.concepts.concept_files import read_values
from sae_ray.concepts.labelling import image_classes
from sae_ray.encoders.sources import named_by
from sae_ray.errors import UsageError
from sae_ray.sae.architectures.guided_topk import LABELS
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import ImagePlan, TrainPlan
from sae_ray.study.survey import check_files

if TYPE_CHECKING:
    from sae_ray.sae.targets import Targets


def targets_of(plan: StudyPlan, trains: Iterable[TrainPlan], images: ImagePlan) -> dict[str, Targets]:
    """The targets of an image set for the guided SAEs among these, by what their settings name as `concepts`.

    Raises:
        UsageError: a concept file cannot be read, does not fit the images, or has changed since the root was planned;
            no training image shows a concept, or an SAE has not a latent for each.
        SaeRayError: the images are not listed yet.
    """
    guided = [train for train in trains if train.grid_cell.cell.guided]
    if guided:
        check_files(plan.study, plan.survey)
    found: dict[str, Targets] = {}
    for train in guided:
        cell = train.grid_cell.cell
        source, field = cell.settings.concepts, f"{cell.settings.table}.concepts"
        if source not in found:
            with named_by(field, source):
                found[source] = _read(source, images)
        if images.name == "train":
            if not found[source].concepts:
                raise UsageError(f"{field} = {source!r}: no training image has a label; give labels, or a concept file")
            cell.check_concepts(train.activations.width, len(found[source].concepts))
    return found


def _read(source: str, images: ImagePlan) -> Targets:
    from sae_ray.sae.targets import Targets

    if source == LABELS:
        return Targets.of_classes(image_classes(images.labels))
    image_ids = images.manifest["image_id"].to_pylist()
    return Targets.of_matrix(*read_values(source, images.folder, image_ids, fractions=True))
