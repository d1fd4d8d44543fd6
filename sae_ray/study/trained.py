"""What is known of the training of SAEs beside how good they are: where activations lie, and why latents are dead."""

from __future__ import annotations

from dataclasses import dataclass

from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan

LARGE_OFFSET = 10.0
"""Times its spread that the mean of a site's activations may lie from 0 without a word about it."""


@dataclass(frozen=True)
class Trained:
    """One SAE. What its step does not tell is None."""

    name: str
    """Of the cell."""
    site: str
    """That it was trained on."""
    offset: float | None
    """|mean| of the activations there, in units of their spread."""
    kept_out_l0: float | None
    """Active latents per activation on images that were kept out of training; None where none were."""
    never_fired: int | None
    stopped_firing: int | None
    revived: int | None


def trained(plan: StudyPlan) -> list[Trained]:
    """The SAEs that are trained and did not fail, in the order of the study."""
    rows = []
    for one in plan.trains:
        record = one.step.record()
        if record is not None and record["status"] == "done":
            counts = record["counts"]
            found = [counts.get(key) for key in ("kept_out_l0", "never_fired", "stopped_firing", "revived")]
            rows.append(Trained(one.grid_cell.name, one.grid_cell.site.name, counts.get("mean_over_spread"), *found))
    return rows


def offsets(rows: list[Trained]) -> dict[str, float]:
    """Site -> |mean| of its activations, in units of their spread."""
    return {row.site: row.offset for row in rows if row.offset is not None}


def cautions(study: Study) -> list[str]:
    """What to know before training."""
    training = study.training
    samples = training.steps * training.batch_size
    revives = training.auxk_weight > 0 and any(cell.cell.kind.revives for cell in study.cells())
    if not revives or samples >= training.dead_after_samples:
        return []
    return [
        f"training.dead_after_samples = {training.dead_after_samples:,} is more than the {samples:,} samples of "
        "training.steps: no latent can count as dead, so none is revived; lower it to a tenth of them or less"
    ]
