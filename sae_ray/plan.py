"""What a study amounts to: its steps, what they read, what they need. Nothing is computed here and nothing written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from sae_ray.encoders import EncoderInfo, check_site, describe_encoder, rows_per_image, site_width
from sae_ray.errors import SaeRayError, UsageError
from sae_ray.files import Folder
from sae_ray.images import list_images, manifest_digest, select_split
from sae_ray.sites import Site
from sae_ray.steps import Step
from sae_ray.study import EncoderConfig, GridCell, ImageSet, JudgeConfig, Study, derived_seed


@dataclass(frozen=True)
class ImagePlan:
    """One image set and its manifest."""

    name: str
    """`train` or `heldout`."""
    folder: Folder
    manifest: pa.Table
    step: Step


@dataclass(frozen=True)
class ExtractPlan:
    """The activations of one site, or the judge's embeddings, on one image set."""

    images: ImagePlan
    encoder: EncoderConfig | JudgeConfig
    info: EncoderInfo
    site: Site
    step: Step

    @property
    def rows(self) -> int:
        """Rows if no image is rejected."""
        return len(self.images.manifest) * rows_per_image(self.info, self.site)

    @property
    def width(self) -> int:
        return site_width(self.info, self.site)

    @property
    def bytes(self) -> int:
        """About what the step takes on disk."""
        return self.rows * (self.width * {"float16": 2, "float32": 4}[self.step.config["store_dtype"]] + 10)


@dataclass(frozen=True)
class TrainPlan:
    """One SAE."""

    grid_cell: GridCell
    activations: ExtractPlan
    heldout: ExtractPlan
    stream_seed: int
    step: Step

    @property
    def d_sae(self) -> int:
        return self.grid_cell.cell.d_sae(self.activations.width)

    @property
    def bytes(self) -> int:
        """About what training takes on disk at most: two checkpoints of weights and Adam's moments, and the SAE."""
        parameters = 2 * self.activations.width * self.d_sae
        return 4 * parameters * (2 * 3 + 1)

    @property
    def flops(self) -> float:
        """Of the encoder's products, which bound the work from below."""
        training = self.grid_cell.cell.training
        return 2.0 * self.activations.width * self.d_sae * training.batch_size * training.steps


@dataclass(frozen=True)
class ScorePlan:
    """One pass over (SAE or raw activations, image set)."""

    name: str
    """Name of the cell, or `raw-<site>`."""
    sae: TrainPlan | None
    activations: ExtractPlan
    embeddings: ExtractPlan | None
    """The judge's; None for a pass that only collects pictures."""
    step: Step

    @property
    def inputs(self) -> list[Step]:
        """The steps that are read."""
        read = (self.activations, self.embeddings, self.sae)
        return [plan.step for plan in read if plan is not None]

    @property
    def neurons(self) -> int:
        return self.sae.d_sae if self.sae else self.activations.width

    @property
    def bytes(self) -> int:
        """About what both tables take on disk."""
        return self.neurons * (72 + 22 * self.step.config["top_images"])

    @property
    def flops(self) -> float:
        """Of the encoder's product."""
        return 2.0 * self.activations.rows * self.activations.width * self.neurons if self.sae else 0.0


class StudyPlan:
    """The steps of a study under a root.

    Lists the images and reads the encoders' configurations, but no weights and no image.

    Raises:
        UsageError: a folder, encoder, site or cell that cannot be.
        SaeRayError: no images.
    """

    def __init__(self, study: Study, root: Folder):
        self.study = study
        self.root = root
        self.encoder = describe_encoder(study.encoder.model, study.encoder.revision)
        for cell in study.cells():
            for site in (cell.site, cell.score_site):
                check_site(self.encoder, site)
            cell.cell.check(site_width(self.encoder, cell.site))
        self.judge_site = Site(point=study.judge.point)
        self.judge = describe_encoder(study.judge.model, study.judge.revision)
        check_site(self.judge, self.judge_site)
        self.images = {images.name: images for images in self._image_plans()}

    @property
    def steps(self) -> Iterator[Step]:
        """All steps, in the order in which they are done."""
        for plan in (*self.images.values(), *self.extracts, *self.trains, *self.scores):
            yield plan.step

    @cached_property
    def extracts(self) -> list[ExtractPlan]:
        """Sites on both image sets: what is trained on, what is scored, what fidelity is measured on, the judge."""
        train, heldout = self.images["train"], self.images["heldout"]
        wanted: dict[str, ExtractPlan] = {}

        def want(plan: ExtractPlan) -> None:
            wanted.setdefault(plan.step.name, plan)

        for cell in self.study.cells():
            want(self._activations(train, cell.site))
            want(self._activations(heldout, cell.site))
            want(self._activations(heldout, cell.score_site))
            want(self._activations(self.images[self.study.scoring.pictures], cell.score_site))
        want(self._embeddings)
        return list(wanted.values())

    @cached_property
    def trains(self) -> list[TrainPlan]:
        return [self._train(cell) for cell in self.study.cells()]

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

    def _image_plans(self) -> Iterator[ImagePlan]:
        images = self.study.images
        listed = _list("images.train", images.train)
        if images.heldout is not None:
            tables = {
                "train": (images.train, listed),
                "heldout": (images.heldout, _list("images.heldout", images.heldout)),
            }
        else:
            fraction = images.heldout_fraction
            tables = {part: (images.train, select_split(listed, fraction, part)) for part in ("train", "heldout")}
        for name, (image_set, manifest) in tables.items():
            if not len(manifest):
                raise SaeRayError(
                    f"images.{name}: no image is left in {image_set.path}; add images or change images.heldout_fraction"
                )
            config = {"manifest": manifest_digest(manifest)}
            step = Step(self.root, "manifest", f"manifest-{name}", config)
            yield ImagePlan(name, Folder(image_set.path), manifest, step)

    def _activations(self, images: ImagePlan, site: Site) -> ExtractPlan:
        return self._extract(images, self.study.encoder, self.encoder, site, f"activations-{images.name}-{site.name}")

    @property
    def _embeddings(self) -> ExtractPlan:
        heldout = self.images["heldout"]
        return self._extract(heldout, self.study.judge, self.judge, self.judge_site, "embeddings-heldout")

    def _extract(
        self, images: ImagePlan, encoder: EncoderConfig | JudgeConfig, info: EncoderInfo, site: Site, label: str
    ) -> ExtractPlan:
        config = {
            "manifest": images.step.name,
            "encoder": _identity(info),
            "site": site.name,
            "token_seed": self.study.seed if site.tokens.startswith("random") else None,
            "dtype": encoder.dtype,
            "store_dtype": self.study.extraction.store_dtype,
            "images_per_part": self.study.extraction.images_per_part,
        }
        return ExtractPlan(images, encoder, info, site, Step(self.root, "extract", label, config))

    def _train(self, grid_cell: GridCell) -> TrainPlan:
        activations = self._activations(self.images["train"], grid_cell.site)
        heldout = self._activations(self.images["heldout"], grid_cell.site)
        stream_seed = derived_seed(self.study.seed, grid_cell.site.name)
        config = {
            "activations": activations.step.name,
            "heldout": heldout.step.name,
            "cell": dataclasses.asdict(grid_cell.cell),
            "stream_seed": stream_seed,
            "shuffle_rows": self.study.shuffle_rows,
        }
        step = Step(self.root, "train", f"sae-{grid_cell.name}", config)
        return TrainPlan(grid_cell, activations, heldout, stream_seed, step)

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
        return ScorePlan(name, sae, activations, embeddings, Step(self.root, "score", label, config))


def _list(field: str, images: ImageSet) -> pa.Table:
    try:
        return list_images(Folder(images.path), images.labels)
    except UsageError as error:
        raise UsageError(f"{field}: {error}") from error
    except SaeRayError as error:
        raise SaeRayError(f"{field}: {error}") from error


def _identity(info: EncoderInfo) -> list[str | None]:
    """What makes an encoder the same: the digest of a local directory wherever it lies, else name and revision."""
    is_digest = info.revision is not None and len(info.revision) == 64
    return [info.revision] if is_digest else [info.model, info.revision]
