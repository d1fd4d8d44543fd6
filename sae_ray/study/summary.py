"""What a study found, computed from its files."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from sae_ray.scores.tables import ScoreTables
from sae_ray.study.config import GridCell
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import ScorePlan, TrainPlan
from sae_ray.text_table import number, table_lines

BEST = 32
"""The best neurons of a cell whose mean is compared over widths; the single best says little."""


@dataclass(frozen=True)
class CellSummary:
    """One row of the summary: an SAE, or the raw neurons of a site."""

    name: str
    grid_cell: GridCell | None
    """None for raw neurons."""
    site: str
    """Name of the site that is scored."""
    n_neurons: int
    n_scored: int
    """Neurons active on at least `scoring.min_images` images."""
    mean_ms: float
    best_ms: float
    top_ms: float
    """Mean over the 32 best neurons (over all, where there are fewer)."""
    l0: float | None
    r2: float | None
    dead_fraction: float | None


@dataclass(frozen=True)
class Comparison:
    """One statement of the paper, put to the test by this study's numbers."""

    statement: str
    holds: bool


def summarise(plan: StudyPlan) -> list[CellSummary]:
    """One row per raw site and per SAE that was scored on held-out images."""
    return [_summarise(plan, score) for score in plan.scores if score.is_heldout and score.step.finished]


def fidelity(plan: StudyPlan, sae: TrainPlan) -> dict[str, Any]:
    """What the evaluation of an SAE found, as `FidelitySummary` has it; empty where it is not evaluated."""
    record = next(one for one in plan.evaluations if one.sae is sae).step.record()
    return record["counts"] if record else {}


def _summarise(plan: StudyPlan, score: ScorePlan) -> CellSummary:
    scores = ScoreTables(score.step.folder).scores
    scored = (scores.n_active >= plan.study.scoring.min_images) & ~np.isnan(scores.ms)
    ms = np.sort(scores.ms[scored])[::-1]
    counts = fidelity(plan, score.sae) if score.sae else {}
    return CellSummary(
        name=score.name,
        grid_cell=score.sae.grid_cell if score.sae else None,
        site=score.activations.site.name,
        n_neurons=len(scored),
        n_scored=len(ms),
        mean_ms=float(ms.mean()) if len(ms) else float("nan"),
        best_ms=float(ms[0]) if len(ms) else float("nan"),
        top_ms=float(ms[:BEST].mean()) if len(ms) else float("nan"),
        l0=counts.get("l0"),
        r2=counts.get("r2"),
        dead_fraction=counts.get("dead_fraction"),
    )


def compare(rows: list[CellSummary]) -> list[Comparison]:
    """The paper's three claims, cell by cell: SAEs above raw neurons, sparser above denser, wider above narrower.

    Cells without a scored neuron are left out.
    """
    rows = [row for row in rows if row.n_scored]
    raw = {row.site: row for row in rows if row.grid_cell is None}
    comparisons = []
    for row in rows:
        if row.grid_cell is not None and row.site in raw:
            below = raw[row.site].mean_ms
            text = f"{row.name}: mean MS {row.mean_ms:.3f} above the raw neurons' {below:.3f}"
            comparisons.append(Comparison(text, row.mean_ms > below))
    for sparser, denser in _neighbours(rows, by="k"):
        text = f"{sparser.name} above {denser.name}: mean MS {sparser.mean_ms:.3f}, {denser.mean_ms:.3f}"
        comparisons.append(Comparison(text, sparser.mean_ms > denser.mean_ms))
    for narrower, wider in _neighbours(rows, by="expansion"):
        text = (
            f"{wider.name} above {narrower.name}: mean MS of the {BEST} best {wider.top_ms:.3f}, {narrower.top_ms:.3f}"
        )
        comparisons.append(Comparison(text, wider.top_ms > narrower.top_ms))
    return comparisons


def _neighbours(rows: list[CellSummary], by: str) -> list[tuple[CellSummary, CellSummary]]:
    """Pairs of SAEs that differ in `by` alone, each with the next larger one."""
    groups = defaultdict(list)
    for row in rows:
        if row.grid_cell is not None and row.grid_cell.cell.k is not None:
            cell = row.grid_cell.cell
            other = cell.expansion if by == "k" else cell.k
            method = cell.architecture, cell.weights, cell.alpha, cell.monosemanticity
            place = (row.grid_cell.site, row.site, row.grid_cell.seed, other, *method)
            groups[place].append((getattr(cell, by), row))
    ordered = (sorted(group, key=lambda pair: pair[0]) for group in groups.values())
    return [(a[1], b[1]) for group in ordered for a, b in pairwise(group)]


def summary_lines(rows: list[CellSummary]) -> list[str]:
    """The rows as an aligned table."""
    header = ["", "neurons", "scored", "mean MS", f"best {BEST}", "best", "L0", "R²", "dead"]
    cells = [header]
    for row in rows:
        fidelity = [row.l0, row.r2, row.dead_fraction]
        cells.append(
            [
                row.name,
                f"{row.n_neurons:,}",
                f"{row.n_scored:,}",
                *(number(value, 3) for value in (row.mean_ms, row.top_ms, row.best_ms)),
                *(number(value, digits) for value, digits in zip(fidelity, (1, 3, 2), strict=True)),
            ]
        )
    return table_lines(cells, "<" + ">" * (len(header) - 1))
