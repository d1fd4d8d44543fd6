"""The whole study: every stage, the summary and the report. As a Ray job: `python -m jobs.study STUDY`."""

from __future__ import annotations

import math
import time
from dataclasses import asdict

from sae_ray.concepts.summary import comparison_lines
from sae_ray.report import REPORT, write_report
from sae_ray.report.neurons import shown_cells
from sae_ray.steering.evaluation import rate_lines
from sae_ray.steering.latent_names import name_lines
from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.models import check_models, models_needed
from sae_ray.study.plan import StudyPlan
from sae_ray.study.summary import compare, summarise, summary_lines
from sae_ray.study.trained import offsets, trained

from . import concepts, evaluate, extract, naming, pictures, score, steering, train
from .progress import say
from .stage import readable

MANY = 30
"""From more comparisons, or folders of a kind, on not each of them is told."""
FAR = 5
"""From so many spreads on, a mean may be worth subtracting (docs/training.md)."""


def run(plan: StudyPlan) -> dict:
    """Runs the unfinished steps of a study and returns its summary, computed from the files.

    Raises what the stages raise; finished work is kept.
    """
    started = time.monotonic()
    steps = list(plan.steps)
    missing = [step for step in steps if not step.finished]
    if not missing:
        say(f"{plan.study.name}: all {len(steps)} steps are done, nothing left to do")
    plan.check_imported()
    check_models(models_needed(plan.extracts, plan.concepts, plan.steerings, plan.namings))
    concepts.check(plan)
    train.check(plan)
    extract.run(plan)
    train.run(plan)
    evaluate.run(plan)
    score.run(plan)
    concepts.run(plan)
    naming.run(plan, steering.run(plan))
    summary = write_summary(plan)
    if plan.imported is None:
        pictures.run(plan)
        make_report(plan)
    if missing:
        say(f"{plan.study.name}: done in {time.monotonic() - started:.0f} s")
    return summary


def write_summary(plan: StudyPlan) -> dict:
    """The table of the grid and the comparisons; also writes them to `summary.json` under the root."""
    rows = summarise(plan)
    failures = {one.grid_cell.name: one.step.failure for one in plan.trains}
    summary = {
        "study": plan.study.name,
        "root": str(plan.root),
        "cells": [_row(row) for row in rows],
        "comparisons": [asdict(comparison) for comparison in compare(rows)],
        "mean_over_spread": offsets(trained(plan)),
        "concepts": {one.name: one.counts for one in concepts.cells(plan)},
        "steering": {one.name: record["counts"] for one in plan.steerings if (record := one.step.record())},
        "naming": {one.name: record["counts"]["methods"] for one in plan.namings if (record := one.step.record())},
        "failed": {name: reason for name, reason in failures.items() if reason},
        "table": summary_lines(rows),
    }
    plan.root.write_json("summary.json", summary)
    return summary


def make_report(plan: StudyPlan) -> Folder:
    """Makes the report of the finished cells unless it is up to date, and returns its folder."""
    plan.check_has_images("report")
    cells = shown_cells(plan)
    if cells:
        pictures.run_only(plan, plan.pictures_of(cells))
    started = time.monotonic()
    if write_report(plan):
        say(f"report: done in {time.monotonic() - started:.1f} s")
    return plan.root / REPORT


def _edit(study: Study) -> str:
    assert study.steering is not None, "it was evaluated"
    times = " times their largest value on a token" if study.steering.unit == "max" else ""
    return f'latents set to {study.steering.strength:g}{times}, "{study.steering.prompt}"'


def _row(row) -> dict:
    values = {name: value for name, value in asdict(row).items() if name != "grid_cell"}
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def summary_text(plan: StudyPlan, summary: dict) -> str:
    """The summary as text."""
    lines = [f"Study {summary['study']}: MonoSemanticity on held-out images", "", *summary["table"], ""]
    lines += [*_comparisons(summary["comparisons"]), ""]
    if summary["mean_over_spread"]:
        sites = ", ".join(f"{site} {offset:.2f}" for site, offset in summary["mean_over_spread"].items())
        far = max(summary["mean_over_spread"].values()) >= FAR and not plan.study.training.centre
        advice = f"; from {FAR} on, try training.centre = true" if far else ""
        lines += [f"|mean| of the activations, in units of their spread: {sites}{advice}", ""]
    if compared := comparison_lines(concepts.cells(plan)):
        lines += ["Concepts on held-out images: the best SAE by each measure", "", *compared, ""]
    for name, counts in summary["steering"].items():
        lines += [f"Steering by {name}: {_edit(plan.study)}", "", *rate_lines(counts), ""]
    if summary["naming"]:
        lines += ["Names that the LLaVA gives to latents, and in brackets those of controls", ""]
        lines += [*name_lines(summary["naming"]), ""]
    lines += [f"FAILED  {name}: {reason}" for name, reason in summary["failed"].items()]
    return "\n".join([*lines, *_files(plan)])


def _comparisons(comparisons: list[dict]) -> list[str]:
    """One line each; of many only those that do not hold."""
    failing = [one for one in comparisons if not one["holds"]]
    told = comparisons if len(comparisons) <= MANY else failing
    rest = ", all but those above" if failing and told is failing else ""
    return [
        *(f"{'yes' if one['holds'] else 'NO '}  {one['statement']}" for one in told),
        f"{len(comparisons) - len(failing)} of {len(comparisons)} comparisons hold{rest}",
    ]


def _files(plan: StudyPlan) -> list[str]:
    """Where everything lies; many folders of one kind in one line."""
    kinds: dict[str, list[tuple[Folder, int]]] = {}
    for step in plan.steps:
        record = step.record()
        if record is not None:
            kinds.setdefault(step.name.partition("-")[0], []).append((step.folder, sum(record["files"].values())))
    lines = ["Files:"]
    for kind, folders in kinds.items():
        if len(folders) > MANY:
            folders = [(f"{len(folders)} folders {plan.root / kind}-…", sum(size for _, size in folders))]
        lines += [f"  {readable(size):>8}  {folder}" for folder, size in folders]
    lines.append(f"  summary   {plan.root / 'summary.json'}")
    if (plan.root / REPORT).exists("index.html"):
        lines.append(f"  report    {plan.root / REPORT / 'index.html'}")
    return lines


if __name__ == "__main__":
    from .cli import run as command

    command()
