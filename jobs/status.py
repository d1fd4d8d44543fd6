"""The steps of a study, and how much of them is done."""

from __future__ import annotations

from typing import Any

from sae_ray.store.activations import finished_parts
from sae_ray.study.plan import StudyPlan

from .stage import readable


def status(plan: StudyPlan) -> list[dict[str, Any]]:
    """One entry per step, in the order of work: name, stage, status, rows, bytes, seconds."""
    entries = []
    for step in plan.steps:
        record = step.record()
        counts = record["counts"] if record else {}
        entries.append(
            {
                "step": step.name,
                "stage": step.stage,
                "status": record["status"] if record else step.status(),
                "reason": record["reason"] if record else None,
                "rows": counts.get("rows", counts.get("images")),
                "parts": len(finished_parts(step.folder)) if step.stage == "extract" and not record else None,
                "bytes": sum(step.folder.files(recursive=True).values()),
                "seconds": record["seconds"] if record else None,
            }
        )
    return entries


def status_lines(entries: list[dict[str, Any]]) -> list[str]:
    """The entries as text."""
    width = max(len(entry["step"]) for entry in entries)
    lines = []
    for entry in entries:
        rows = "" if entry["rows"] is None else f"{entry['rows']:,} rows"
        if entry["parts"]:
            rows = f"{entry['parts']:,} parts"
        seconds = "" if entry["seconds"] is None else f"{entry['seconds']:.1f} s"
        size = readable(entry["bytes"]) if entry["bytes"] else ""
        lines.append(f"{entry['status']:8} {entry['step']:{width}}  {rows:>16}  {size:>8}  {seconds:>9}".rstrip())
        if entry["reason"]:
            lines.append(f"         {entry['reason']}")
    return lines


def dry_run(plan: StudyPlan) -> dict[str, Any]:
    """The steps of a study with rows, bytes on disk and work, before anything is done."""
    steps: list[dict[str, Any]] = []
    for images in plan.images.values():
        for step in (images.step, images.labels_step):
            steps.append({"step": step.name, "rows": images.n_images, "bytes": 60 * images.n_images})
    for extract in plan.extracts:
        steps.append({"step": extract.step.name, "rows": extract.rows, "bytes": extract.bytes})
    for train in plan.trains:
        training = train.grid_cell.cell.training
        rows = training.batch_size * training.steps
        steps.append({"step": train.step.name, "rows": rows, "bytes": train.bytes, "flops": train.flops})
    for one in plan.evaluations:
        steps.append({"step": one.step.name, "rows": one.activations.rows, "bytes": one.bytes, "flops": one.flops})
    for score in plan.scores:
        rows = score.activations.rows
        steps.append({"step": score.step.name, "rows": rows, "bytes": score.bytes, "flops": score.flops})
    for steering in plan.steerings:
        steps.append({"step": steering.step.name, "rows": steering.answers, "bytes": steering.bytes})
    for entry, step in zip(steps, plan.steps, strict=True):
        entry |= {"stage": step.stage, "status": step.status()}
    left = [entry for entry in steps if entry["status"] not in ("done", "failed")]
    return {
        "study": plan.study.name,
        "root": str(plan.root),
        "steps": steps,
        "images_to_encode": sum(images.n_images for images in plan.images.values() if _is_left(plan, images.name)),
        "bytes": sum(entry["bytes"] for entry in left),
        "flops": sum(entry.get("flops", 0.0) for entry in left),
        "free_bytes": plan.root.free_bytes(),
    }


def _is_left(plan: StudyPlan, images: str) -> bool:
    return any(extract.images.name == images and not extract.step.finished for extract in plan.extracts)


def dry_run_lines(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    width = max(len(entry["step"]) for entry in report["steps"])
    lines = [f"Study {report['study']} under {report['root']}", ""]
    for entry in report["steps"]:
        work = f"{entry['flops'] / 1e12:,.3g} TFLOP" if entry.get("flops") else ""
        size = readable(entry["bytes"])
        lines.append(
            f"{entry['status']:8} {entry['step']:{width}}  {entry['rows']:>15,} rows  {size:>8}  {work}".rstrip()
        )
    free = report["free_bytes"]
    lines += [
        "",
        f"Left to do: {report['images_to_encode']:,} images to encode, at most {readable(report['bytes'])} on disk"
        + (f" ({readable(free)} are free)" if free is not None else "")
        + f", {report['flops'] / 1e12:,.3g} TFLOP in the encoders of the SAEs",
    ]
    return lines
