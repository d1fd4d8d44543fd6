"""By what the dimensions of a cell's activations count, as far as it is known before training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_ray.encoders.sources import named_by
from sae_ray.errors import SaeRayError
from sae_ray.sae.weighing import SOURCES, Weighing, by_monosemanticity, read_table
from sae_ray.scores.tables import ScoreTables
from sae_ray.store.steps import digest

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float

    from sae_ray.study.step_plans import TrainPlan


def significance(train: TrainPlan) -> Float[np.ndarray, " d_in"] | None:
    """From scores of raw neurons or from a table; None for a cell whose weights are uniform or come from variances.

    Raises:
        UsageError: the table cannot be read.
        SaeRayError: it has changed since the study was planned, or the scores are damaged.
    """
    path = train.grid_cell.cell.weights
    if train.raw_scores is not None:
        return by_monosemanticity(ScoreTables(train.raw_scores.step.folder).scores.ms)
    if path in SOURCES:
        return None
    with named_by("grid.weights", path):
        s = read_table(path)
    if digest(s.tolist()) != train.step.config["weights"]:
        raise SaeRayError(f"grid.weights = {path!r}: the table has changed since the study was planned; run again")
    return s


def weights_ratio(train: TrainPlan) -> float | None:
    """The largest weight by the smallest of a cell with weights: of a trained SAE, or as soon as it is known. None also
    where a dimension does not count at all."""
    if not train.grid_cell.cell.weighted:
        return None
    record = train.step.record()
    if record is not None:
        return record["counts"].get("gamma_ratio")
    if train.raw_scores is not None and not train.raw_scores.step.finished:
        return None
    s = significance(train)
    ratio = None if s is None else Weighing.of(s, train.grid_cell.cell.alpha).ratio
    return ratio if ratio != float("inf") else None
