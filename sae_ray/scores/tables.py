"""The three tables of a scoring pass: their formats, and the only code that writes and reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from sae_ray.scores.statistics import HISTOGRAM_EDGES
from sae_ray.store.files import Folder
from sae_ray.store.schemas import read_columns

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from sae_ray.scores.statistics import NeuronStats

SCORES, TOP_IMAGES, HISTOGRAM = "scores.parquet", "top_images.parquet", "histogram.parquet"
SCORES_SCHEMA = pa.schema(
    [
        ("neuron", pa.int64()),
        ("ms", pa.float64()),
        ("n_active", pa.int64()),
        ("n_firing", pa.int64()),
        ("frequency", pa.float64()),
        ("mean", pa.float64()),
        ("mean_active", pa.float64()),
        ("max_image", pa.float64()),
        ("max_token", pa.float64()),
    ]
)
TOP_IMAGES_SCHEMA = pa.schema(
    [("neuron", pa.int64()), ("rank", pa.int16()), ("image_index", pa.int64()), ("activation", pa.float32())]
)
HISTOGRAM_SCHEMA = pa.schema(
    [("neuron", pa.int64()), ("low", pa.float64()), ("high", pa.float64()), ("n_images", pa.int32())]
)


class Scores(NamedTuple):
    """The columns of `SCORES_SCHEMA`, one value per neuron, in order."""

    neuron: Int[np.ndarray, " neurons"]
    ms: Float[np.ndarray, " neurons"]
    """MonoSemanticity score; NaN for a neuron without one."""
    n_active: Int[np.ndarray, " neurons"]
    """Images above the neuron's minimum."""
    n_firing: Int[np.ndarray, " neurons"]
    """Images above 0."""
    frequency: Float[np.ndarray, " neurons"]
    """Share of images above 0."""
    mean: Float[np.ndarray, " neurons"]
    mean_active: Float[np.ndarray, " neurons"]
    """Mean over the images above 0; 0 if there are none."""
    max_image: Float[np.ndarray, " neurons"]
    """Largest value of an image."""
    max_token: Float[np.ndarray, " neurons"]
    """Largest value of a token."""


class TopImages(NamedTuple):
    """Each neuron's strongest images, by falling activation. Places at the end may be unused."""

    image: Int[np.ndarray, "neurons top"]
    """`image_index`; -1 in unused places."""
    activation: Float[np.ndarray, "neurons top"]
    """0 in unused places."""


@dataclass(frozen=True)
class ScoreTables:
    """The tables in the folder of a finished scoring step, each read when it is first used.

    Reading raises SaeRayError if a table lacks a column or has one of another type.
    """

    folder: Folder

    @cached_property
    def scores(self) -> Scores:
        table = self._read(SCORES, SCORES_SCHEMA)
        return Scores(**{name: table[name].to_numpy() for name in table.column_names})

    @cached_property
    def top_images(self) -> TopImages:
        """As wide as the most images that a neuron has."""
        table = self._read(TOP_IMAGES, TOP_IMAGES_SCHEMA)
        neuron, rank, image_index, activation = (column.to_numpy() for column in table.columns)
        shape = len(self.scores.neuron), int(rank.max(initial=-1)) + 1
        found = TopImages(np.full(shape, -1, np.int32), np.zeros(shape, np.float32))
        found.image[neuron, rank] = image_index
        found.activation[neuron, rank] = activation
        return found

    @cached_property
    def histogram(self) -> Int[np.ndarray, "neurons bins"]:
        """Number of images per neuron and bin of `HISTOGRAM_EDGES`."""
        table = self._read(HISTOGRAM, HISTOGRAM_SCHEMA)
        neuron, low, _, n_images = (column.to_numpy() for column in table.columns)
        counts = np.zeros((len(self.scores.neuron), len(HISTOGRAM_EDGES) - 1), np.int32)
        counts[neuron, np.searchsorted(HISTOGRAM_EDGES, low)] = n_images
        return counts

    def _read(self, name: str, schema: pa.Schema) -> pa.Table:
        return read_columns(self.folder, name, schema, "score")


def write_tables(folder: Folder, blocks: Sequence[NeuronStats]) -> None:
    """Writes the tables of a pass, from the statistics of consecutive ranges of neurons over all images."""
    folder.write_parquet(SCORES, score_table(blocks))
    folder.write_parquet(TOP_IMAGES, top_images_table(blocks))
    folder.write_parquet(HISTOGRAM, histogram_table(blocks))


def score_table(blocks: Sequence[NeuronStats]) -> pa.Table:
    """One row per neuron, in order. `ms` is NaN for dead neurons; maxima are 0 for latents that never fired."""
    n_images = blocks[0].n_images

    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(block, name) for block in blocks])

    n_firing = column("n_firing")
    scores = Scores(
        neuron=np.arange(len(n_firing)),
        ms=np.concatenate([block.monosemanticity() for block in blocks]),
        n_active=column("n_active"),
        n_firing=n_firing,
        frequency=n_firing / n_images,
        mean=column("total") / n_images,
        mean_active=column("total_firing") / np.maximum(n_firing, 1),
        max_image=column("max_image"),
        max_token=column("max_token"),
    )
    return pa.table(scores._asdict(), schema=SCORES_SCHEMA)


def top_images_table(blocks: Sequence[NeuronStats]) -> pa.Table:
    """One row per (neuron, rank), rank from 0; images on which the neuron is 0 are not listed."""
    value = np.concatenate([block.top_value for block in blocks])
    image = np.concatenate([block.top_image for block in blocks])
    neuron, rank = np.nonzero(image >= 0)
    columns = [neuron, rank.astype(np.int16), image[neuron, rank], value[neuron, rank].astype(np.float32)]
    return pa.table(columns, schema=TOP_IMAGES_SCHEMA)


def histogram_table(blocks: Sequence[NeuronStats]) -> pa.Table:
    """One row per (neuron, non-empty bin): the number of images with a value from `low` to below `high`, above 0.

    The first and the last bin also count values outside the range of `HISTOGRAM_EDGES`.
    """
    counts = np.concatenate([block.histogram for block in blocks])
    neuron, bins = np.nonzero(counts)
    columns = [neuron, HISTOGRAM_EDGES[bins], HISTOGRAM_EDGES[bins + 1], counts[neuron, bins]]
    return pa.table(columns, schema=HISTOGRAM_SCHEMA)
