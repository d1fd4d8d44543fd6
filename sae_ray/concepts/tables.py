"""The tables of the stage `concepts`: their formats, and the only code that writes and reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from sae_ray.concepts.best_words import NAMES_SCHEMA
from sae_ray.store.files import Folder
from sae_ray.store.schemas import read_columns

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped

NEURONS, CONCEPTS, CORRELATIONS, NAMES, HIERARCHY = (
    "neurons.parquet",
    "concepts.parquet",
    "correlations.parquet",
    "names.parquet",
    "hierarchy.parquet",
)
NEURONS_SCHEMA = pa.schema(
    [
        ("neuron", pa.int64()),
        ("n_firing", pa.int64()),
        ("concept", pa.string()),
        ("rho", pa.float64()),
        ("second_rho", pa.float64()),
        ("margin", pa.float64()),
        ("shuffled_rho", pa.float64()),
        ("judged_rho", pa.float64()),
        ("average_precision", pa.float64()),
        ("entropy_mass", pa.float64()),
        ("entropy_balanced", pa.float64()),
        ("entropy_rho", pa.float64()),
        ("purity", pa.float64()),
        ("spatial", pa.float64()),
        ("overlap", pa.float64()),
        ("coherence", pa.float64()),
        ("coherence_aip", pa.float64()),
        ("k_unique", pa.float64()),
        ("stability", pa.float64()),
        ("name", pa.string()),
        ("name_method", pa.string()),
        ("name_score", pa.float64()),
        ("name_margin", pa.float64()),
        ("name_images", pa.int64()),
    ]
)
CONCEPTS_SCHEMA = pa.schema(
    [
        ("concept", pa.string()),
        ("n_images", pa.int64()),
        ("n_known", pa.int64()),
        ("neuron", pa.int64()),
        ("rho", pa.float64()),
        ("shuffled_rho", pa.float64()),
        ("probe_neuron", pa.int64()),
        ("probe_r", pa.float64()),
        ("shuffled_probe_r", pa.float64()),
        ("average_precision", pa.float64()),
        ("shuffled_average_precision", pa.float64()),
        ("n_rows", pa.int64()),
        ("sparse_1", pa.float64()),
        ("sparse_2", pa.float64()),
        ("sparse_5", pa.float64()),
        ("shuffled_sparse_1", pa.float64()),
        ("shuffled_sparse_2", pa.float64()),
        ("shuffled_sparse_5", pa.float64()),
        ("fms_neuron", pa.int64()),
        ("fms_tied", pa.int64()),
        ("fms_accuracy", pa.float64()),
        ("fms_local_1", pa.float64()),
        ("fms_global", pa.float64()),
        ("fms_1", pa.float64()),
        ("fms_5", pa.float64()),
        ("fitted_fms_1", pa.float64()),
        ("fitted_fms_5", pa.float64()),
        ("shuffled_fms_1", pa.float64()),
        ("shuffled_fms_5", pa.float64()),
    ]
)
CORRELATIONS_SCHEMA = pa.schema(
    [("concept", pa.string()), ("rank", pa.int16()), ("neuron", pa.int64()), ("rho", pa.float64())]
)
HIERARCHY_SCHEMA = pa.schema(
    [("neuron", pa.int64()), ("group", pa.int64()), ("lca_mean", pa.float64()), ("lca_mode", pa.int64())]
)


class Neurons(NamedTuple):
    """The columns of `NEURONS_SCHEMA`, one value per neuron, in order. What was not or cannot be measured is NaN, None
    for names, and -1 for whole numbers."""

    neuron: Int[np.ndarray, " neurons"]
    n_firing: Int[np.ndarray, " neurons"]
    """Labelled images above 0."""
    concept: Shaped[np.ndarray, " neurons"]
    """The concept that it correlates with most, by name."""
    rho: Float[np.ndarray, " neurons"]
    """The correlation with it, on all labelled images."""
    second_rho: Float[np.ndarray, " neurons"]
    """With the concept after that one."""
    margin: Float[np.ndarray, " neurons"]
    """`rho` less `second_rho`."""
    shuffled_rho: Float[np.ndarray, " neurons"]
    """The largest correlation with shuffled labels."""
    judged_rho: Float[np.ndarray, " neurons"]
    """On the judged half, with the concept that is the best one on the fitted half."""
    average_precision: Float[np.ndarray, " neurons"]
    """On the judged half, of the neuron's value, for the same concept."""
    entropy_mass: Float[np.ndarray, " neurons"]
    entropy_balanced: Float[np.ndarray, " neurons"]
    entropy_rho: Float[np.ndarray, " neurons"]
    purity: Float[np.ndarray, " neurons"]
    """Share of the commonest concept in its 16 top images."""
    spatial: Float[np.ndarray, " neurons"]
    """Mean of Moran's I over its top images; NaN at sites that do not have all patches."""
    overlap: Float[np.ndarray, " neurons"]
    """The largest Jaccard index of its top images with those of another neuron."""
    coherence: Float[np.ndarray, " neurons"]
    """The largest |cosine| of its decoder row with another one's."""
    coherence_aip: Float[np.ndarray, " neurons"]
    """The same under the atomic inner product."""
    k_unique: Float[np.ndarray, " neurons"]
    """The largest L0 that `coherence_aip` allows."""
    stability: Float[np.ndarray, " neurons"]
    """Cosine with its counterpart in the SAE of the next seed."""
    name: Shaped[np.ndarray, " neurons"]
    name_method: Shaped[np.ndarray, " neurons"]
    """How it was named: `soft_wpmi` by this stage."""
    name_score: Float[np.ndarray, " neurons"]
    name_margin: Float[np.ndarray, " neurons"]
    """The score less that of the next name."""
    name_images: Int[np.ndarray, " neurons"]
    """How many images the name rests on."""


class ConceptScores(NamedTuple):
    """The columns of `CONCEPTS_SCHEMA`, one value per concept. What was not or cannot be measured is NaN, and -1 for
    whole numbers."""

    concept: Shaped[np.ndarray, " concepts"]
    n_images: Int[np.ndarray, " concepts"]
    """Images that show it."""
    n_known: Int[np.ndarray, " concepts"]
    """Images of which it is known whether they do."""
    neuron: Int[np.ndarray, " concepts"]
    """The neuron that correlates with it most on the fitted half."""
    rho: Float[np.ndarray, " concepts"]
    """The correlation with that neuron on the judged half."""
    shuffled_rho: Float[np.ndarray, " concepts"]
    """All that is `shuffled` is the same score by the same procedure, with shuffled labels."""
    probe_neuron: Int[np.ndarray, " concepts"]
    """The neuron of the best probe on the fitted half."""
    probe_r: Float[np.ndarray, " concepts"]
    """Probe R on the judged half."""
    shuffled_probe_r: Float[np.ndarray, " concepts"]
    average_precision: Float[np.ndarray, " concepts"]
    shuffled_average_precision: Float[np.ndarray, " concepts"]
    n_rows: Int[np.ndarray, " concepts"]
    """Images, half of which show it, that FMS and sparse probing divide into two halves."""
    sparse_1: Float[np.ndarray, " concepts"]
    """Held-out accuracy of a probe on one neuron; chance is 1/2."""
    sparse_2: Float[np.ndarray, " concepts"]
    sparse_5: Float[np.ndarray, " concepts"]
    shuffled_sparse_1: Float[np.ndarray, " concepts"]
    shuffled_sparse_2: Float[np.ndarray, " concepts"]
    shuffled_sparse_5: Float[np.ndarray, " concepts"]
    fms_neuron: Int[np.ndarray, " concepts"]
    """The root of the tree."""
    fms_tied: Int[np.ndarray, " concepts"]
    """How many neurons would split as well."""
    fms_accuracy: Float[np.ndarray, " concepts"]
    """accs_0: held-out accuracy of the tree of depth 1."""
    fms_local_1: Float[np.ndarray, " concepts"]
    fms_global: Float[np.ndarray, " concepts"]
    fms_1: Float[np.ndarray, " concepts"]
    """FMS@1, held out, convention `paper`."""
    fms_5: Float[np.ndarray, " concepts"]
    fitted_fms_1: Float[np.ndarray, " concepts"]
    """On the rows that the trees were fitted on, as in the source."""
    fitted_fms_5: Float[np.ndarray, " concepts"]
    shuffled_fms_1: Float[np.ndarray, " concepts"]
    shuffled_fms_5: Float[np.ndarray, " concepts"]


class Correlations(NamedTuple):
    """The neurons that correlate most with each concept, on all labelled images, best first."""

    concept: Shaped[np.ndarray, " pairs"]
    rank: Int[np.ndarray, " pairs"]
    neuron: Int[np.ndarray, " pairs"]
    rho: Float[np.ndarray, " pairs"]


class Hierarchy(NamedTuple):
    """How deep in a taxonomy the top images of each neuron meet, in ranks; one value per neuron, in order."""

    neuron: Int[np.ndarray, " neurons"]
    group: Int[np.ndarray, " neurons"]
    """Its Matryoshka level, from 0; 0 for all neurons of other SAEs."""
    lca_mean: Float[np.ndarray, " neurons"]
    """As `lca_depth` gives it; NaN for a neuron without all its top images, or with one class at most among them."""
    lca_mode: Int[np.ndarray, " neurons"]
    """As `lca_mode` gives it; -1 where the mean is NaN."""


@dataclass(frozen=True)
class ConceptTables:
    """The tables in the folder of a finished step, each read when it is first used.

    Reading raises SaeRayError if a table lacks a column or has one of another type.
    """

    folder: Folder

    @cached_property
    def neurons(self) -> Neurons:
        return Neurons(**self._columns(NEURONS, NEURONS_SCHEMA))

    @cached_property
    def concepts(self) -> ConceptScores:
        """No rows where the images have no labels."""
        return ConceptScores(**self._columns(CONCEPTS, CONCEPTS_SCHEMA))

    @cached_property
    def correlations(self) -> Correlations:
        return Correlations(**self._columns(CORRELATIONS, CORRELATIONS_SCHEMA))

    @cached_property
    def hierarchy(self) -> Hierarchy | None:
        """None where no taxonomy was given."""
        if not self.folder.exists(HIERARCHY):
            return None
        return Hierarchy(**self._columns(HIERARCHY, HIERARCHY_SCHEMA))

    def score(self, key: str) -> Float[np.ndarray, " neurons"]:
        """A score of every neuron, by its field of `Neurons` or `Hierarchy`; NaN for the latter without a taxonomy."""
        if key in Neurons._fields:
            return getattr(self.neurons, key)
        return getattr(self.hierarchy, key) if self.hierarchy else np.full(len(self.neurons.neuron), np.nan)

    @cached_property
    def names(self) -> pa.Table:
        """`NAMES_SCHEMA`: up to five names per neuron and method."""
        return self._read(NAMES, NAMES_SCHEMA)

    def _columns(self, name: str, schema: pa.Schema) -> dict[str, np.ndarray]:
        table = self._read(name, schema)
        return {column: _as_numpy(table[column]) for column in schema.names}

    def _read(self, name: str, schema: pa.Schema) -> pa.Table:
        return read_columns(self.folder, name, schema, "concepts")


def as_table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """A table of a schema. Columns that are not given are null, like NaN, None and, in columns of whole numbers, -1."""
    n_rows = max(map(len, columns.values()), default=0)
    arrays = []
    for field in schema:
        values = columns.get(field.name)
        if values is None:
            arrays.append(pa.nulls(n_rows, field.type))
        elif pa.types.is_string(field.type):
            arrays.append(pa.array(list(values), field.type))
        else:
            values = np.asarray(values)
            missing = np.isnan(values) if pa.types.is_floating(field.type) else values < 0
            arrays.append(pa.array(values, mask=missing).cast(field.type))
    return pa.table(arrays, schema=schema)


def _as_numpy(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_integer(column.type):
        return column.fill_null(-1).to_numpy()
    return column.to_numpy()
