"""The configuration of the stage `concepts`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, get_args

from annotated_types import Ge

from sae_ray.config import STRICT, Count
from sae_ray.errors import check

Measure = Literal[
    "labels",
    "probes",
    "fms",
    "sparse_probing",
    "names",
    "atoms",
    "uniqueness",
    "spatial",
    "stability",
    "tpp",
    "splicing",
]
INATURALIST = "inaturalist"
"""In place of a taxonomy file."""
CHEAP: tuple[Measure, ...] = tuple(measure for measure in get_args(Measure) if measure not in ("tpp", "splicing"))


@dataclass(frozen=True)
class Concepts:
    """How it is measured what neurons mean. An empty table is enough; without it the stage is skipped."""

    __pydantic_config__ = STRICT

    measures: tuple[Measure, ...] = CHEAP
    """What is computed: `labels` (correlation, entropy, purity), `probes`, `fms`, `sparse_probing`, `names`, `atoms`,
    `uniqueness`, `spatial`, `stability` (if a grid has several `seeds`), `tpp` and `splicing` (accuracy with the
    reconstruction in place of activations). Default: all but the last two: the cost of `tpp` grows with the square of
    the concepts, and `splicing` runs the encoder on every held-out image once more, four times."""
    file: str | None = None
    """A concept file for the held-out images: CSV with `image_id,<concept>,…` and 1, 0 or nothing for unknown. Default:
    the classes of the images."""
    ignore_labels: tuple[str, ...] = ()
    """Classes that are no concepts, such as `blank`."""
    min_images: Annotated[int, Ge(10)] = 10
    """Concepts that fewer held-out images show are left out."""
    max_concepts: Count = 100
    """Probes, FMS and sparse probing are computed for at most as many concepts, drawn by the study's seed; TPP for at
    most 20 of these. Correlations are those of all concepts."""
    vocabulary: str | None = None
    """A text file with one name per line that neurons may get. Default: the names of the concepts."""
    taxonomy: str | None = None
    """Where classes stand in a taxonomy, for the depth at which a neuron's top images meet: a CSV file with the columns
    `label_name` and `path`, as in `crane,animal > bird > crane`, or `inaturalist` if classes are named as in
    iNaturalist. Default: no depths."""

    def __post_init__(self):
        check(self.file is None or not self.ignore_labels, "concepts.ignore_labels", list(self.ignore_labels),
              "these are classes of images, and concepts.file replaces those; remove one of the two")  # fmt: skip


class Patches(NamedTuple):
    """How the tokens of an image are laid out."""

    rows: int
    columns: int
    first_token: int
    """The number of the first patch: 1 after a CLS token."""
