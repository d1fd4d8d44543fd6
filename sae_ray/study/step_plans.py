"""The plan of a step of each stage: what it reads, its rows, and what it needs. Nothing is computed or written here."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import pyarrow as pa

from sae_ray.concepts.config import Concepts, Patches
from sae_ray.encoders.info import EncoderInfo, readout, rows_per_image, site_width
from sae_ray.encoders.sites import Site
from sae_ray.errors import SaeRayError
from sae_ray.images.rendering import Rendering
from sae_ray.steering.config import NamingMethod, ShownImages, Steering
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step
from sae_ray.store.tables import StoredTable
from sae_ray.study.config import EncoderConfig, GridCell, JudgeConfig
from sae_ray.study.survey import SurveyedImages

DENSE_COPIES = 5
"""Matrices of the size of a batch's pre-activations that a step of an architecture without a selection holds."""


@dataclass(frozen=True)
class ImagePlan:
    """One image set: its manifest, and its labels."""

    name: str
    """`train` or `heldout`."""
    path: str
    """Of the folder, as the study gives it."""
    surveyed: SurveyedImages
    step: Step
    """The manifest: which images there are."""
    labels_step: Step
    """What they are labelled as."""
    rendering: Rendering = field(default_factory=Rendering)
    """How their pixels become RGB."""

    @classmethod
    def of(
        cls, root: Folder, name: str, path: str, surveyed: SurveyedImages, rendering: Rendering | None = None
    ) -> ImagePlan:
        """The steps are named by what was surveyed."""
        step = Step(root, "manifest", f"manifest-{name}", {"images": surveyed.manifest_digest})
        config = {"manifest": step.name, "labels": surveyed.labels_digest}
        labels_step = Step(root, "labels", f"labels-{name}", config)
        return cls(name, path, surveyed, step, labels_step, rendering or Rendering())

    @cached_property
    def folder(self) -> Folder:
        """Opened when it is needed: `status`, for one, works while the store of the images is away."""
        return Folder(self.path)

    @property
    def n_images(self) -> int:
        return self.surveyed.n_images

    @property
    def lists(self) -> list[tuple[Step, Literal["manifest", "labels"]]]:
        """The steps of both lists."""
        return [(self.step, "manifest"), (self.labels_step, "labels")]

    def write(self, name: Literal["manifest", "labels"]) -> None:
        """Finishes the step of one of the lists, which this process holds."""
        started, table = time.monotonic(), self.stored(name)
        step = self.step if name == "manifest" else self.labels_step
        step.folder.write_copy(f"{name}.parquet", table.folder, table.name)
        skipped = {"skipped": self.surveyed.skipped} if name == "manifest" else {}
        step.finish(time.monotonic() - started, {"images": table.num_rows, **skipped})

    def stored(self, name: Literal["manifest", "labels"]) -> StoredTable:
        """One of the lists, to be read piece by piece. Raises SaeRayError when it is neither surveyed nor written."""
        if self.surveyed.found:
            return getattr(self.surveyed.found, name)
        step = self.step if name == "manifest" else self.labels_step
        if not step.finished:
            raise SaeRayError(f"{step.folder} does not exist yet; run the extract stage first")
        return StoredTable(step.folder, f"{name}.parquet")

    @cached_property
    def manifest(self) -> pa.Table:
        """`MANIFEST_SCHEMA`, all of it in memory. Raises as `stored`."""
        return self.stored("manifest").read()

    @cached_property
    def labels(self) -> pa.Table:
        """`LABELS_SCHEMA`, row by row as the manifest, all of it in memory. Raises as `stored`."""
        return self.stored("labels").read()


@dataclass(frozen=True)
class ListPlan:
    """The manifest or the labels of an image set."""

    step: Step
    rows: int

    @property
    def bytes(self) -> int:
        """Approximate size on disk."""
        return 60 * self.rows

    @property
    def flops(self) -> None:
        """Nothing to speak of."""


@dataclass(frozen=True)
class ExtractPlan:
    """The activations of one site, or the judge's embeddings, on one image set."""

    images: ImagePlan
    field: str
    """The field of the study that names the encoder, such as `judge.model`."""
    encoder: EncoderConfig | JudgeConfig
    info: EncoderInfo
    site: Site
    step: Step

    @property
    def rows(self) -> int:
        """Rows if no image is rejected."""
        return self.images.n_images * rows_per_image(self.info, self.site)

    @property
    def inputs(self) -> list[Step]:
        """The steps that are read: none, since the stage lists the images itself."""
        return []

    @property
    def width(self) -> int:
        return site_width(self.info, self.site)

    @property
    def bytes(self) -> int:
        """Approximate size on disk."""
        return self.rows * (self.width * {"float16": 2, "float32": 4}[self.step.config["store_dtype"]] + 10)

    @property
    def flops(self) -> None:
        """Not known: it depends on the encoder."""


@dataclass(frozen=True)
class TrainPlan:
    """One SAE."""

    grid_cell: GridCell
    activations: ExtractPlan
    stream_seed: int
    step: Step
    raw_scores: ScorePlan | None = None
    """Of the raw neurons, where dimensions are weighed by them."""
    embeddings: ExtractPlan | None = None
    """The judge's, of the training images, where MonoSemanticity is a goal."""

    @property
    def inputs(self) -> list[Step]:
        """The steps that are read."""
        read = (self.activations, self.raw_scores, self.embeddings)
        labels = _labels_read(self.grid_cell, self.activations.images)
        return [*(one.step for one in read if one is not None), *labels]

    @property
    def d_sae(self) -> int:
        return self.grid_cell.cell.d_sae(self.activations.width)

    @property
    def rows(self) -> int:
        """Rows that are trained on, each as often as it is used."""
        training = self.grid_cell.cell.training
        return training.batch_size * training.steps

    @property
    def weight_bytes(self) -> int:
        """Of the weights in memory."""
        return 4 * 2 * self.activations.width * self.d_sae

    @property
    def held_bytes(self) -> int:
        """Of memory from step to step: weights and moments."""
        return 3 * self.weight_bytes

    @property
    def step_bytes(self) -> int:
        """Of memory within a step besides: gradients, and the pre-activations of a batch."""
        pre = 4 * self.grid_cell.cell.training.batch_size * self.d_sae
        # Those that do not select train densely: codes, which of them are active, and gradients of both are as large.
        copies = 1 if self.grid_cell.cell.kind.scores_batches else DENSE_COPIES
        return self.weight_bytes + copies * pre

    @property
    def bytes(self) -> int:
        """Approximate size on disk at most: two checkpoints of weights and Adam's moments, and the SAE."""
        return self.weight_bytes * (2 * 3 + 1)

    @property
    def flops(self) -> float:
        """FLOPs of the encoder's products, a lower bound of the work."""
        return 2.0 * self.activations.width * self.d_sae * self.rows


@dataclass(frozen=True)
class EvaluatePlan:
    """One SAE on held-out activations: how faithful it is, and how its latents fire."""

    sae: TrainPlan
    activations: ExtractPlan
    step: Step

    @property
    def inputs(self) -> list[Step]:
        """The steps that are read."""
        return [self.activations.step, self.sae.step, *_labels_read(self.sae.grid_cell, self.activations.images)]

    @property
    def rows(self) -> int:
        return self.activations.rows

    @property
    def bytes(self) -> int:
        """Approximate size on disk of the table of latents."""
        return 32 * self.sae.d_sae

    @property
    def flops(self) -> float:
        """FLOPs of the encoder's product."""
        return 2.0 * self.rows * self.activations.width * self.sae.d_sae


@dataclass(frozen=True)
class ScorePlan:
    """One pass over (SAE or raw activations, image set)."""

    name: str
    """Name of the cell, or `raw-<site>`."""
    sae: TrainPlan | None
    activations: ExtractPlan
    embeddings: ExtractPlan | None
    """The judge's; None for a pass that only collects pictures, and where there is no judge."""
    step: Step

    @property
    def is_heldout(self) -> bool:
        """Whether this is the pass over held-out images, and not one that only collects pictures of others."""
        return self.activations.images.name == "heldout"

    @property
    def inputs(self) -> list[Step]:
        """The steps that are read."""
        read = (self.activations, self.embeddings, self.sae)
        return [plan.step for plan in read if plan is not None]

    def check_scored(self) -> None:
        """Raises SaeRayError if there are no tables to read yet."""
        if self.step.failure or not self.step.finished:
            raise SaeRayError(f"{self.step.label} is not there yet; run the score stage first")

    @property
    def neurons(self) -> int:
        return self.sae.d_sae if self.sae else self.activations.width

    @property
    def weight_bytes(self) -> int:
        """Of the SAE in memory."""
        return self.sae.weight_bytes if self.sae else 0

    @property
    def rows(self) -> int:
        return self.activations.rows

    @property
    def bytes(self) -> int:
        """Approximate size on disk of the tables, at most."""
        return self.neurons * (72 + 22 * self.step.config["top_images"] + 8 * 32)

    @property
    def flops(self) -> float:
        """FLOPs of the encoder's product."""
        return 2.0 * self.rows * self.activations.width * self.neurons if self.sae else 0.0


@dataclass(frozen=True)
class ConceptsPlan:
    """What the neurons of one SAE, or the raw ones of a site, mean: measured on held-out images."""

    name: str
    """Name of the cell, or `raw-<site>`."""
    settings: Concepts
    sae: TrainPlan | None
    activations: ExtractPlan
    embeddings: ExtractPlan | None
    """The same images in a space shared with texts; None where no model has one, or names are not asked for."""
    counterpart: TrainPlan | None
    """The SAE of the next seed, for stability; None without one."""
    step: Step

    @property
    def images(self) -> ImagePlan:
        return self.activations.images

    @property
    def patches(self) -> Patches | None:
        """How tokens are laid out at a site with all of them."""
        info, site = self.activations.info, self.activations.site
        return Patches(*info.patch_grid, int(info.has_cls)) if site.tokens == "all" else None

    @property
    def readout(self) -> Site | None:
        """The output that is classified with the SAE's reconstruction in place; None where that is not measured."""
        if self.sae is None or "splicing" not in self.settings.measures:
            return None
        return readout(self.activations.info, self.sae.grid_cell.site)

    @property
    def is_zero_shot(self) -> bool:
        """Whether that output is classified by names of classes, where these have any: the encoder embeds texts."""
        return self.readout == Site("projection") and self.activations.info.has_text

    @property
    def group_sizes(self) -> list[int]:
        """Neurons of each Matryoshka level; of others, all in one."""
        return self.sae.grid_cell.cell.group_sizes(self.sae.activations.width) if self.sae else [self.neurons]

    @property
    def inputs(self) -> list[Step]:
        """The steps that are read."""
        trained_on = self.sae.activations if self.sae and self.readout else None
        read = (self.activations, self.embeddings, self.sae, self.living_counterpart, trained_on)
        return [*(plan.step for plan in read if plan is not None), self.images.step, self.images.labels_step]

    @property
    def living_counterpart(self) -> TrainPlan | None:
        """None also if its training failed."""
        return None if self.counterpart is None or self.counterpart.step.failure else self.counterpart

    @property
    def neurons(self) -> int:
        return self.sae.d_sae if self.sae else self.activations.width

    @property
    def rows(self) -> int:
        return self.activations.rows

    @property
    def bytes(self) -> int:
        """Approximate size on disk: the columns of a neuron, and ten names."""
        return 400 * self.neurons

    @property
    def flops(self) -> float:
        """FLOPs of the encoder's product."""
        return 2.0 * self.rows * self.activations.width * self.neurons if self.sae else 0.0


@dataclass(frozen=True)
class SteeringPlan:
    """A LLaVA steered by one SAE. Concepts are found on training images, steering is judged on held-out ones."""

    steering: Steering
    scores: ScorePlan
    """Of the SAE, on training images."""
    raw_scores: ScorePlan
    """Of the raw neurons there."""
    embeddings: ExtractPlan
    """The scorer's, of the training images."""
    heldout: ImagePlan
    heldout_activations: ExtractPlan
    """Say which held-out images could be read."""
    step: Step

    @property
    def train(self) -> ImagePlan:
        """The training images."""
        return self.scores.activations.images

    @property
    def name(self) -> str:
        """Name of the cell."""
        return self.scores.name

    @property
    def sae(self) -> TrainPlan:
        assert self.scores.sae is not None, "raw neurons are steered beside an SAE, never alone"
        return self.scores.sae

    @property
    def inputs(self) -> list[Step]:
        """The steps that are read."""
        read = (self.heldout, self.heldout_activations, self.scores.activations, self.embeddings, self.sae, self.scores)
        return [*(plan.step for plan in read), self.raw_scores.step, self.train.labels_step, self.heldout.labels_step]

    @property
    def rows(self) -> int:
        """Approximate number of answers kept, at most: latents, directions and profiles are tried with every question.

        Answers that only serve to choose the scales of directions are not counted.
        """
        images = min(self.steering.n_images, self.heldout.n_images)
        prompts = 1 + len(self.steering.other_prompts)
        latents = self.steering.n_image_latents
        white = 1 + 3 * self.steering.n_white_latents + 2 * latents
        return white + images * prompts * (2 + 3 * latents)

    @property
    def bytes(self) -> int:
        """Approximate size on disk, including the intermediate parts."""
        return 200 * self.rows

    @property
    def flops(self) -> None:
        """Not known: it depends on the LLaVA."""


@dataclass(frozen=True)
class NamingPlan:
    """A LLaVA names the latents of one SAE. Names rest on training images and are tried on held-out ones."""

    steering: Steering
    methods: tuple[NamingMethod, ...]
    """Those that this SAE can be named by."""
    images: ShownImages
    n_latents: int
    scores: ScorePlan
    """Of the SAE, on training images."""
    heldout: ExtractPlan
    """Activations of the held-out images."""
    step: Step

    @property
    def train(self) -> ImagePlan:
        """The training images."""
        return self.scores.activations.images

    @property
    def name(self) -> str:
        """Name of the cell."""
        return self.scores.name

    @property
    def sae(self) -> TrainPlan:
        assert self.scores.sae is not None, "raw neurons are not named"
        return self.scores.sae

    @property
    def inputs(self) -> list[Step]:
        """The steps that are read."""
        read = (self.train, self.heldout.images, self.scores.activations, self.heldout, self.sae, self.scores)
        return [*(plan.step for plan in read), self.train.labels_step, self.heldout.images.labels_step]

    @property
    def rows(self) -> int:
        """Approximate number of answers, at most."""
        latents = min(self.n_latents, self.scores.neurons)
        shown = 2 * latents if self.images == "grid" else min(16 * latents, self.train.n_images)
        tried = min(32 * latents, self.heldout.images.n_images)
        return shown + tried + latents * ("steering" in self.methods)

    @property
    def bytes(self) -> int:
        """Approximate size on disk, including the intermediate parts."""
        return 60 * self.rows

    @property
    def flops(self) -> None:
        """Not known: it depends on the LLaVA."""


@dataclass(frozen=True)
class PicturesPlan:
    """The thumbnails and heat maps of a report on some cells."""

    scores: list[ScorePlan]
    """Both passes of every cell."""
    steerings: list[SteeringPlan]
    step: Step

    @property
    def inputs(self) -> list[Step]:
        """The steps that are read, but for those of SAEs that failed, which are not shown."""
        scores = [one.step for one in self.scores if one.sae is None or not one.sae.step.failure]
        return [*scores, *(one.step for one in self.steerings if not one.sae.step.failure)]

    @property
    def rows(self) -> int:
        """Top images, each as often as it is shown."""
        return sum(score.neurons * score.step.config["top_images"] for score in self.scores)

    @property
    def bytes(self) -> int:
        """Approximate size on disk: one thumbnail of some kilobytes per image at most."""
        images = {score.activations.images.name: score.activations.images.n_images for score in self.scores}
        return 4000 * min(self.rows, sum(images.values()))

    @property
    def flops(self) -> None:
        """Not known: it depends on the encoder."""


AnyPlan = (
    ListPlan
    | ExtractPlan
    | TrainPlan
    | EvaluatePlan
    | ScorePlan
    | ConceptsPlan
    | SteeringPlan
    | NamingPlan
    | PicturesPlan
)


def _labels_read(grid_cell: GridCell, images: ImagePlan) -> list[Step]:
    return [images.step, images.labels_step] if grid_cell.cell.guided else []
