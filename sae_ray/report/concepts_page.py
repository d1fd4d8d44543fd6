"""Renders the report's page of concepts: what the neurons mean, and which SAE is best by which measure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

from sae_ray.concepts.summary import MEASURES, Cell, Compared, best_by_measure
from sae_ray.report import plots
from sae_ray.report.meanings import INDEXED, MEASURED, Meaning
from sae_ray.report.page import template
from sae_ray.report.people import Judged
from sae_ray.report.wording import number
from sae_ray.study.plan import StudyPlan
from sae_ray.study.summary import BEST, CellSummary

OF_SUMMARY = (
    Compared("mean_ms", "mean MS"),
    Compared("top_ms", f"mean MS of the {BEST} best"),
    Compared("r2", "R²"),
)
"""Measures of other stages, attributes of `CellSummary`."""
SHOWN_COUNTS = ("drawn", "names_right", "pure")
"""Figures that the page tells of each cell."""


class Depths(NamedTuple):
    """How deep in the taxonomy the top images of a cell's neurons meet, on average; None where there is no value."""

    name: str
    whole: float | None
    """Of all neurons."""
    levels: list[float | None]
    """Of each Matryoshka level, as many for all cells; none if no cell has several."""


def render_concepts(
    plan: StudyPlan,
    rows: Sequence[CellSummary],
    meanings: Mapping[str, Meaning],
    judged: Sequence[Judged],
    facts: Mapping[str, Any],
) -> str:
    """The text of `concepts.html`.

    Args:
        plan: of the study.
        rows: its summary.
        meanings: of the cells, by name; at least one.
        judged: what people said.
        facts: those of the main page.
    """
    cells = _cells(rows, meanings)
    measures = [one for one in (*OF_SUMMARY, *MEASURES) if any(cell.counts.get(one.key) is not None for cell in cells)]
    best = best_by_measure(cells, measures)
    return template("concepts.html.jinja").render(
        study=plan.study.name,
        version=version("sae-ray"),
        cells=cells,
        measures=measures,
        best=best,
        best_of={one.measure.key: one.name for one in best},
        depths=_depths(cells),
        figure=_figure,
        min_images=plan.study.scoring.min_images,
        judged=[(one, plots.figure(one.plot)) for one in judged],
        scores=(*INDEXED, *MEASURED),
        facts=_facts(meanings, facts),
    )


def _cells(rows: Sequence[CellSummary], meanings: Mapping[str, Meaning]) -> list[Cell]:
    found = []
    for row in rows:
        if row.name in meanings:
            own = {one.key: _known(getattr(row, one.key)) for one in OF_SUMMARY}
            found.append(Cell(row.name, row.site, row.grid_cell is not None, own | meanings[row.name].counts))
    return found


def _depths(cells: Sequence[Cell]) -> list[Depths]:
    measured = [(cell, cell.counts["depths"]) for cell in cells if cell.counts.get("depths") is not None]
    several = {cell.name: levels for cell, levels in measured if len(levels) > 1}
    width = max(map(len, several.values()), default=0)
    return [
        Depths(cell.name, cell.counts["depth"], (several.get(cell.name, []) + [None] * width)[:width])
        for cell, _ in measured
    ]


def _facts(meanings: Mapping[str, Meaning], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the main page, with what this page needs besides."""
    cells = [
        {key: value for key, value in cell.items() if key != "steering"}
        | {"counts": {key: meanings[cell["name"]].counts.get(key) for key in SHOWN_COUNTS}}
        for cell in facts["cells"]
        if cell["name"] in meanings
    ]
    first = facts["first"] if facts["first"] in meanings else cells[0]["name"]
    return {
        **facts,
        "home": "index.html",
        "cells": cells,
        "first": first,
    }


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _figure(value: float | None) -> str:
    return f"{value:,}" if isinstance(value, int) else number(value, 3)
