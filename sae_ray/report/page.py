"""Renders the report's main page from the results of a study's steps."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sae_ray.concepts.naming import label_title
from sae_ray.encoders.info import EncoderInfo
from sae_ray.encoders.sources import model_name
from sae_ray.report import plots
from sae_ray.report.album import SIDE, Album, thumbnail_size
from sae_ray.report.data import PER_CHUNK
from sae_ray.report.heat import caution, why_none
from sae_ray.report.meanings import INDEXED, MEASURED, Meaning
from sae_ray.report.neurons import Neurons, names_of_labels
from sae_ray.report.steering import SteeringResult, show
from sae_ray.report.wording import count, duration, number, share
from sae_ray.scores.statistics import HISTOGRAM_EDGES
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import skipped_lines
from sae_ray.study.step_plans import SteeringPlan
from sae_ray.study.summary import BEST, CellSummary, compare
from sae_ray.study.trained import cautions, trained

if TYPE_CHECKING:
    import jinja2

ASSETS = Path(__file__).parent / "assets"
REJECTS_SHOWN = 200
MANY_PLOTS = 12
"""From more on the reader opens those of a site."""
MANY_ROWS = 30
"""From more on the reader opens how each SAE was trained, and the comparisons that hold."""
SETS = {"train": "training images", "heldout": "held-out images"}


class Reject(NamedTuple):
    """An image that could not be read."""

    images: str
    """The image set, as shown to the reader."""
    image_id: str
    reason: str


def render(
    plan: StudyPlan,
    rows: Sequence[CellSummary],
    cells: Sequence[Neurons],
    steering: Sequence[SteeringResult],
    album: Album,
    facts: Mapping[str, Any],
    notes: Sequence[str],
) -> str:
    """The text of `index.html`.

    Args:
        plan: of the study.
        rows: its summary.
        cells: those that are shown.
        steering: what steering found.
        album: the images that are shown.
        facts: as `page_facts` gives them.
        notes: what the reader should know, beside which steps are missing.
    """
    min_images = plan.study.scoring.min_images
    drawn = {
        "grid_plots": plots.grid_plots(rows),
        "curve_plots": plots.curve_plots(cells, min_images),
        "fidelity_plots": plots.fidelity_plots(rows),
        "training_plots": plots.training_plots(plan.trains),
    }
    by_name = {cell.name: cell for cell in cells}
    comparisons = compare(list(rows))
    rejects = find_rejects(plan)
    steps = [_step(step) for step in plan.steps]
    return template("index.html.jinja").render(
        study=plan.study.name,
        encoder=model_name(plan.study.encoder.model),
        judge=model_name(plan.study.judge.model),
        root=str(plan.root),
        version=version("sae-ray"),
        tiles=_tiles(plan, rows, steering, rejects),
        notes=[*_missing(plan), *cautions(plan.study), *notes],
        rows=rows,
        trained=trained(plan),
        dead_after=plan.study.training.dead_after_samples,
        best=BEST,
        min_images=min_images,
        comparisons=comparisons,
        many=MANY_ROWS,
        n_seeds=len({row.grid_cell.seed for row in rows if row.grid_cell is not None}),
        n_holding=sum(one.holds for one in comparisons),
        facts=facts,
        steering=[show(result, by_name[result.plan.name], album) for result in steering],
        run=_run(plan),
        steps=steps,
        seconds=duration(sum(step["seconds"] or 0 for step in steps)),
        rejects=rejects,
        rejects_shown=rejects[:REJECTS_SHOWN],
        skipped=skipped_lines(plan),
        **{name: _grouped(group) for name, group in drawn.items()},
    )


def _grouped(drawn: Sequence[plots.Plot]) -> list[dict[str, Any]]:
    """The plots as the template needs them, many of them under titles."""
    groups: dict[str, list[dict[str, str]]] = {}
    for plot in drawn:
        groups.setdefault(plot.group if len(drawn) > MANY_PLOTS else "", []).append(plots.figure(plot))
    return [{"title": title, "plots": found} for title, found in groups.items()]


def template(name: str) -> jinja2.Template:
    """A page of the assets, to be rendered."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": number, "count": count, "share": share}
    return environment.get_template(name)


def find_rejects(plan: StudyPlan) -> list[Reject]:
    """The images that an extraction could not read, each with its reasons."""
    found: dict[Reject, None] = {}
    for extract in plan.extracts:
        if extract.step.finished:
            for row in extract.step.folder.read_parquet("rejects.parquet").to_pylist():
                found[Reject(SETS[extract.images.name], row["image_id"], row["reason"])] = None
    return list(found)


def page_facts(
    plan: StudyPlan,
    rows: Sequence[CellSummary],
    cells: Sequence[Neurons],
    meanings: Mapping[str, Meaning],
    steering: Sequence[SteeringResult],
    album: Album,
) -> dict[str, Any]:
    """The facts that the scripts need at start-up."""
    height, width = thumbnail_size(plan.encoder.image_size)
    commands = {one.name: _commands(plan, one) for one in plan.steerings}
    saes = [row for row in rows if row.grid_cell is not None and not math.isnan(row.top_ms)]
    return {
        "study": plan.study.name,
        "home": "",
        "has_concepts": bool(meanings),
        "scores": {one.key: {**one._asdict(), "indexed": one in INDEXED} for one in (*INDEXED, *MEASURED)},
        "cells": [
            {
                "name": cell.name,
                "n_neurons": cell.score.neurons,
                "n_images": (cell.score.step.record() or {})["counts"]["images"],
                "level_ends": cell.level_ends,
                "heat_none": why_none(cell),
                "heat_caution": caution(cell),
                "steered": any(result.plan.name == cell.name for result in steering),
                "scores": [one.key for one in meanings[cell.name].scores] if cell.name in meanings else None,
                "steering": commands.get(cell.name),
            }
            for cell in cells
        ],
        "first": max(saes, key=lambda row: row.top_ms).name if saes else None,
        "labels": label_names(plan),
        "ignored": ignored_labels(plan),
        "card_rows": -(-plan.study.scoring.top_images // 4),
        "thumbnail": {"side": SIDE, "width": width, "height": height},
        "n_pictured": album.n_pictured,
        "per_chunk": PER_CHUNK,
        "histogram_edges": HISTOGRAM_EDGES.tolist(),
    }


def _commands(plan: StudyPlan, steering: SteeringPlan) -> dict[str, str]:
    """How to steer by a latent of an SAE, but for the latent."""
    llava, sae = steering.steering.llava, steering.sae.step.folder
    return {
        "ask": shlex.join(["sae-ray", "ask", "white", "--llava", llava, "--sae", str(sae)]),
        "serve": shlex.join(["sae-ray", "serve", "--root", str(plan.root)]),
    }


def label_names(plan: StudyPlan) -> list[str]:
    """The labels of the images that pictures come from as they are shown; empty for one that none of them has."""
    found = names_of_labels(plan.images[plan.study.scoring.pictures].labels)
    return [label_title(found.get(label, "")) for label in range(max(found, default=-1) + 1)]


def ignored_labels(plan: StudyPlan) -> list[int]:
    """Those of them that the study ignores: a reader first sees the neurons of others."""
    study = plan.study
    names = {name for part in (study.concepts, study.steering) if part is not None for name in part.ignore_labels}
    found = names_of_labels(plan.images[study.scoring.pictures].labels)
    return [label for label, name in sorted(found.items()) if name in names]


def _tiles(
    plan: StudyPlan,
    rows: Sequence[CellSummary],
    steering: Sequence[SteeringResult],
    rejects: Sequence[Reject],
) -> list[dict[str, str]]:
    bad = Counter(reject.images for reject in {reject._replace(reason="") for reject in rejects})
    tiles = [
        {"name": SETS[name], "value": count(images.n_images), "note": f"{count(bad[SETS[name]])} rejected"}
        for name, images in plan.images.items()
    ]
    done = [train for train in plan.trains if train.step.finished and train.step.failure is None]
    failed = [train for train in plan.trains if train.step.failure is not None]
    note = f"of {len(plan.trains)}, {len(failed)} failed" if failed else f"of {len(plan.trains)}"
    tiles.append({"name": "SAEs trained", "value": count(len(done)), "note": note})
    saes = [row for row in rows if row.grid_cell is not None and not math.isnan(row.mean_ms)]
    raw = {row.site: row for row in rows if row.grid_cell is None}
    if saes:
        best = max(saes, key=lambda row: row.mean_ms)
        against = f"raw neurons {number(raw[best.site].mean_ms, 3)}" if best.site in raw else best.name
        tiles.append({"name": "highest mean MS", "value": number(best.mean_ms, 3), "note": against})
    comparisons = compare(list(rows))
    if comparisons:
        holding = sum(one.holds for one in comparisons)
        value = f"{holding} of {len(comparisons)}"
        tiles.append({"name": "comparisons", "value": value, "note": "agree with the paper"})
    white = [result.counts["kinds"]["white"] for result in steering if "white" in result.counts["kinds"]]
    if white and white[0]["asked"]:
        value = f"{count(white[0]['right'])} of {count(white[0]['asked'])}"
        tiles.append({"name": "steering", "value": value, "note": "concepts named on a white image"})
    return tiles


def _missing(plan: StudyPlan) -> list[str]:
    """Notes on failed steps, and on results that are missing because their step is not done."""
    notes = [f"{train.grid_cell.name} failed: {train.step.failure}" for train in plan.trains if train.step.failure]
    # The pictures of all cells may be missing where those of the finished ones are shown.
    missing = [step for step in plan.steps if step is not plan.pictures.step and not step.finished]
    if missing:
        labels = ", ".join(step.label for step in missing[:6]) + (", …" if len(missing) > 6 else "")
        notes.append(
            f"{len(missing)} of {len(list(plan.steps))} steps are not done, so their results are not shown: {labels}. "
            "Run them with `sae-ray run`."
        )
    return notes


def _run(plan: StudyPlan) -> list[tuple[str, str]]:
    """Name and value of each fact about the run."""
    study = plan.study
    records = [record for step in plan.steps if (record := step.record()) is not None]
    commits = sorted({record["git_commit"][:10] for record in records if record["git_commit"]})
    versions: dict[str, set[str]] = {}
    for record in records:
        for package, found in record["versions"].items():
            versions.setdefault(package, set()).add(found)
    facts = [
        ("encoder", _model(plan.encoder)),
        ("judge", _model(plan.judge)),
        *((SETS[name], str(images.folder)) for name, images in plan.images.items()),
        ("seed", str(study.seed)),
        ("git commit", ", ".join(commits) or "–"),
        *((package, ", ".join(sorted(found))) for package, found in versions.items()),
    ]
    if records:
        facts.append(("last step done", max(record["finished_at"] for record in records)))
    return facts


def _model(info: EncoderInfo) -> str:
    return f"{info.name} @ {info.revision[:10]}" if info.revision else info.name


def _step(step) -> dict[str, Any]:
    record = step.record()
    counts = record["counts"] if record else {}
    return {
        "name": step.name,
        "stage": step.stage,
        "status": step.status(),
        "reason": record["reason"] if record else None,
        "rows": counts.get("rows", counts.get("images")),
        "seconds": record["seconds"] if record else None,
        "time": duration(record["seconds"] if record else None),
    }
