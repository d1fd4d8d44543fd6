"""A study: a whole experiment as one frozen, validated object. Every default and every bound stands here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from sae_ray.concepts.config import Concepts
from sae_ray.config import STRICT, Amount, Count, Dtype
from sae_ray.encoders.info import IMPORTED
from sae_ray.encoders.sites import Site
from sae_ray.errors import check
from sae_ray.images.rendering import Rendering, rgb
from sae_ray.sae.architectures import ArchitectureSettings, architecture
from sae_ray.sae.architectures.guided_topk import LABELS
from sae_ray.sae.config import Cell, TrainingConfig
from sae_ray.sae.trackers import TRACKERS
from sae_ray.sae.weighing import UNIFORM, label_of
from sae_ray.seeds import derived_seed
from sae_ray.steering.config import Naming, Steering


@dataclass(frozen=True)
class ImageSet:
    """A folder of images."""

    __pydantic_config__ = STRICT

    path: str
    """The folder: a local path (`~` is your home) or a URI such as `s3://bucket/images`."""
    labels: str = "auto"
    """`auto` (the sub-folders are classes, if there are any), `none`, or the path of a label file: a CSV or TSV with
    `image_id,label`, Kaggle's `LOC_val_solution.csv`, or the ImageNet devkit's ground truth."""


@dataclass(frozen=True)
class Images:
    """The images that SAEs are trained on, and those they are evaluated on. Left out with `[encoder]`."""

    __pydantic_config__ = STRICT

    train: ImageSet
    """The training images."""
    heldout: ImageSet | None = None
    """Images for metrics and scores. Without it a share of the training images is held out."""
    heldout_fraction: Annotated[float, Gt(0), Lt(1)] = 0.1
    """Share of the training images to hold out if `heldout` is not given."""
    max_bad_fraction: Annotated[float, Ge(0), Le(1)] = 0.01
    """Maximum share of unreadable images; with more, extraction fails."""
    background: str | None = None
    """A colour, such as `white` or `#808080`, that transparent images are composed over. Default: transparency is
    dropped, as CLIP's own preprocessing does, and the colours under it show."""
    white: Count | None = None
    """The value that is white in grey images of more than 8 bits: 4095 for 12-bit values. Default: what the file
    declares, else the largest that fits in its bits."""

    def __post_init__(self):
        try:
            _ = self.rendering
        except ValueError:
            check(False, "images.background", self.background, "give a colour, such as white or #808080")

    @property
    def rendering(self) -> Rendering:
        """What is said here about pixels."""
        return Rendering(None if self.background is None else rgb(self.background), self.white)


@dataclass(frozen=True)
class EncoderConfig:
    """The vision encoder to interpret. Without it SAEs are trained on what `sae-ray import` put under the root."""

    __pydantic_config__ = STRICT

    model: str
    """A hub id, `open_clip:<architecture>/<pretrained tag>`, `timm:<model>.<pretrained tag>`, `open_clip:` or `timm:`
    followed by `hf-hub:<id>` or `local-dir:<directory>`, or a directory: a path that every node has, or a URI such as
    `s3://bucket/folder`."""
    revision: str | None = None
    """Commit, tag or branch of what is on the hub."""
    dtype: Dtype = "float32"
    """Dtype of the forward pass; float32 on CPU."""
    compile: bool = False
    """Compiles the blocks of the transformer before activations are extracted, on GPUs only, which need a C compiler:
    CLIP ViT-L/14-336 then encodes 20 % more images per second on an H200 (`docs/speed.md`). Activations change by
    rounding."""


@dataclass(frozen=True)
class JudgeConfig:
    """A second encoder, whose embeddings the MonoSemanticity score is computed with."""

    __pydantic_config__ = STRICT

    model: str = "facebook/dinov2-base"
    """As `encoder.model`."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    point: Literal["pooled", "projection"] = "pooled"
    """Which image embedding to use: the pooled output (DINOv2, timm) or the projection (CLIP)."""
    dtype: Dtype = "float32"
    """Dtype of the forward pass."""
    compile: bool = False
    """As `encoder.compile`."""


@dataclass(frozen=True)
class Grid:
    """SAEs to train: the product of sites, architectures, expansions and sparsities. A study may have several grids."""

    __pydantic_config__ = STRICT

    sites: tuple[str, ...]
    """Where activations are taken from the encoder: `layer<L>:<tokens>` is the residual stream after block L (counted
    from 0), with tokens `cls`, `mean`, `all` or `random:<n>`; `layer<L>.mlp:<tokens>` is the output of that block's
    MLP; or `projection`, or `pooled`. Of imported activations the name that they were given."""
    architectures: tuple[str, ...] = ("batch_topk",)
    """Kinds of autoencoder, such as `batch_topk` or `relu`."""
    expansions: tuple[float, ...] = (8.0,)
    """Widths as multiples of the activation's width."""
    k: tuple[int, ...] = (20,)
    """Average number of active latents per row, for the TopK family."""
    sparsity: tuple[float, ...] = ()
    """Sparsity coefficients, for architectures with a penalty: `relu` (L1), `jumprelu` (L0)."""
    seeds: tuple[Annotated[int, Ge(0)], ...] = (0,)
    """Every SAE is trained once for each, from another start and in another order of the data: `[0, 1]` shows which
    latents are found again (`stability` in `[concepts]`)."""
    score_tokens: str | None = None
    """Tokens to score on, such as `cls` or `all`. Default: the tokens that were trained on."""
    weights: tuple[str, ...] = (UNIFORM,)
    """By what the dimensions of the activation count in the loss: `uniform` (all alike), `ms` (the MonoSemanticity of
    the raw coordinate), `variance`, `inverse_variance`, or the path of a parquet table with the columns `dimension` and
    `s`. An SAE is trained for each (`docs/methods.md`)."""
    alpha: Annotated[float, Ge(0), Lt(math.inf)] = 0.5
    """The weight of a dimension is what it counts by, to this power; with `inverse_variance` and 0.5 every coordinate
    counts as if its variance were 1."""
    monosemanticity: tuple[Annotated[float, Ge(0), Lt(math.inf)], ...] = (0.0,)
    """Weights of a loss by which latents become active on training images that are alike to the judge, who then embeds
    these, too; for architectures that select latents. An SAE is trained for each (`docs/methods.md`)."""

    def __post_init__(self):
        kinds = [architecture(name, "grid.architectures") for name in self.architectures]
        by_k = [kind.name for kind in kinds if kind.tuned_by == "k"]
        by_sparsity = [kind.name for kind in kinds if kind.tuned_by == "sparsity"]
        for name in ("sites", "architectures", "expansions", "seeds", "weights", "monosemanticity"):
            check(bool(getattr(self, name)), f"grid.{name}", [], "name at least one")
        check(bool(self.k) or not by_k, "grid.k", [], f"{', '.join(by_k)}: name at least one")
        check(bool(self.sparsity) or not by_sparsity, "grid.sparsity", [],
              f"{', '.join(by_sparsity)}: name at least one coefficient")  # fmt: skip
        check(bool(by_sparsity) or not self.sparsity, "grid.sparsity", list(self.sparsity),
              f"{', '.join(by_k)} has no sparsity coefficient; leave it out")  # fmt: skip


@dataclass(frozen=True)
class Extraction:
    """How activations are stored."""

    __pydantic_config__ = STRICT

    store_dtype: Literal["float16", "float32"] = "float16"
    """Dtype on disk."""
    images_per_part: Count = 512
    """Images per part at most; sets of a few thousand images have smaller parts, so that every worker gets some. After
    a kill unfinished parts are redone, up to two per encoder actor, and one per task that decodes."""
    pixels: Literal["exact", "fast", "gpu"] = "exact"
    """`exact` gives the same pixels as the encoder's own processor (on Pillow). `fast` decodes JPEGs at a half, quarter
    or eighth of their size if both sides stay at least twice as long as the encoder's input, and resizes with a
    vectorised kernel. Activations change by less than 1 % of their distance from the mean on half of the images, and by
    less than 2 % on 99 of 100 (measured with the embedded CLIP and JPEGs at half size; `docs/speed.md`). `gpu` has the
    encoder's GPU decode baseline JPEGs at full size, and resize and crop them; all else is decoded as by `exact`. It
    pays where a GPU has few cores beside it, and needs torchvision with nvJPEG."""


@dataclass(frozen=True)
class Scoring:
    """How neurons are scored."""

    __pydantic_config__ = STRICT

    top_images: Count = 16
    """How many of its most activating images to keep per neuron."""
    pictures: Literal["heldout", "train"] = "heldout"
    """The image set that top images are taken from. Scores always use held-out images."""
    min_images: Annotated[int, Ge(2)] = 2
    """Neurons active on fewer held-out images are left out of the summary; 2 as in the paper."""


@dataclass(frozen=True)
class ExtractResources:
    """Resources for extraction."""

    __pydantic_config__ = STRICT

    workers: Count | None = None
    """Number of encoder actors. Default: one per GPU. Without GPUs, as many as keep all CPUs busy, as far as there is
    work for them: one per two CPUs where decoding takes as long as encoding, one per CPU if the encoder is large."""
    cpus: Amount = 1
    """CPUs per encoder actor."""
    gpus: Amount | None = None
    """GPUs per encoder actor. Default: 1 if the cluster has GPUs."""
    decoders: Count | None = None
    """Number of tasks, of one CPU each, that read and decode images at the same time, shared among the encoder actors.
    Default: the remaining CPUs if encoder actors have GPUs, as long as the pixels fit into half of Ray's object stores;
    otherwise the actors decode their images themselves."""
    batch_size: Count = 64
    """Images per forward pass."""


@dataclass(frozen=True)
class TrainResources:
    """Resources for training."""

    __pydantic_config__ = STRICT

    bundles: Count | None = None
    """Number of bundles that train at the same time. Default: one per GPU, or one per two CPUs if there is no GPU."""
    cells_per_bundle: Count = 16
    """SAEs that are trained together from one read of the data, at most. There are fewer where more bundles can be
    trained at the same time, and a very wide SAE is trained alone."""
    workers: int | tuple[int, int] = 1
    """Data-parallel workers per bundle, a divisor of `training.batch_size`. Each reads a share of every batch and holds
    all weights. Two numbers, as in `[1, 8]`: as many as the cluster has room for; the bundle resumes from its newest
    checkpoints with fewer workers when some are lost, and with more when there is room again."""
    shards: Count = 1
    """Workers per bundle over which the latents of each SAE are split; not together with `workers` above 1. Each reads
    the whole batch and holds the weights of its latents. Where an SAE has more latents than a batch has rows, shards
    exchange less than data-parallel workers, and each needs only a share of the memory."""
    cpus: Amount = 1
    """CPUs per worker."""
    gpus: Amount | None = None
    """GPUs per worker. Default: 1 if the cluster has GPUs."""
    checkpoint_every: Count = 2000
    """Steps between checkpoints."""
    trackers: tuple[str, ...] = ()
    """What else hears the loss, L0, dead latents and so on of every SAE while it trains: `tensorboard`, `wandb`,
    `mlflow`, `trackio` (`docs/monitoring.md`)."""
    max_failures: Annotated[int, Ge(0)] = 3
    """How often a bundle is begun again from its newest checkpoints after losing a worker, or after an error of a disk
    or a device. Before the announced loss of a node, such as a spot instance, the bundle writes checkpoints; that loss
    does not count where the bundle has one worker."""

    def __post_init__(self):
        least, most = self.workers_span
        check(1 <= least <= most, "resources.train.workers", self.workers if least == most else [least, most],
              "make it a number above 0, or two of them, the smaller one first")  # fmt: skip
        check(most == 1 or self.shards == 1, "resources.train.shards", self.shards,
              f"make it 1, or set resources.train.workers = {self.workers} to 1: one bundle has workers or shards, not "
              "both")  # fmt: skip

        for tracker in self.trackers:
            check(tracker in TRACKERS, "resources.train.trackers", tracker, f"choose among {', '.join(TRACKERS)}")

    @property
    def workers_span(self) -> tuple[int, int]:
        """How many data-parallel workers a bundle has at least and at most."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)


@dataclass(frozen=True)
class EvaluateResources:
    """Resources for evaluation."""

    __pydantic_config__ = STRICT

    workers: Count | None = None
    """Number of tasks at the same time, each with one SAE. Default: as many as the CPUs (or GPUs) allow."""
    cpus: Amount = 1
    """CPUs per task."""
    gpus: Amount | None = None
    """GPUs per task. Default: 1 if the cluster has GPUs."""


@dataclass(frozen=True)
class ScoreResources:
    """Resources for scoring."""

    __pydantic_config__ = STRICT

    workers: Count | None = None
    """Number of tasks at the same time; twice as many are queued. Default: as many as the CPUs (or GPUs) allow."""
    cpus: Amount = 1
    """CPUs per task."""
    gpus: Amount | None = None
    """GPUs per task. Default: 1 if the cluster has GPUs."""


@dataclass(frozen=True)
class ConceptsResources:
    """Resources for concepts."""

    __pydantic_config__ = STRICT

    workers: Count | None = None
    """Number of tasks at the same time, each with one SAE. Default: as many as the CPUs (or GPUs) allow."""
    cpus: Amount = 1
    """CPUs per task."""
    gpus: Amount = 0
    """GPUs per task. Codes are computed there, and the passes of the encoder for `splicing`; CPUs do all else."""


@dataclass(frozen=True)
class SteeringResources:
    """Resources for steering and naming."""

    __pydantic_config__ = STRICT

    workers: Count | None = None
    """Number of LLaVAs. Default: one per GPU, or one."""
    cpus: Amount = 1
    """CPUs per LLaVA."""
    gpus: Amount | None = None
    """GPUs per LLaVA. Default: 1 if the cluster has GPUs."""
    batch_size: Count = 64
    """Answers generated per batch."""


@dataclass(frozen=True)
class PicturesResources:
    """Resources for thumbnails and heat maps."""

    __pydantic_config__ = STRICT

    workers: Count | None = None
    """Number of tasks at the same time. Default: as many as the CPUs (or GPUs) allow."""
    cpus: Amount = 1
    """CPUs per task."""
    gpus: Amount | None = None
    """GPUs per task, if there are heat maps to make. Default: 1 if the cluster has GPUs."""


@dataclass(frozen=True)
class Resources:
    """Resources of the cluster to use. Changing them never makes a stage run again, and changes results by no more than
    rounding."""

    __pydantic_config__ = STRICT

    extract: ExtractResources = field(default_factory=ExtractResources)
    """For extraction."""
    train: TrainResources = field(default_factory=TrainResources)
    """For training."""
    evaluate: EvaluateResources = field(default_factory=EvaluateResources)
    """For evaluation."""
    score: ScoreResources = field(default_factory=ScoreResources)
    """For scoring."""
    concepts: ConceptsResources = field(default_factory=ConceptsResources)
    """For concepts."""
    steering: SteeringResources = field(default_factory=SteeringResources)
    """For steering and naming."""
    pictures: PicturesResources = field(default_factory=PicturesResources)
    """For the thumbnails and heat maps of the report."""


@dataclass(frozen=True)
class GridCell:
    """One SAE of the grid and the sites it uses."""

    site: Site
    """The site it is trained on."""
    score_site: Site
    """The site it is scored on: the same layer, possibly with other tokens."""
    cell: Cell
    """The SAE."""
    seed: int = 0
    """Which of `Grid.seeds`."""

    @property
    def name(self) -> str:
        """Readable and unique within a study: `projection-batch_topk-x4-k20`; with another seed it ends in `-seed1`."""
        return self.recipe + (f"-seed{self.seed}" if self.seed else "")

    @property
    def recipe(self) -> str:
        """What cells that differ in their seeds alone have in common."""
        amount = f"k{self.cell.k}" if self.cell.k is not None else f"s{self.cell.sparsity:g}"
        weights = f"-{label_of(self.cell.weights, self.cell.alpha, Cell.alpha)}" if self.cell.weighted else ""
        goal = f"-mono{self.cell.monosemanticity:g}" if self.cell.monosemanticity else ""
        return f"{self.site.name}-{self.cell.architecture}-x{self.cell.expansion:g}-{amount}{weights}{goal}"


@dataclass(frozen=True)
class Study:
    """A whole experiment."""

    __pydantic_config__ = STRICT

    name: str
    """Name of the study. By default its results are written to `runs/<name>`."""
    grid: tuple[Grid, ...]
    """The SAEs."""
    images: Images = field(default_factory=lambda: Images(ImageSet(IMPORTED)))
    """The images."""
    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(IMPORTED))
    """The encoder."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """The judge."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How SAEs are trained."""
    architectures: ArchitectureSettings = field(default_factory=ArchitectureSettings)
    """Settings of single architectures, each in a table of its name."""
    extraction: Extraction = field(default_factory=Extraction)
    """How activations are stored."""
    scoring: Scoring = field(default_factory=Scoring)
    """How neurons are scored."""
    concepts: Concepts | None = None
    """How it is measured what neurons mean. Without it that is skipped."""
    steering: Steering | None = None
    """How a LLaVA is steered. Without it steering is skipped."""
    naming: Naming | None = None
    """How that LLaVA names latents. Without it naming is skipped."""
    resources: Resources = field(default_factory=Resources)
    """Resources of the cluster to use."""
    shuffle_rows: Count = 2_097_152
    """Activations that a bundle keeps on its device and shuffles together."""
    seed: Annotated[int, Ge(0)] = 0
    """The seed from which all others are derived."""

    def __post_init__(self):
        check(self.name != "" and "/" not in self.name, "name", self.name, "give a name without slashes")
        check(bool(self.grid), "grid", [], "add a [[grid]] with at least one site")
        self._check_imported()
        check(self.steering is None or self.scoring.pictures == "train", "scoring.pictures", self.scoring.pictures,
              'steering takes its concepts from training images; choose "train"')  # fmt: skip
        check(self.naming is None or self.steering is not None, "naming", "{}",
              "latents are named by the LLaVA of [steering]; add that table, or remove this one")  # fmt: skip
        least, _ = self.resources.train.workers_span
        check(self.training.batch_size % least == 0, "resources.train.workers", least,
              f"choose a divisor of training.batch_size = {self.training.batch_size}")  # fmt: skip
        for grid_cell in self.cells():  # raises for invalid cells
            cell = grid_cell.cell
            has_labels = not cell.guided or cell.settings.concepts != LABELS or self.images.train.labels != "none"
            check(has_labels, "images.train.labels", "none", f"{cell.architecture} learns the labels of images; give "
                  f"them, or a concept file in architectures.{cell.architecture}.concepts")  # fmt: skip

    @property
    def imported(self) -> bool:
        """Whether activations were put under the root by `sae-ray import`."""
        return self.encoder.model == IMPORTED

    def _check_imported(self) -> None:
        has_images = self.images.train.path != IMPORTED
        check(not has_images or not self.imported, "encoder.model", IMPORTED,
              f"name the encoder of these images (a directory of this name as ./{IMPORTED}), or leave out [images] to "
              "train on what `sae-ray import` put under the root")  # fmt: skip
        check(has_images or self.imported, "images.train.path", IMPORTED,
              f"name the images (a folder of this name as ./{IMPORTED}), or leave out [encoder] to train on what "
              "`sae-ray import` put under the root")  # fmt: skip
        for name, default in (("judge", JudgeConfig()), ("extraction", Extraction()), ("steering", None)):
            check(not self.imported or getattr(self, name) == default, name, "set",
                  "imported activations have no encoder, judge or images to load; leave it out")  # fmt: skip

    def cells(self) -> list[GridCell]:
        """All SAEs of the study, without duplicates, in the order of the file."""
        cells: dict[str, GridCell] = {}
        for grid in self.grid:
            for seed, text, name, expansion, weights, goal in product(
                grid.seeds, grid.sites, grid.architectures, grid.expansions, grid.weights, grid.monosemanticity
            ):
                site = Site("imported", label=text) if self.imported else Site.parse(text)
                score_site = dataclasses.replace(site, tokens=grid.score_tokens) if grid.score_tokens else site
                by_k = architecture(name).tuned_by == "k"
                for amount in grid.k if by_k else grid.sparsity:
                    # Always floats: 8 and 8.0 differ as JSON and would be two steps.
                    cell = Cell(
                        name,
                        float(expansion),
                        k=int(amount) if by_k else None,
                        sparsity=None if by_k else float(amount),
                        training=self.training,
                        settings=getattr(self.architectures, name, None),
                        weights=weights,
                        alpha=Cell.alpha if weights == UNIFORM else grid.alpha,
                        monosemanticity=float(goal),
                    )
                    grid_cell = GridCell(site, score_site, cell, seed)
                    # The seed comes from the name, not the position in the grid: adding cells changes no other cell.
                    seeded = dataclasses.replace(cell, seed=derived_seed(self.seed, grid_cell.name))
                    named = dataclasses.replace(grid_cell, cell=seeded)
                    check(cells.setdefault(named.name, named) == named, "grid", named.name,
                          "two cells of this name differ in score_tokens or in late digits; keep one")  # fmt: skip
        return list(cells.values())

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Study:
        """Reads a study file.

        Args:
            path: of the TOML file, or the name of a shipped study, such as `demo`.
            overrides: dotted field -> value, which replace what the file says.

        Raises:
            UsageError: the file is missing or not TOML, a key is unknown, a value is invalid.
        """
        from sae_ray.study.reading import read_toml

        return cls.from_dict(read_toml(path), overrides)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Study:
        """As `load`, from nested dictionaries."""
        from sae_ray.study.reading import validated

        return validated(values, overrides or {})

    def to_dict(self) -> dict[str, Any]:
        """As nested dictionaries of plain values; `from_dict` reads it back."""
        return dataclasses.asdict(self)
