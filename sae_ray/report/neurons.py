"""The neurons of one cell, read from the finished scoring steps for the report."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from sae_ray.scores.scoring import majority
from sae_ray.scores.tables import Scores, ScoreTables
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import ImagePlan, ScorePlan

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
    columns: Scores
    """The numbers of that pass."""
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


def shown_cells(plan: StudyPlan) -> list[str]:
    """The names of the cells whose scoring steps are all finished."""
    names = [score.name for score in plan.scores if score.is_heldout]
    return [name for name in names if all(map(_is_done, plan.passes(name)))]


def read_neurons(plan: StudyPlan, names: Collection[str] | None = None) -> list[Neurons]:
    """The neurons of each of `shown_cells`, or of those of them that are named."""
    images = plan.images[plan.study.scoring.pictures]
    passes = [plan.passes(name) for name in shown_cells(plan) if names is None or name in names]
    return [_read(score, pictures, images, plan.study.scoring.min_images) for score, pictures in passes]


def _is_done(score: ScorePlan) -> bool:
    record = score.step.record()
    return record is not None and record["status"] == "done"


def _read(score: ScorePlan, pictures: ScorePlan, images: ImagePlan, min_images: int) -> Neurons:
    tables = ScoreTables(score.step.folder)
    top_image, top_activation = ScoreTables(pictures.step.folder).top_images
    neuron, rank = np.nonzero(top_image >= 0)
    label, purity = majority(neuron, image_labels(images.labels)[top_image[neuron, rank]], len(top_image))
    return Neurons(
        score=score,
        pictures=images,
        columns=tables.scores,
        order=_order(tables.scores, top_image, min_images),
        top_image=top_image,
        top_activation=top_activation,
        histogram=tables.histogram,
        label=label,
        purity=purity,
    )


def _order(scores: Scores, top_image: np.ndarray, min_images: int) -> np.ndarray:
    unsupported = (scores.n_active < min_images) | np.isnan(scores.ms)
    order = np.lexsort((scores.neuron, -np.nan_to_num(scores.ms, nan=-2.0), unsupported))
    shown = (scores.n_firing > 0) | (top_image >= 0).any(axis=1)
    return order[shown[order]]


def names_of_labels(labels: pa.Table) -> dict[int, str]:
    """By their numbers, some of which are missing where only the other image set has such images."""
    found = dict(zip(labels["label"].to_pylist(), labels["label_name"].to_pylist(), strict=True))
    found.pop(None, None)
    return found


def image_labels(labels: pa.Table) -> Int[np.ndarray, " images"]:
    """The label of every image of a table of labels; -1 where there is none."""
    return labels["label"].fill_null(-1).to_numpy().astype(np.int64)
