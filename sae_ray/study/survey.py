"""A survey: what a plan needs to know about its image folders and models.

It lists folders and reads models' configurations, which needs their libraries. A root remembers the last survey, so
that commands that only read a study are quick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sae_ray.concepts.config import INATURALIST
from sae_ray.encoders.info import EncoderInfo
from sae_ray.encoders.sources import is_unchanged, named_by
from sae_ray.errors import SaeRayError, UsageError
from sae_ray.images.labels import text_of
from sae_ray.images.manifest import ImageList, labels_digest, list_images, manifest_digest, select_split
from sae_ray.sae.architectures.guided_topk import LABELS
from sae_ray.sae.weighing import SOURCES, read_table
from sae_ray.steering.info import LlavaInfo
from sae_ray.store.files import Folder
from sae_ray.store.steps import digest
from sae_ray.study.config import Images, ImageSet, Study
from sae_ray.study.imported import Imported, read_imported


@dataclass(frozen=True)
class SurveyedImages:
    """One image set."""

    n_images: int
    manifest_digest: str
    labels_digest: str
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict, compare=False)
    """As in `ImageList`. Of the folder as it was when it was listed."""
    found: ImageList | None = dataclasses.field(default=None, compare=False, repr=False)
    """The images themselves. None in a remembered survey: they are then read from the root."""

    @classmethod
    def of(cls, found: ImageList) -> SurveyedImages:
        digests = manifest_digest(found.manifest), labels_digest(found.labels)
        return cls(found.manifest.num_rows, *digests, found.skipped, found)


@dataclass(frozen=True)
class SurveyedModels:
    """The models of a study."""

    encoder: EncoderInfo
    judge: EncoderInfo
    scorer: EncoderInfo | None = None
    """None without steering, like the LLaVA."""
    llava: LlavaInfo | None = None


@dataclass(frozen=True)
class SurveyedInput:
    """What training is given by its path: a table of weights, or the SAE to start from."""

    digest: str
    """Of its values, wherever and in whatever format they lie."""
    d_in: int
    d_sae: int | None = None
    """None for a table, like the architecture."""
    architecture: str | None = None


@dataclass(frozen=True)
class Survey:
    """The image sets, `train` and `heldout`, and the models of a study."""

    images: Mapping[str, SurveyedImages]
    models: SurveyedModels
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Digests of the files that `[concepts]` names, by its field: `file`, `vocabulary`, `taxonomy`; and of those that
    guided SAEs learn, by `architectures.<name>.concepts`."""
    inputs: Mapping[str, SurveyedInput] = dataclasses.field(default_factory=dict)
    """By path."""
    imported: Imported | None = None
    """What stands for images and models, where activations were imported."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, without the lists of images."""
        images = {name: vars(one) | {"found": None} for name, one in self.images.items()}
        inputs = {path: vars(one) for path, one in self.inputs.items()}
        models = dataclasses.asdict(self.models)
        imported = self.imported and self.imported.to_dict()
        return {"images": images, "models": models, "files": dict(self.files), "inputs": inputs, "imported": imported}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Survey:
        """The inverse of `to_dict`."""
        models = dict(values["models"])
        llava = models.pop("llava")
        infos: dict[str, Any] = {name: EncoderInfo.from_dict(info) if info else None for name, info in models.items()}
        infos["llava"] = LlavaInfo.from_dict(llava) if llava else None
        images = {name: SurveyedImages(**one) for name, one in values["images"].items()}
        inputs = {path: SurveyedInput(**one) for path, one in values.get("inputs", {}).items()}
        imported = Imported.from_dict(values["imported"]) if values.get("imported") else None
        return cls(images, SurveyedModels(**infos), values.get("files", {}), inputs, imported)


def survey_images(images: Images) -> dict[str, SurveyedImages]:
    """Lists the folders of a study.

    Raises:
        UsageError: a folder is missing, or its labels do not fit.
        SaeRayError: a set has no image, or a folder cannot be read.
    """
    train = list_set("images.train", images.train)
    if images.heldout is not None:
        found = {"train": train, "heldout": list_set("images.heldout", images.heldout)}
    else:
        found = {
            "train": select_split(train, images.heldout_fraction, "train"),
            "heldout": select_split(train, images.heldout_fraction, "heldout"),
        }
    for name, one in found.items():
        if not one.manifest.num_rows:
            path = (images.heldout if name == "heldout" and images.heldout else images.train).path
            remedy = "add images or change images.heldout_fraction"
            raise SaeRayError(f"images.{name}: no image is left in {path}; {remedy}")
    return {name: SurveyedImages.of(one) for name, one in found.items()}


def survey_models(study: Study, before: SurveyedModels | None = None) -> SurveyedModels:
    """Describes the models of a study, without loading their weights.

    Args:
        before: of the same models, perhaps as they were earlier. Directories whose files have not changed since are not
            described anew, which would need their libraries.

    Raises:
        UsageError: a model is unknown, cannot be reached or is not supported; the message names its field.
    """
    from sae_ray.encoders.loading import describe_encoder
    from sae_ray.steering.llava import describe_llava

    steering = study.steering
    encoder, judge, scorer, llava = (
        (before.encoder, before.judge, before.scorer, before.llava) if before else (None, None, None, None)
    )
    encoder = _named("encoder.model", describe_encoder, study.encoder.model, study.encoder.revision, encoder)
    judge = _named("judge.model", describe_encoder, study.judge.model, study.judge.revision, judge)
    if steering is None:
        return SurveyedModels(encoder, judge)
    scorer = _named("steering.scorer", describe_encoder, steering.scorer, steering.scorer_revision, scorer)
    llava = _named("steering.llava", describe_llava, steering.llava, steering.revision, llava)
    return SurveyedModels(encoder, judge, scorer, llava)


def survey_files(study: Study) -> dict[str, str]:
    """Reads the files of concepts that a study names.

    Raises:
        UsageError: one cannot be read.
    """
    from sae_ray.concepts import concept_files, taxonomy, vocabulary

    found = {}
    for field, path in concept_paths(study).items():
        form = {"vocabulary": vocabulary.FORM, "taxonomy": taxonomy.FORM}.get(field, concept_files.FORMS)
        found[field] = digest(text_of(path, form, field if "." in field else f"concepts.{field}"))
    return found


def concept_paths(study: Study) -> dict[str, str]:
    """The paths of the files that `Survey.files` tells of."""
    concepts, found = study.concepts, {}
    if concepts is not None:
        found |= {"file": concepts.file, "vocabulary": concepts.vocabulary, "taxonomy": concepts.taxonomy}
        if concepts.taxonomy == INATURALIST:
            del found["taxonomy"]
    for grid_cell in study.cells():
        settings = grid_cell.cell.settings
        if grid_cell.cell.guided and settings.concepts != LABELS:
            found[f"{settings.table}.concepts"] = settings.concepts
    return {field: path for field, path in found.items() if path is not None}


def check_files(study: Study, known: Survey) -> None:
    """Raises UsageError if a file of concepts has changed since the root was planned, or cannot be read."""
    if survey_files(study) != known.files:
        raise UsageError(
            f"{', '.join(concept_paths(study).values())}: changed since the root was planned; use `sae-ray run` with "
            "the same study, which reads these files again and repeats what depends on them"
        )


def named_inputs(study: Study) -> tuple[set[str], str | None]:
    """The paths that training is given: of tables of weights, and of the SAE to start from."""
    return {path for grid in study.grid for path in grid.weights if path not in SOURCES}, study.training.init


def survey_inputs(study: Study) -> dict[str, SurveyedInput]:
    """Reads tables of weights and the SAE to start from.

    Raises:
        UsageError: one cannot be read; the message names its field.
        SaeRayError: the SAE is damaged.
    """
    tables, init = named_inputs(study)
    found = {}
    for path in sorted(tables):
        with named_by("grid.weights", path):
            s = read_table(path)
        found[path] = SurveyedInput(digest(s.tolist()), len(s))
    if init is not None:
        from sae_ray.sae import load_sae
        from sae_ray.sae.starting import weights_digest

        with named_by("training.init", init):
            sae = load_sae(init)
        found[init] = SurveyedInput(weights_digest(sae), sae.d_in, sae.d_sae, sae.architecture)
    return found


def survey(study: Study, root: Folder) -> Survey:
    """Lists the folders, describes the models and reads the files; errors are those of the four.

    Raises UsageError also if the study is of imported activations and there are none under the root.
    """
    if study.imported:
        imported = read_imported(root)
        if imported is None:
            raise UsageError(
                f"images, encoder: missing, and nothing was imported into {root}; add both tables to the study, or put "
                "activations there by `sae-ray import`"
            )
        images = {name: SurveyedImages(**vars(one)) for name, one in imported.images.items()}
        models = SurveyedModels(imported.encoder, imported.judge_info)
        return Survey(images, models, survey_files(study), survey_inputs(study), imported)
    return Survey(survey_images(study.images), survey_models(study), survey_files(study), survey_inputs(study))


def _named(field: str, describe: Any, model: str, revision: str | None, before: EncoderInfo | LlavaInfo | None) -> Any:
    known = before.tower if isinstance(before, LlavaInfo) else before
    with named_by(field, model):
        return before if known and is_unchanged(model, known.revision) else describe(model, revision)


def list_set(field: str, images: ImageSet) -> ImageList:
    """The images of one set.

    Raises as `survey_images`; the message begins with the field.
    """
    try:
        folder = Folder(images.path)
        folder.check_reachable()
        return list_images(folder, images.labels)
    except UsageError as error:
        raise UsageError(f"{field}: {error}") from error
    except SaeRayError as error:
        raise SaeRayError(f"{field}: {error}") from error
    except OSError as error:
        problem = f"{field}: {images.path} cannot be read ({error}); check it or name another folder"
        raise SaeRayError(problem) from error
