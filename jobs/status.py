"""The steps of a study, and how much of them is done."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sae_ray.errors import SaeRayError
from sae_ray.sae.weighing import told
from sae_ray.store.activations import READS_AT_ONCE, finished_parts
from sae_ray.store.steps import Step, look
from sae_ray.study.plan import StudyPlan
from sae_ray.study.weights import weights_ratio
from sae_ray.text_table import table_lines

from .progress import pace_texts
from .stage import readable


def status(plan: StudyPlan, known: Mapping[str, dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """One entry per step, in the order of work: name, stage, status, rows, bytes, seconds.

    Of steps that are not finished also `progress`, as their driver told it some seconds ago, and the last `failure`.

    Args:
        known: entries of steps that were finished before, by name; they are not looked at again.
    """
    known = known or {}
    present = set(plan.root.folders())  # a step that has not begun costs no request
    with ThreadPoolExecutor(READS_AT_ONCE) as readers:
        return list(readers.map(lambda step: known.get(step.name) or _entry(step, step.name in present), plan.steps))


def _entry(step: Step, present: bool) -> dict[str, Any]:
    record = problem = None
    if present:
        try:
            record = step.record()
        except SaeRayError as error:  # torn, or of another version
            problem = str(error)
    counts = record["counts"] if record else {}
    begun = look(step) if present and not record else None
    return {
        "step": step.name,
        "stage": step.stage,
        "status": record["status"] if record else "torn" if problem else begun.status if begun else "missing",
        "reason": record["reason"] if record else problem,
        "rows": counts.get("rows", counts.get("images")),
        "parts": len(finished_parts(step.folder)) if begun and step.stage == "extract" else None,
        "bytes": sum((record["files"] if record else begun.files if begun else {}).values()),
        "seconds": record["seconds"] if record else None,
        "progress": begun.progress if begun else None,
        "failure": begun.failure if begun else None,
    }


def status_lines(entries: list[dict[str, Any]]) -> list[str]:
    """The entries as text."""
    figures = table_lines([_figures(entry) for entry in entries], ">>>")
    progress = [_progress(entry) if entry["status"] == "running" else "" for entry in entries]
    rows = [
        [entry["status"], entry["step"], pace or line]
        for entry, pace, line in zip(entries, progress, figures, strict=True)
    ]
    lines = []
    for entry, line in zip(entries, table_lines(rows, "<<<"), strict=True):
        lines.append(line)
        if entry["reason"]:
            lines.append(f"    {entry['reason']}")
        if entry["status"] == "partial" and entry["progress"]:
            lines.append(f"    stopped: {_progress(entry)}")
        if failure := entry["failure"]:
            lines.append(f"    last failure, {failure['time']} on {failure['host']}: {failure['reason']}")
    return lines


def _figures(entry: dict[str, Any]) -> list[str]:
    rows = "" if entry["rows"] is None else f"{entry['rows']:,} rows"
    if entry["parts"]:
        rows = f"{entry['parts']:,} parts"
    seconds = "" if entry["seconds"] is None else f"{entry['seconds']:.1f} s"
    return [rows, readable(entry["bytes"]) if entry["bytes"] else "", seconds]


def _progress(entry: dict[str, Any]) -> str:
    pace = entry["progress"]
    if not pace:
        return ""
    text = "  ".join(pace_texts(pace, running=entry["status"] == "running"))
    return f"stage: {text}" if pace["of"] == "stage" else text


def dry_run(plan: StudyPlan) -> dict[str, Any]:
    """The steps of a study with rows, bytes on disk and work, before anything is done."""
    steps: list[dict[str, Any]] = [
        {
            "step": one.step.name,
            "stage": one.step.stage,
            "status": one.step.status(),
            "rows": one.rows,
            "bytes": one.bytes,
            "flops": one.flops,
        }
        for one in plan.plans
    ]
    left = [entry for entry in steps if entry["status"] not in ("done", "failed")]
    return {
        "study": plan.study.name,
        "root": str(plan.root),
        "steps": steps,
        "skipped": {name: dict(images.surveyed.skipped) for name, images in plan.images.items()},
        "weights": {
            train.grid_cell.name: ratio for train in plan.trains if (ratio := weights_ratio(train)) is not None
        },
        "images_to_encode": sum(images.n_images for images in plan.images.values() if _is_left(plan, images.name)),
        "bytes": sum(entry["bytes"] for entry in left),
        "flops": sum(entry["flops"] or 0 for entry in left),
        "free_bytes": plan.root.free_bytes(),
    }


def _is_left(plan: StudyPlan, images: str) -> bool:
    return any(extract.images.name == images and not extract.step.finished for extract in plan.extracts)


def dry_run_lines(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    rows = []
    for entry in report["steps"]:
        work = f"{entry['flops'] / 1e12:,.3g} TFLOP" if entry["flops"] else ""
        rows.append([entry["status"], entry["step"], f"{entry['rows']:,} rows", readable(entry["bytes"]), work])
    lines = [f"Study {report['study']} under {report['root']}", "", *table_lines(rows, "<<>>>")]
    lines += ["", *(f"{name}: {told(ratio)}" for name, ratio in report["weights"].items())] if report["weights"] else []
    free = report["free_bytes"]
    lines += [
        "",
        f"Left to do: {report['images_to_encode']:,} images to encode, at most {readable(report['bytes'])} on disk"
        + (f" ({readable(free)} are free)" if free is not None else "")
        + f", {report['flops'] / 1e12:,.3g} TFLOP in the encoders of the SAEs",
    ]
    return lines
