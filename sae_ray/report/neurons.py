"""The neurons of one cell, read from the finished scoring steps for the report."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from sae_ray.scores.scoring import majority
from sae_ray.scores.statistics import HISTOGRAM_EDGES
from sae_ray.study.plan import ImagePlan, ScorePlan, StudyPlan

if TYPE_CHECKING:
    import pyarrow as pa
    from jaxtyping import Float, Int


@dataclass(frozen=True, eq=False)
class Neurons:
    """The latents of an SAE, or the raw neurons of a site. Arrays have one row per neuron."""

    score: ScorePlan
    """The scoring pass over held-out images."""
    pictures: ImagePlan
    """The image set that the top images come from."""
    columns: dict[str, np.ndarray]
    """The columns of `scores.parquet`."""
    order: Int[np.ndarray, " live"]
    """Neurons that fired at least once: first those scored on enough images, highest score first, then the others."""
    top_image: Int[np.ndarray, "neurons top"]
    """`image_index` in the image set of `pictures`; -1 for no image."""
    top_activation: Float[np.ndarray, "neurons top"]
    histogram: Int[np.ndarray, "neurons bins"]
    """Number of held-out images per activation bin of `HISTOGRAM_EDGES`."""
    label: Int[np.ndarray, " neurons"]
    """The most common label of the top images; -1 if none has a label."""
    purity: Float[np.ndarray, " neurons"]
    """The share of top images with this label."""

    @property
    def name(self) -> str:
        return self.score.name

    @property
    def level_ends(self) -> list[int]:
        """The end of each Matryoshka level; other cells have one level."""
        if self.score.sae is None:
            return [self.score.neurons]
        train = self.score.sae
        return list(accumulate(train.grid_cell.cell.group_sizes(train.activations.width)))


def read_neurons(plan: StudyPlan) -> list[Neurons]:
    """The neurons of each cell whose scoring steps are all finished."""
    images = plan.images[plan.study.scoring.pictures]
    found = []
    for score in plan.scores:
        _, pictures = plan.passes(score.name)
        if score.embeddings is not None and _is_done(score) and _is_done(pictures):
            found.append(_read(score, pictures, images, plan.study.scoring.min_images))
    return found


def _is_done(score: ScorePlan) -> bool:
    return score.step.finished and score.step.failure is None


def _read(score: ScorePlan, pictures: ScorePlan, images: ImagePlan, min_images: int) -> Neurons:
    table = score.step.folder.read_parquet("scores.parquet")
    columns = {name: table[name].to_numpy() for name in table.column_names}
    n_neurons, n_top = table.num_rows, pictures.step.config["top_images"]

    top = pictures.step.folder.read_parquet("top_images.parquet")
    place = top["neuron"].to_numpy(), top["rank"].to_numpy()
    top_image = np.full((n_neurons, n_top), -1, dtype=np.int32)
    top_activation = np.zeros((n_neurons, n_top), dtype=np.float32)
    top_image[place] = top["image_index"].to_numpy()
    top_activation[place] = top["activation"].to_numpy()

    neuron, rank = np.nonzero(top_image >= 0)
    label, purity = majority(neuron, image_labels(images.labels)[top_image[neuron, rank]], n_neurons)
    return Neurons(
        score=score,
        pictures=images,
        columns=columns,
        order=_order(columns, top_image[:, 0] >= 0, min_images),
        top_image=top_image,
        top_activation=top_activation,
        histogram=_histogram(score.step.folder.read_parquet("histogram.parquet"), n_neurons),
        label=label,
        purity=purity,
    )


def _order(columns: dict[str, np.ndarray], has_picture: np.ndarray, min_images: int) -> np.ndarray:
    ms = columns["ms"]
    unsupported = (columns["n_active"] < min_images) | np.isnan(ms)
    order = np.lexsort((columns["neuron"], -np.nan_to_num(ms, nan=-2.0), unsupported))
    return order[((columns["n_firing"] > 0) | has_picture)[order]]


def _histogram(table: pa.Table, n_neurons: int) -> np.ndarray:
    counts = np.zeros((n_neurons, len(HISTOGRAM_EDGES) - 1), dtype=np.int32)
    bins = np.searchsorted(HISTOGRAM_EDGES, table["low"].to_numpy())
    counts[table["neuron"].to_numpy(), bins] = table["n_images"].to_numpy()
    return counts


def image_labels(labels: pa.Table) -> Int[np.ndarray, " images"]:
    """The label of every image of a table of labels; -1 where there is none."""
    return labels["label"].fill_null(-1).to_numpy().astype(np.int64)
