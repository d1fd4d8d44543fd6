"""A study: a whole experiment as one frozen, validated object, read from a TOML file. Every default stands here."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from sae_ray.encoders.sites import Site
from sae_ray.errors import UsageError
from sae_ray.sae.architectures import ArchitectureSettings, architecture
from sae_ray.sae.config import Cell, TrainingConfig
from sae_ray.seeds import derived_seed
from sae_ray.steering.config import Steering

if TYPE_CHECKING:
    from pydantic import TypeAdapter

STRICT = {"extra": "forbid", "use_attribute_docstrings": True}
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ImageSet:
    """A folder of images."""

    __pydantic_config__ = STRICT

    path: str
    """The folder: a local path (`~` is your home) or a URI such as `s3://bucket/images`."""
    labels: str = "auto"
    """`auto` (class sub-folders, else none), `none`, or the path of a label file: a CSV `image_id,label`, Kaggle's
    `LOC_val_solution.csv`, or the ImageNet devkit's ground truth."""


@dataclass(frozen=True)
class Images:
    """The images that SAEs are trained on, and those they are judged by."""

    __pydantic_config__ = STRICT

    train: ImageSet
    """The training images."""
    heldout: ImageSet | None = None
    """Images for metrics and scores; without it a share of the training images is kept out of training."""
    heldout_fraction: float = 0.1
    """That share, where `heldout` is not given."""
    max_bad_fraction: float = 0.01
    """Share of unreadable images up to which extraction succeeds."""


@dataclass(frozen=True)
class EncoderConfig:
    """The vision encoder whose activations are explained."""

    __pydantic_config__ = STRICT

    model: str
    """A hub id, `open_clip:<architecture>/<pretrained tag>`, `open_clip:local-dir:<path>`, or a local directory."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    dtype: Dtype = "float32"
    """Dtype of the forward pass; float32 on CPU."""


@dataclass(frozen=True)
class JudgeConfig:
    """The other encoder, whose embeddings the MonoSemanticity score trusts."""

    __pydantic_config__ = STRICT

    model: str = "facebook/dinov2-base"
    """As `encoder.model`."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    point: Literal["pooled", "projection"] = "pooled"
    """Which embedding of an image: the pooled output (DINOv2) or the projection (CLIP)."""
    dtype: Dtype = "float32"
    """Dtype of the forward pass."""


@dataclass(frozen=True)
class Grid:
    """SAEs to train: the product of sites, architectures, expansions and sparsities. A study may hold several."""

    __pydantic_config__ = STRICT

    sites: tuple[str, ...]
    """Where the encoder is tapped: `layer<L>:<tokens>` for the residual stream after block L (from 0) with tokens
    `cls`, `mean`, `all` or `random:<n>`; `projection`; `pooled`."""
    architectures: tuple[str, ...] = ("batch_topk",)
    """Kinds of autoencoder, such as `batch_topk` or `relu`."""
    expansions: tuple[float, ...] = (8.0,)
    """Widths as multiples of the activation's width."""
    k: tuple[int, ...] = (20,)
    """Average number of active latents per row, for the TopK family."""
    sparsity: tuple[float, ...] = ()
    """Sparsity coefficients, for architectures with a penalty: `relu` (L1), `jumprelu` (L0)."""
    score_tokens: str | None = None
    """Tokens that scores are computed on where they differ from those trained on, such as `cls` or `all`."""

    def __post_init__(self):
        kinds = [architecture(name, "grid.architectures") for name in self.architectures]
        by_k = [kind.name for kind in kinds if kind.tuned_by == "k"]
        by_sparsity = [kind.name for kind in kinds if kind.tuned_by == "sparsity"]
        for name in ("sites", "architectures", "expansions"):
            _check(bool(getattr(self, name)), f"grid.{name}", [], "name at least one")
        _check(bool(self.k) or not by_k, "grid.k", [], f"{', '.join(by_k)}: name at least one")
        _check(bool(self.sparsity) or not by_sparsity, "grid.sparsity", [],
               f"{', '.join(by_sparsity)}: name at least one coefficient")  # fmt: skip
        _check(bool(by_sparsity) or not self.sparsity, "grid.sparsity", list(self.sparsity),
               f"not a setting of {', '.join(by_k)}; leave it out")  # fmt: skip


@dataclass(frozen=True)
class Extraction:
    """How activations are stored."""

    __pydantic_config__ = STRICT

    store_dtype: Literal["float16", "float32"] = "float16"
    """Dtype on disk."""
    images_per_part: int = 512
    """Images in one part. After a kill those under way are redone, up to two per encoder actor."""
    pixels: Literal["exact", "fast"] = "exact"
    """`exact` are those of the encoder's own processor (on Pillow). `fast` decodes JPEGs at a half, quarter or eighth
    of their size where both sides stay twice as long as the encoder's input, and resizes with a vectorised kernel.
    Activations change by less than 1 % of their distance from the mean on half of the images and by less than 2 % on 99
    of 100 (the embedded CLIP, JPEGs at half size; `docs/speed.md`)."""


@dataclass(frozen=True)
class Scoring:
    """How neurons are scored."""

    __pydantic_config__ = STRICT

    top_images: int = 16
    """Images kept per neuron, those that activate it most."""
    pictures: Literal["heldout", "train"] = "heldout"
    """The image set that top images come from. Scores always come from held-out images."""
    min_images: int = 2
    """Neurons active on fewer held-out images are left out of the summary; 2 is the paper's behaviour."""


@dataclass(frozen=True)
class ExtractResources:
    """What extraction may use."""

    __pydantic_config__ = STRICT

    workers: int | None = None
    """Encoder actors; one per GPU, or without GPUs one per two CPUs, where not given."""
    cpus: float = 1
    """CPUs of an encoder actor."""
    gpus: float | None = None
    """GPUs of an encoder actor; 1 where the cluster has any."""
    decoders: int | None = None
    """Tasks that read and decode images at once; the remaining CPUs where not given. Encoder actors of one CPU and no
    GPU decode their images themselves."""
    batch_size: int = 64
    """Images per forward pass."""


@dataclass(frozen=True)
class TrainResources:
    """What training may use."""

    __pydantic_config__ = STRICT

    bundles: int | None = None
    """Bundles at once; one per GPU, or one, where not given."""
    cells_per_bundle: int = 16
    """SAEs that share one read of the data."""
    workers: int = 1
    """Data-parallel workers of a bundle. Each selects latents within its share of a batch, so that their number shows
    in the SAEs."""
    cpus: float = 1
    """CPUs of a worker."""
    gpus: float | None = None
    """GPUs of a worker; 1 where the cluster has any."""
    checkpoint_every: int = 2000
    """Steps between checkpoints."""
    max_failures: int = 3
    """Times a bundle is started again after losing a worker."""


@dataclass(frozen=True)
class ScoreResources:
    """What scoring may use."""

    __pydantic_config__ = STRICT

    workers: int | None = None
    """Twice as many blocks are in flight; as many as the CPUs (or GPUs) allow where not given."""
    cpus: float = 1
    """CPUs of a task."""
    gpus: float = 0
    """GPUs of a task."""


@dataclass(frozen=True)
class SteerResources:
    """What steering may use."""

    __pydantic_config__ = STRICT

    workers: int | None = None
    """LLaVAs at once; one per GPU, or one, where not given."""
    cpus: float = 1
    """CPUs of a LLaVA."""
    gpus: float | None = None
    """GPUs of a LLaVA; 1 where the cluster has any."""
    batch_size: int = 64
    """Answers generated together."""


@dataclass(frozen=True)
class Resources:
    """What the study may use. Changing it redoes nothing: but for `train.workers`, nothing here changes what is
    computed."""

    __pydantic_config__ = STRICT

    extract: ExtractResources = field(default_factory=ExtractResources)
    """For extraction."""
    train: TrainResources = field(default_factory=TrainResources)
    """For training."""
    score: ScoreResources = field(default_factory=ScoreResources)
    """For scoring."""
    steer: SteerResources = field(default_factory=SteerResources)
    """For steering."""


@dataclass(frozen=True)
class GridCell:
    """One SAE of the grid and where its data comes from."""

    site: Site
    """Where the activations it is trained on come from."""
    score_site: Site
    """Where those that it is scored on come from: the same layer, perhaps other tokens."""
    cell: Cell
    """The SAE."""

    @property
    def name(self) -> str:
        """Readable and unique within a study: `projection-batch_topk-x4-k20`."""
        amount = f"k{self.cell.k}" if self.cell.k is not None else f"s{self.cell.sparsity:g}"
        return f"{self.site.name}-{self.cell.architecture}-x{self.cell.expansion:g}-{amount}"


@dataclass(frozen=True)
class Study:
    """A whole experiment."""

    __pydantic_config__ = STRICT

    name: str
    """Name of the study; its results lie under `runs/<name>` unless told otherwise."""
    images: Images
    """The images."""
    encoder: EncoderConfig
    """The encoder."""
    grid: tuple[Grid, ...]
    """The SAEs."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """The judge."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How SAEs are trained."""
    architectures: ArchitectureSettings = field(default_factory=ArchitectureSettings)
    """Settings of single architectures, in a table of its name each."""
    extraction: Extraction = field(default_factory=Extraction)
    """How activations are stored."""
    scoring: Scoring = field(default_factory=Scoring)
    """How neurons are scored."""
    steering: Steering | None = None
    """How a LLaVA is steered; without it that stage is left out."""
    resources: Resources = field(default_factory=Resources)
    """What the study may use."""
    shuffle_rows: int = 2_097_152
    """Activations that a bundle holds at once, on its device, shuffled among themselves."""
    seed: int = 0
    """The one seed, from which all others are derived."""

    def __post_init__(self):
        _check(self.name != "" and "/" not in self.name, "name", self.name, "give a name without slashes")
        _check(self.seed >= 0, "seed", self.seed, "choose 0 or more")
        _check(bool(self.grid), "grid", [], "add a [[grid]] with at least one site")
        _check(0 < self.images.heldout_fraction < 1, "images.heldout_fraction", self.images.heldout_fraction,
               "choose a share between 0 and 1")  # fmt: skip
        _check(0 <= self.images.max_bad_fraction <= 1, "images.max_bad_fraction", self.images.max_bad_fraction,
               "choose a share from 0 to 1")  # fmt: skip
        at_least_1 = {
            "extraction.images_per_part": self.extraction.images_per_part,
            "scoring.top_images": self.scoring.top_images,
            "shuffle_rows": self.shuffle_rows,
            "resources.extract.batch_size": self.resources.extract.batch_size,
            "resources.extract.workers": self.resources.extract.workers,
            "resources.extract.decoders": self.resources.extract.decoders,
            "resources.train.bundles": self.resources.train.bundles,
            "resources.train.cells_per_bundle": self.resources.train.cells_per_bundle,
            "resources.train.workers": self.resources.train.workers,
            "resources.train.checkpoint_every": self.resources.train.checkpoint_every,
            "resources.score.workers": self.resources.score.workers,
            "resources.steer.workers": self.resources.steer.workers,
            "resources.steer.batch_size": self.resources.steer.batch_size,
        }
        for name, value in at_least_1.items():
            _check(value is None or value >= 1, name, value, "choose 1 or more")
        for stage in ("extract", "train", "score", "steer"):
            resources = getattr(self.resources, stage)
            for name, value in (("cpus", resources.cpus), ("gpus", resources.gpus)):
                _check(value is None or 0 <= value < math.inf, f"resources.{stage}.{name}", value, "choose 0 or more")
        _check(self.scoring.min_images >= 2, "scoring.min_images", self.scoring.min_images, "choose 2 or more")
        _check(self.steering is None or self.scoring.pictures == "train", "scoring.pictures", self.scoring.pictures,
               'steering finds its concepts on training images; choose "train"')  # fmt: skip
        _check(self.training.batch_size % self.resources.train.workers == 0, "resources.train.workers",
               self.resources.train.workers,
               f"choose a divisor of training.batch_size = {self.training.batch_size}")  # fmt: skip
        self.cells()  # refuses those that cannot be

    def cells(self) -> list[GridCell]:
        """All SAEs of the study, without duplicates, in the order of the file."""
        cells: dict[str, GridCell] = {}
        for grid in self.grid:
            for text, name, expansion in product(grid.sites, grid.architectures, grid.expansions):
                site = Site.parse(text)
                score_site = dataclasses.replace(site, tokens=grid.score_tokens) if grid.score_tokens else site
                by_k = architecture(name).tuned_by == "k"
                for amount in grid.k if by_k else grid.sparsity:
                    # Floats, however they were written: 8 and 8.0 are not the same JSON and would be two steps.
                    cell = Cell(
                        name,
                        float(expansion),
                        k=int(amount) if by_k else None,
                        sparsity=None if by_k else float(amount),
                        training=self.training,
                        settings=getattr(self.architectures, name, None),
                    )
                    grid_cell = GridCell(site, score_site, cell)
                    # The seed comes from the name, not from a place in the grid: adding cells changes no other cell.
                    seeded = dataclasses.replace(cell, seed=derived_seed(self.seed, grid_cell.name))
                    named = dataclasses.replace(grid_cell, cell=seeded)
                    _check(cells.setdefault(named.name, named) == named, "grid", named.name,
                           "two cells of this name differ in score_tokens or in late digits; keep one")  # fmt: skip
        return list(cells.values())

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Study:
        """Reads a study file.

        Args:
            path: of the TOML file.
            overrides: dotted field -> value, put over what the file says.

        Raises:
            UsageError: the file is missing or not TOML, a key is unknown, a value does not fit.
        """
        try:
            data = Path(path).expanduser().read_bytes()
        except OSError as error:
            raise UsageError(
                f"study file {path} cannot be read ({error.strerror}); give the path of a TOML file"
            ) from error
        try:
            values = tomllib.loads(data.decode())
        except ValueError as error:
            raise UsageError(f"study file {path} is not TOML: {error}") from error
        return cls.from_dict(values, overrides)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Study:
        """As `load`, from nested dictionaries."""
        from pydantic import ValidationError

        merged = json.loads(json.dumps(values, default=str))  # a copy of plain values: TOML also knows dates
        for key, value in (overrides or {}).items():
            _override(merged, key, value)
        try:
            return _adapter().validate_python(merged)
        except ValidationError as error:
            raise UsageError("\n".join(_explain(problem) for problem in error.errors())) from None

    def to_dict(self) -> dict[str, Any]:
        """As nested dictionaries of plain values; `from_dict` reads it back."""
        return dataclasses.asdict(self)


def field_help(dotted: str) -> str:
    """The docstring of a study's field, such as `images.train.path`, as one line: the help text of the command line."""
    schema = node = _adapter().json_schema()
    for part in dotted.split("."):
        while "properties" not in node:
            options = [node, *node.get("anyOf", []), node.get("items", {})]
            node = next(schema["$defs"][o["$ref"].rsplit("/", 1)[1]] for o in options if "$ref" in o)
        node = node["properties"][part]
    return " ".join(node["description"].split())


@cache
def _adapter() -> TypeAdapter[Study]:
    from pydantic import TypeAdapter

    return TypeAdapter(Study)


def _check(holds: bool, name: str, value: Any, remedy: str) -> None:
    if not holds:
        raise UsageError(f"{name} = {value!r}: {remedy}")


def _override(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    below: Any = values
    for part in parents:
        below = _descend(below, part, dotted)
    for table in below if isinstance(below, list) else [below]:
        table[last] = value


def _descend(values: Any, part: str, dotted: str) -> Any:
    """The table `part` of `values`, made where it is missing; of `grid` a list of them."""
    below = values.get(part) if isinstance(values, dict) else 0
    if below is None:
        below = values[part] = [{}] if part == "grid" else {}
    tables = below if isinstance(below, list) else [below]
    if not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{dotted}: {part} is not a table of the study file")
    return below


def _explain(problem: Any) -> str:
    where = [str(part) for part in problem["loc"]]
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known_keys(where[:-1])
        near = difflib.get_close_matches(where[-1], known, n=1)
        elsewhere = _elsewhere(where[-1])
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        hint = f"it stands at {elsewhere}" if elsewhere else hint
        return f"{'.'.join(where)}: unknown key; {hint}"
    if problem["type"] == "missing":
        meaning = field_help(".".join(part for part in where if not part.isdigit()))
        return f"{'.'.join(where)}: missing; add it: {meaning}"
    message = problem["msg"].replace("a valid tuple", "a list")  # what TOML calls it
    return f"{'.'.join(where)} = {problem['input']!r}: {message}"


def _known_keys(where: list[str]) -> list[str]:
    kind: Any = Study
    for part in where:
        if part.isdigit():
            continue
        kind = get_type_hints(kind)[part]
        while get_origin(kind) in (Union, UnionType, tuple):
            kind = next(arg for arg in get_args(kind) if arg is not type(None))
    return [item.name for item in dataclasses.fields(kind)]


def _elsewhere(key: str) -> str | None:
    """Where in a study the setting `group_fractions` or `jumprelu_bandwidth` (`bandwidth` of `jumprelu`) stands."""
    for name, hint in get_type_hints(ArchitectureSettings).items():
        for item in dataclasses.fields(hint):
            if key in (item.name, f"{name}_{item.name}"):
                return f"architectures.{name}.{item.name}"
    return None
