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


def run(plan: StudyPlan) -> dict:
    """Runs the unfinished steps of a study and returns its summary, computed from the files.

    Raises what the stages raise; finished work is kept.
    """
    started = time.monotonic()
    steps = list(plan.steps)
    missing = [step for step in steps if not step.finished]
    if not missing:
        say(f"{plan.study.name}: all {len(steps)} steps are done, nothing left to do")
    check_models(models_needed(plan.extracts, plan.concepts, plan.steerings, plan.namings))
    concepts.check(plan)
    train.check(plan)
    extract.run(plan)
    train.run(plan)
    evaluate.run(plan)
    score.run(plan)
    concepts.run(plan)
    steering.run(plan)
    naming.run(plan)
    summary = write_summary(plan)
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
    comparisons = summary["comparisons"]
    lines += [f"{'yes' if one['holds'] else 'NO '}  {one['statement']}" for one in comparisons]
    lines += [f"{sum(one['holds'] for one in comparisons)} of {len(comparisons)} comparisons hold", ""]
    if summary["mean_over_spread"]:
        sites = ", ".join(f"{site} {offset:.2f}" for site, offset in summary["mean_over_spread"].items())
        lines += [f"|mean| of the activations, in units of their spread: {sites}", ""]
    if compared := comparison_lines(concepts.cells(plan)):
        lines += ["Concepts on held-out images: the best SAE by each measure", "", *compared, ""]
    for name, counts in summary["steering"].items():
        lines += [f"Steering by {name}: {_edit(plan.study)}", "", *rate_lines(counts), ""]
    if summary["naming"]:
        lines += ["Names that the LLaVA gives to latents, and in brackets those of controls", ""]
        lines += [*name_lines(summary["naming"]), ""]
    lines += [f"FAILED  {name}: {reason}" for name, reason in summary["failed"].items()]
    lines += ["Files:"]
    for step in plan.steps:
        record = step.record()
        if record is not None:
            lines.append(f"  {readable(sum(record['files'].values())):>8}  {step.folder}")
    lines.append(f"  summary   {plan.root / 'summary.json'}")
    if (plan.root / REPORT).exists("index.html"):
        lines.append(f"  report    {plan.root / REPORT / 'index.html'}")
    return "\n".join(lines)


if __name__ == "__main__":
    from .cli import run as command

    command()
