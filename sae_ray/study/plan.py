"""The plan of a study: which steps it has, and how they are named. Nothing is computed or written here."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from functools import cached_property

from sae_ray.concepts.config import Concepts
from sae_ray.encoders.info import EncoderInfo, check_site, check_text_side, site_width
from sae_ray.encoders.sites import Site
from sae_ray.encoders.sources import is_digest, named_by
from sae_ray.errors import SaeRayError, UsageError, check
from sae_ray.sae.second_moment import ROWS_PER_DIMENSION
from sae_ray.sae.weighing import SOURCES
from sae_ray.seeds import derived_seed
from sae_ray.steering.config import Naming, NamingMethod, Steering
from sae_ray.steering.info import LlavaInfo
from sae_ray.store.files import Folder
from sae_ray.store.identity import changed, defaults
from sae_ray.store.steps import Step
from sae_ray.study.config import EncoderConfig, Extraction, GridCell, JudgeConfig, Scoring, Study
from sae_ray.study.imported import JUDGE, Imported, ImportedSite
from sae_ray.study.step_plans import (
    AnyPlan,
    ConceptsPlan,
    EvaluatePlan,
    ExtractPlan,
    ImagePlan,
    ListPlan,
    NamingPlan,
    PicturesPlan,
    ScorePlan,
    SteeringPlan,
    TrainPlan,
)
from sae_ray.study.survey import Survey, survey

CONCEPT_FILES = ("file", "vocabulary", "taxonomy")
"""Fields of `[concepts]` that name files. Steps are named by what these hold."""
MODELS = ("llava", "revision", "scorer", "scorer_revision")
"""Fields of `[steering]` that name models. Steps are named by what these resolve to."""
NAMING = ("dtype", "prompt", "max_new_tokens", "ignore_labels", "min_images", "min_purity")
"""Those that naming depends on."""
SET = ("strength", "unit", "error")
"""Those that naming by steering depends on, besides."""

FEWEST_PARTS = 16
"""Of an image set, so that every worker gets some."""
BATCH = 64
"""Images, by default; larger sets have parts of whole batches."""
SMALLEST_PART = 16
"""Images. Smaller parts of small sets: the last one is worth waiting for, where an image takes a core long."""


class StudyPlan:
    """The steps of a study under a root.

    Args:
        study: the experiment.
        root: where its results are written.
        surveyed: what is known about its images and models; without it they are surveyed.

    Raises:
        UsageError: a folder, model, site or cell is invalid.
        SaeRayError: there are no images.
    """

    def __init__(self, study: Study, root: Folder, surveyed: Survey | None = None):
        self.study = study
        self.root = root
        self.survey = surveyed or survey(study, root)
        models = self.survey.models
        self.encoder, self.judge = models.encoder, models.judge
        for cell in study.cells():
            for site in (cell.site, cell.score_site):
                with named_by("grid.sites", site.name):
                    check_site(self.encoder, site)
            cell.cell.check(site_width(self.encoder, cell.site), study.resources.train.shards)
        self.judge_site = Site("imported", label=JUDGE) if self.imported else Site(point=study.judge.point)
        if self.has_judge:
            with named_by("judge.point", study.judge.point):
                check_site(self.judge, self.judge_site)
        self.images = {name: self._images(name) for name in ("train", "heldout")}
        for cell in study.cells():
            self._check_inputs(cell)
        self.steerings = self._steerings()

    @property
    def imported(self) -> Imported | None:
        """What stands for images and models, where activations were imported."""
        return self.survey.imported

    @property
    def has_judge(self) -> bool:
        """Whether neurons get MonoSemanticity scores."""
        return self.imported is None or self.imported.judge is not None

    def check_imported(self) -> None:
        """Raises SaeRayError if a step is not there that only `sae-ray import` can write."""
        for one in self.extracts if self.imported else ():
            if not one.step.finished:
                raise SaeRayError(f"{one.step.folder} is not there; import it again by `sae-ray import`")

    def check_has_images(self, what: str) -> None:
        """Raises UsageError if there are no images, only imported activations."""
        if self.imported:
            raise UsageError(f"{what}: needs images, but only activations were imported into {self.root}")

    @property
    def plans(self) -> Iterator[AnyPlan]:
        """The plan of every step, in the order of work."""
        for images in self.images.values():
            yield from (ListPlan(step, images.n_images) for step in (images.step, images.labels_step))
        first = {score.step.name for score in self.scores_for_training}
        later = (score for score in self.scores if score.step.name not in first)
        yield from (*self.extracts, *self.scores_for_training, *self.trains, *self.evaluations, *later)
        yield from (*self.concepts, *self.steerings, *self.namings)
        if self.imported is None:
            yield self.pictures

    @property
    def steps(self) -> Iterator[Step]:
        """All steps, in the order of work."""
        return (plan.step for plan in self.plans)

    @cached_property
    def extracts(self) -> list[ExtractPlan]:
        """Sites on both image sets: what is trained on, evaluated and scored, the judge's embeddings (those of training
        images where SAEs are trained with them), the scorer's, and those that names are found with."""
        train, heldout = self.images["train"], self.images["heldout"]
        wanted: dict[str, ExtractPlan] = {}

        def want(plan: ExtractPlan) -> None:
            wanted.setdefault(plan.step.name, plan)

        for cell in self.study.cells():
            want(self._activations(train, cell.site))
            want(self._activations(heldout, cell.site))
            want(self._activations(heldout, cell.score_site))
            want(self._activations(self.images[self.study.scoring.pictures], cell.score_site))
            if cell.cell.monosemanticity:
                want(self._judged(train))
        if self._embeddings is not None:
            want(self._embeddings)
        if self.naming_space is not None:
            want(self.naming_space)
        if self.study.steering is not None:
            want(self.text_space)
        return list(wanted.values())

    @cached_property
    def trains(self) -> list[TrainPlan]:
        return [self._train(cell) for cell in self.study.cells()]

    @cached_property
    def scores_for_training(self) -> list[ScorePlan]:
        """Those of raw neurons that SAEs are trained with, which are therefore computed before."""
        read = (train.raw_scores for train in self.trains)
        return list({score.step.name: score for score in read if score is not None}.values())

    @cached_property
    def evaluations(self) -> list[EvaluatePlan]:
        return [self._evaluate(train) for train in self.trains]

    @cached_property
    def scores(self) -> list[ScorePlan]:
        """Raw neurons of every scored site first, then every SAE."""
        heldout, pictures = self.images["heldout"], self.images[self.study.scoring.pictures]
        scores: dict[str, ScorePlan] = {}
        raw = [(f"raw-{train.grid_cell.score_site.name}", None, train.grid_cell.score_site) for train in self.trains]
        saes = [(train.grid_cell.name, train, train.grid_cell.score_site) for train in self.trains]
        for name, sae, site in [*raw, *saes]:
            plans = [self._score(name, sae, self._activations(heldout, site), self._embeddings)]
            if pictures is not heldout:
                plans.append(self._score(name, sae, self._activations(pictures, site), None))
            for plan in plans:
                scores.setdefault(plan.step.name, plan)
        return list(scores.values())

    @cached_property
    def concepts(self) -> list[ConceptsPlan]:
        """Raw neurons of every scored site first, then every SAE; none without `[concepts]`."""
        settings = self.study.concepts
        if settings is None:
            return []
        return [self._concepts(settings, score) for score in self.scores if score.is_heldout]

    @cached_property
    def naming_space(self) -> ExtractPlan | None:
        """The held-out images in the space that names are found in: the encoder's, or else the judge's. None if neither
        embeds texts, or no names are asked for."""
        if self.study.concepts is None or "names" not in self.study.concepts.measures:
            return None
        if self.encoder.has_text:
            return self._activations(self.images["heldout"], Site("projection"))
        return self._embeddings if self.judge.has_text and self.judge_site.point == "projection" else None

    def _steerings(self) -> list[SteeringPlan]:
        """Every SAE of the layer that the study's LLaVA reads, except those trained on one vector per image."""
        steering = self.study.steering
        if steering is None:
            return []
        llava = self.survey.models.llava
        assert llava is not None, "a study with steering has its LLaVA surveyed"
        tower, layer = llava.tower, llava.layer
        if (tower.residual_width, tower.n_tokens) != (self.encoder.residual_width, self.encoder.n_tokens):
            raise UsageError(
                f"steering.llava = {tower.name!r}: its vision tower has {tower.n_tokens} tokens of width "
                f"{tower.residual_width}, the encoder {self.encoder.name} {self.encoder.n_tokens} of width "
                f"{self.encoder.residual_width}; use that tower as the encoder"
            )
        steered = [
            train
            for train in self.trains
            if (train.grid_cell.site.point, train.grid_cell.site.layer) == ("residual", layer)
            and train.grid_cell.site.tokens not in ("cls", "mean")
        ]
        if not steered:
            raise UsageError(
                f"steering.llava = {tower.name!r}: its language model reads layer {layer}, but no SAE is "
                f'trained on tokens of it; add a [[grid]] with sites = ["layer{layer}:random:2"]'
            )
        return [self._steering(steering, train, llava) for train in steered]

    @cached_property
    def namings(self) -> list[NamingPlan]:
        """Every SAE that the study's LLaVA names; none without `[naming]`."""
        naming, steering = self.study.naming, self.study.steering
        if naming is None or steering is None:
            return []
        steered = {one.name for one in self.steerings}
        found = []
        for train in self.trains:
            methods: tuple[NamingMethod, ...] = naming.methods
            if train.grid_cell.name not in steered:
                methods = tuple(one for one in methods if one != "steering")
            if methods:
                found.append(self._naming(naming, self.steerings[0].steering, methods, train))
        return found

    def passes(self, name: str) -> tuple[ScorePlan, ScorePlan]:
        """The scoring passes of a cell (`ScorePlan.name`) over held-out images and over those of the pictures."""
        by_images = {one.activations.images.name: one for one in self.scores if one.name == name}
        return by_images["heldout"], by_images[self.study.scoring.pictures]

    @cached_property
    def pictures(self) -> PicturesPlan:
        """Of the report on all cells."""
        return self._pictures(self.scores, self.steerings)

    def pictures_of(self, names: Collection[str]) -> PicturesPlan:
        """Of a report on some cells (`ScorePlan.name`), and on as much of steering as is finished.

        Cells whose SAE failed are never shown, so they make no difference.
        """

        def failed(score: ScorePlan) -> bool:
            return score.sae is not None and bool(score.sae.step.failure)

        def shown(one: SteeringPlan) -> bool:
            return one.name in names and one.step.finished

        scores = [score for score in self.scores if score.name in names or failed(score)]
        return self._pictures(scores, [one for one in self.steerings if shown(one) or failed(one.scores)])

    @cached_property
    def text_space(self) -> ExtractPlan:
        """The `pictures` images in a space shared with text: the scorer's, or without a scorer the encoder's."""
        self.check_has_images("search")
        pictures, site, steering = self.images[self.study.scoring.pictures], Site("projection"), self.study.steering
        config = EncoderConfig(steering.scorer, steering.scorer_revision) if steering else self.study.encoder
        info = self.survey.models.scorer or self.encoder
        with named_by("steering.scorer" if steering else "encoder.model", config.model):
            check_text_side(info)
            check_site(info, site)
        if (_identity(info), config.dtype) == (_identity(self.encoder), self.study.encoder.dtype):
            return self._activations(pictures, site)  # perhaps a site of the grid
        return self._extract(pictures, "steering.scorer", config, info, site, f"embeddings-{pictures.name}-scorer")

    def _images(self, name: str) -> ImagePlan:
        images, surveyed = self.study.images, self.survey.images[name]
        image_set = images.heldout if name == "heldout" and images.heldout else images.train
        return ImagePlan.of(self.root, name, image_set.path, surveyed, images.rendering)

    def _activations(self, images: ImagePlan, site: Site) -> ExtractPlan:
        label = f"activations-{images.name}-{site.name}"
        if self.imported is not None:
            return self._given(images, self.encoder, site, label, self.imported.sites[site.name])
        return self._extract(images, "encoder.model", self.study.encoder, self.encoder, site, label)

    @property
    def _embeddings(self) -> ExtractPlan | None:
        if self.imported is not None:
            heldout, judge, label = self.images["heldout"], self.imported.judge, "embeddings-heldout"
            return judge and self._given(heldout, self.judge, self.judge_site, label, judge)
        return self._judged(self.images["heldout"])

    def _given(
        self, images: ImagePlan, info: EncoderInfo, site: Site, label: str, imported: ImportedSite
    ) -> ExtractPlan:
        """What was imported of an image set, as the step that holds it."""
        step = Step(self.root, "extract", label, imported.configs[images.name])
        return ExtractPlan(images, "grid.sites", self.study.encoder, info, site, step)

    def _judged(self, images: ImagePlan) -> ExtractPlan:
        label = f"embeddings-{images.name}"
        return self._extract(images, "judge.model", self.study.judge, self.judge, self.judge_site, label)

    def _extract(
        self,
        images: ImagePlan,
        field: str,
        encoder: EncoderConfig | JudgeConfig,
        info: EncoderInfo,
        site: Site,
        label: str,
    ) -> ExtractPlan:
        config = {
            "manifest": images.step.name,
            "encoder": _identity(info),
            "site": site.name,
            "token_seed": self.study.seed if site.tokens.startswith("random") else None,
            "dtype": encoder.dtype,
            **({"compile": True} if encoder.compile else {}),
            **changed(self.study.images.rendering),
            **dataclasses.asdict(self.study.extraction),
            "images_per_part": images_per_part(self.study.extraction.images_per_part, images.n_images),
        }
        step = Step(self.root, "extract", label, config, defaults(Extraction))
        return ExtractPlan(images, field, encoder, info, site, step)

    def _train(self, grid_cell: GridCell) -> TrainPlan:
        activations = self._activations(self.images["train"], grid_cell.site)
        order = grid_cell.site.name + (f", seed {grid_cell.seed}" if grid_cell.seed else "")
        stream_seed = derived_seed(self.study.seed, order)
        cell = grid_cell.cell
        raw_scores = self._raw_scores(grid_cell.score_site) if cell.weights == "ms" else None
        table = self.survey.inputs[cell.weights].digest if cell.weights not in SOURCES else None
        embeddings = self._judged(activations.images) if cell.monosemanticity else None
        init = cell.training.init
        config = {
            "activations": activations.step.name,
            "cell": cell.identity(),
            "stream_seed": stream_seed,
            "shuffle_rows": self.study.shuffle_rows,
            **self._concepts_learnt(grid_cell, activations.images),
            "weights": raw_scores.step.name if raw_scores else table,
            "embeddings": embeddings.step.name if embeddings else None,
            "init": self.survey.inputs[init].digest if init is not None else None,
        }
        neutral = {"shuffle_rows": defaults(Study)["shuffle_rows"], "weights": None, "embeddings": None, "init": None}
        step = Step(self.root, "train", f"sae-{grid_cell.name}", config, neutral)
        return TrainPlan(grid_cell, activations, stream_seed, step, raw_scores, embeddings)

    def _raw_scores(self, site: Site) -> ScorePlan:
        activations = self._activations(self.images["heldout"], site)
        return self._score(f"raw-{site.name}", None, activations, self._embeddings)

    def _check_inputs(self, grid_cell: GridCell) -> None:
        """Raises UsageError if the cell is given weights or a start that do not fit its widths or its architecture."""
        cell, d_in = grid_cell.cell, site_width(self.encoder, grid_cell.site)
        check(self.has_judge or cell.weights != "ms", "grid.weights", cell.weights,
              "they come from a judge; import its embeddings by `sae-ray import … --judge FILE`")  # fmt: skip
        check(self.imported is None or not cell.monosemanticity, "grid.monosemanticity", cell.monosemanticity,
              "it needs the judge's embeddings of training images, which cannot be imported; leave it out")  # fmt: skip
        if (table := self.survey.inputs.get(cell.weights)) and table.d_in != d_in:
            raise UsageError(
                f"grid.weights = {cell.weights!r}: it has {table.d_in} dimensions, but the activations of "
                f"{grid_cell.site.name} have {d_in}; give each site a [[grid]] with a table of its own"
            )
        init = cell.training.init
        if init is not None:
            has, needs = self.survey.inputs[init], (cell.architecture, d_in, cell.d_sae(d_in))
            if (has.architecture, has.d_in, has.d_sae) != needs:
                raise UsageError(
                    f"training.init = {init!r}: it is a {has.architecture} SAE with d_in = {has.d_in}, d_sae = "
                    f"{has.d_sae}, but {grid_cell.name} is a {needs[0]} SAE with d_in = {d_in}, d_sae = {needs[2]}; "
                    "start from another SAE, or change grid.architectures, grid.sites or grid.expansions"
                )
        if cell.kind.starts_whitened(cell.settings):
            rows = self._activations(self.images["train"], grid_cell.site).rows
            if rows < ROWS_PER_DIMENSION * d_in:
                raise UsageError(
                    f'architectures.{cell.architecture}.init = "aip": {grid_cell.site.name} has {rows} training '
                    f"activations, but the inverse of their second moment needs {ROWS_PER_DIMENSION * d_in}; add "
                    "images or tokens"
                )

    def _evaluate(self, train: TrainPlan) -> EvaluatePlan:
        activations = self._activations(self.images["heldout"], train.grid_cell.site)
        config = {
            "sae": train.step.name,
            "activations": activations.step.name,
            **self._concepts_learnt(train.grid_cell, activations.images),
        }
        step = Step(self.root, "evaluate", f"fidelity-{train.grid_cell.name}", config)
        return EvaluatePlan(train, activations, step)

    def _concepts_learnt(self, grid_cell: GridCell, images: ImagePlan) -> dict[str, str]:
        """What decides which concepts the images show to a guided SAE; nothing for others."""
        settings = grid_cell.cell.settings
        if not grid_cell.cell.guided:
            return {}
        return {"concepts": self.survey.files.get(f"{settings.table}.concepts", images.labels_step.name)}

    def _score(
        self, name: str, sae: TrainPlan | None, activations: ExtractPlan, embeddings: ExtractPlan | None
    ) -> ScorePlan:
        config = {
            "sae": sae.step.name if sae else None,
            "activations": activations.step.name,
            "embeddings": embeddings.step.name if embeddings else None,
            "top_images": self.study.scoring.top_images,
        }
        label = f"scores-{activations.images.name}-{name}"
        step = Step(self.root, "score", label, config, {"top_images": defaults(Scoring)["top_images"]})
        return ScorePlan(name, sae, activations, embeddings, step)

    def _concepts(self, settings: Concepts, score: ScorePlan) -> ConceptsPlan:
        files, space = self.survey.files, self.naming_space
        counterpart = self._counterpart(score.sae) if score.sae and "stability" in settings.measures else None
        config = {
            "sae": score.sae.step.name if score.sae else None,
            "activations": score.activations.step.name,
            "labels": files.get("file", score.activations.images.labels_step.name),
            "embeddings": space.step.name if space else None,
            "vocabulary": files.get("vocabulary"),
            "counterpart": counterpart.step.name if counterpart else None,
            "settings": {name: value for name, value in changed(settings).items() if name not in CONCEPT_FILES},
            "seed": self.study.seed,
        }
        if settings.taxonomy is not None:
            config["taxonomy"] = files.get("taxonomy", settings.taxonomy)
        if settings.taxonomy is not None or "splicing" in settings.measures:  # by classes, whatever the concept file
            config["classes"] = score.activations.images.labels_step.name
        step = Step(self.root, "concepts", f"concepts-{score.name}", config)
        return ConceptsPlan(score.name, settings, score.sae, score.activations, space, counterpart, step)

    def _counterpart(self, sae: TrainPlan) -> TrainPlan | None:
        """The SAE of the next seed, after the last one that of the first; None if there is only one."""
        recipe = (sae.grid_cell.recipe, sae.grid_cell.score_site)
        alike = [one for one in self.trains if (one.grid_cell.recipe, one.grid_cell.score_site) == recipe]
        place = next(place for place, one in enumerate(alike) if one.step.name == sae.step.name)
        return alike[(place + 1) % len(alike)] if len(alike) > 1 else None

    def _steering(self, steering: Steering, train: TrainPlan, llava: LlavaInfo) -> SteeringPlan:
        site = train.grid_cell.score_site
        activations = self._activations(self.images["train"], site)
        scores = self._score(train.grid_cell.name, train, activations, None)
        raw_scores = self._score(f"raw-{site.name}", None, activations, None)
        heldout = self.images["heldout"]
        heldout_activations = self._activations(heldout, train.grid_cell.site)
        config = {
            "sae": train.step.name,
            "scores": scores.step.name,
            "raw_scores": raw_scores.step.name,
            "embeddings": self.text_space.step.name,
            "heldout": heldout_activations.step.name,
            "labels": [self.images[name].labels_step.name for name in ("train", "heldout")],
            "llava": _identity(llava.tower),
            "settings": {name: value for name, value in changed(steering).items() if name not in MODELS},
            "seed": self.study.seed,
        }
        step = Step(self.root, "steering", f"steering-{train.grid_cell.name}", config)
        # As in the hash: what is loaded is what was described, even if a branch or directory has changed since.
        revisions = {"revision": llava.tower.revision, "scorer_revision": self.text_space.info.revision}
        pinned = dataclasses.replace(steering, **revisions)
        return SteeringPlan(pinned, scores, raw_scores, self.text_space, heldout, heldout_activations, step)

    def _naming(
        self, naming: Naming, steering: Steering, methods: tuple[NamingMethod, ...], train: TrainPlan
    ) -> NamingPlan:
        llava = self.survey.models.llava
        assert llava is not None, "a study with steering has its LLaVA surveyed"
        heldout, scores = self.passes(train.grid_cell.name)
        used = (*NAMING, *SET) if "steering" in methods else NAMING
        config = {
            "sae": train.step.name,
            "scores": scores.step.name,
            "heldout": heldout.activations.step.name,
            "labels": scores.activations.images.labels_step.name,
            "llava": _identity(llava.tower),
            "methods": list(methods),
            "images": naming.images,
            "n_latents": naming.n_latents,
            "settings": {name: value for name, value in changed(steering).items() if name in used},
            "seed": self.study.seed,
        }
        neutral = {"images": defaults(Naming)["images"]}
        step = Step(self.root, "naming", f"naming-{train.grid_cell.name}", config, neutral)
        return NamingPlan(steering, methods, naming.images, naming.n_latents, scores, heldout.activations, step)

    def _pictures(self, scores: list[ScorePlan], steerings: list[SteeringPlan]) -> PicturesPlan:
        self.check_has_images("pictures")
        config = {
            "scores": [one.step.name for one in scores],
            "steering": [one.step.name for one in steerings],
            "min_images": self.study.scoring.min_images,
            "encoder": _identity(self.encoder),
            "dtype": self.study.encoder.dtype,
        }
        return PicturesPlan(scores, steerings, Step(self.root, "pictures", "pictures", config))


def images_per_part(at_most: int, n_images: int) -> int:
    """Small sets have smaller parts, about `FEWEST_PARTS` of them where that leaves `SMALLEST_PART` images in each."""
    unit = BATCH if n_images > FEWEST_PARTS * BATCH else SMALLEST_PART
    return min(at_most, unit * max(1, -(-n_images // (FEWEST_PARTS * unit))))


def _identity(info: EncoderInfo) -> list[str | None]:
    """What identifies an encoder: the digest of a directory, wherever it is, or else name and revision."""
    return [info.revision] if is_digest(info.revision) else [info.model, info.revision]
