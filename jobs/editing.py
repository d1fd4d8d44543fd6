"""`sae-ray edit`: makes patches of weights, and measures with a study's images and questions what they do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, assert_never

import torch

from sae_ray.concepts.labelling import image_classes, label_concepts
from sae_ray.concepts.naming import class_names
from sae_ray.editing import edited, load_patch, make_patch, save_patch
from sae_ray.editing.effects import edit_table, on_codes, seen_by_reader
from sae_ray.editing.patch import Facts, Patch
from sae_ray.editing.trial import CODED_IMAGES, Trial, labelled
from sae_ray.encoders import Site, load_encoder, load_preprocess
from sae_ray.errors import UsageError
from sae_ray.images.part import Preparation, decode_part
from sae_ray.sae import load_sae
from sae_ray.scores.tables import ScoreTables
from sae_ray.steering import load_llava
from sae_ray.steering.protocol import Question, sample
from sae_ray.store.files import parent_and_name
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import TrainPlan
from sae_ray.text_table import table_lines

from .asking import Images

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def make(model: str, sae: str, latent: int, out: str, **settings: Any) -> Patch:
    """Makes a patch and writes it. Raises as `make_patch`, `load_sae` and `save_patch` do."""
    patch = make_patch(model, load_sae(sae), latent, sae_name=sae, **settings)
    save_patch(patch, out)
    return patch


def evaluate(plan: StudyPlan, files: Sequence[str], prompts: Sequence[str], device: str) -> list[dict[str, Any]]:
    """What each patch does, as rows of `EDIT_SCHEMA`.

    Patches of a LLaVA are tried with the study's question and other prompts about its held-out images; of other models
    only activations are compared.

    Args:
        prompts: In place of the study's other prompts, unless there are none.

    Raises:
        UsageError: A patch is of another SAE, or of another model than the study's.
        SaeRayError: The SAE is not scored yet.
    """
    patches = [load_patch(file) for file in files]
    trials = lru_cache(maxsize=1)(lambda name: CellTrial(plan, _cell(plan, name), prompts, device))
    return [trials(PurePath(patch.facts.sae).name).row(patch) for patch in patches]


def _cell(plan: StudyPlan, folder: str) -> TrainPlan:
    for train in plan.trains:
        if train.step.folder.name == folder:
            return train
    raise UsageError(
        f"the patch was made with the SAE {folder}, which is not one of {plan.root}; name the root of its study"
    )


class CellTrial:
    """One SAE of a study, and what patches made with it do to the model that it is of."""

    def __init__(self, plan: StudyPlan, train: TrainPlan, prompts: Sequence[str], device: str):
        self.plan, self.train, self.device, self.prompts = plan, train, device, prompts
        self.heldout, self.pictures = plan.passes(train.grid_cell.name)
        for scores in (self.heldout, self.pictures):
            scores.check_scored()
        self.sae = load_sae(train.step.folder).to(device)
        self.ignored = plan.study.steering.ignore_labels if plan.study.steering else ()
        self.images = Images(self.heldout.activations.images, self.ignored, self.heldout.activations.step.folder)

    def row(self, patch: Patch) -> dict[str, Any]:
        """As `Trial.of_patch`."""
        concept, revision, models = self.concepts.get(patch.facts.latent), patch.facts.revision, self.plan.survey.models
        llava = models.llava
        if llava is not None and llava.tower.revision == revision:
            _check_site(self.train.grid_cell.site, patch.facts, llava.layer)
            return self.trial.of_patch(patch, concept)
        patch.check_model(models.encoder.name, models.encoder.revision)
        if patch.facts.scope == "reader":
            raise UsageError("the patch has the scope reader, but the study has no [steering]; add it with that LLaVA")
        _check_site(self.train.grid_cell.site, patch.facts, None)
        return self._row_of_encoder(patch, concept)

    @cached_property
    def concepts(self) -> dict[int, str | None]:
        """Latent -> the class that it stands for, if it does."""
        tables = ScoreTables(self.pictures.step.folder)
        classes = image_classes(self.pictures.activations.images.labels, self.ignored)
        found = label_concepts(tables.scores, tables.top_images.image, classes, tables.scores.max_token)
        return {one.latent: one.label for one in found}

    @cached_property
    def trial(self) -> Trial:
        steering = self.plan.study.steering
        assert steering is not None, "surveyed with it"
        prompts = [steering.prompt, *(self.prompts or steering.other_prompts)]
        asked = [
            Question("unsteered", -1, self.images.classes[index], 0.0, index, prompt)
            for index in sample(self.images.usable, steering.n_images, self.plan.study.seed)
            for prompt in prompts
        ]
        return Trial(
            load_llava(steering.llava, steering.revision, self.device, steering.dtype),
            self.sae,
            asked,
            self.images.picture,
            class_names(self.images.labels),
            steering,
            self.plan.study.resources.steering.batch_size,
            of_mlp=self.train.grid_cell.site.point == "mlp",
        )

    def _row_of_encoder(self, patch: Patch, concept: str | None) -> dict[str, Any]:
        encoder, facts = self.encoder, patch.facts
        point = self.train.grid_cell.site.point
        site = Site("projection") if facts.layer is None else Site(point, facts.layer, "all")
        before = self._activations(site)
        with edited(encoder.tower.module, patch):
            after = seen_by_reader(patch, self.sae, before) if facts.layer is None else self._activations(site)
        return labelled(facts, concept) | on_codes(self.sae, facts.latent, before, after)._asdict()

    @cached_property
    def encoder(self):
        config = self.plan.study.encoder
        return load_encoder(config.model, config.revision, self.device, config.dtype)

    def _activations(self, site: Site) -> Float[Tensor, "rows d_in"]:
        tapped = self.encoder.tap(self._pixels, [site], [""] * len(self._pixels), 0)
        return tapped[site].activation

    @cached_property
    def _pixels(self) -> Tensor:
        images, config = self.images, self.plan.study.encoder
        ids = [images.files[index] for index in sample(images.usable, CODED_IMAGES, self.plan.study.seed)]
        preparation = Preparation(load_preprocess(config.model, config.revision))
        return torch.from_numpy(decode_part(images.folder, ids, [preparation], rendering=images.rendering).pixels[0])


def _check_site(site: Site, facts: Facts, read: int | None) -> None:
    """Refuses a patch made with an SAE of another place than it changes. `read` is the block that a LLaVA reads."""
    match facts.scope:
        case "reader":
            fits = (site.point, site.layer) == ("residual", read)
        case "writers":
            fits = (site.point, site.layer) == ("residual", facts.layer)
        case "mlp":
            fits = site.layer == facts.layer
        case "projection":
            fits = site.point == "projection"
        case never:
            assert_never(never)
    if not fits:
        at = f" of block {facts.layer}" if facts.layer is not None else ""
        raise UsageError(
            f"the patch has the scope {facts.scope}{at}, but its SAE is of the site {site.name}; make it again with an "
            "SAE of that place, or for the SAE's own"
        )


def write(rows: Sequence[dict[str, Any]], file: str) -> None:
    """Raises UsageError if the file cannot be written."""
    try:
        folder, name = parent_and_name(file)
        folder.write_parquet(name, edit_table(rows))
    except OSError as error:
        raise UsageError(f"--out is {file}, which cannot be written ({error}); name another file") from error


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as an aligned table."""
    titles = ["latent", "concept", "mode", "scope", "own left", "others change", "fires on", "then on"]
    titles += ["loses name", "others keep theirs", "other wording", "other answers same"]
    table = [titles]
    for row in rows:
        rates = [row.get(key) for key in ("reliability", "locality", "generality", "unchanged")]
        table.append(
            [
                *(str(row[key] if row[key] is not None else "–") for key in ("latent", "concept", "mode", "scope")),
                *(f"{row[key]:.2g}" for key in ("own_variance_left", "others_relative_change")),
                *(f"{row[key]:,}" for key in ("n_firing_before", "n_firing_after")),
                *("–" if value is None else f"{value:.1%}" for value in rates),
            ]
        )
    return table_lines(table, "<<<<>>>>>>>>")
