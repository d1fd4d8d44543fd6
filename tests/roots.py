"""Whether two roots hold the same results, bit by bit, wherever they are."""

from __future__ import annotations

from typing import Any

from sae_ray.report import REPORT
from sae_ray.sae.history import HISTORY_FILE
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step
from sae_ray.study.plan import StudyPlan

DIFFERS = ("index.html", "report.json")
"""Of a report: they tell of times and places."""
NAMES_PARTS = "parts.parquet"
"""Of activations: their files have unique names."""


def differences(ours: StudyPlan, theirs: StudyPlan) -> list[str]:
    """The files of finished studies that differ, or that only one of them has; nothing for equal bits.

    What tells of times is left out (`step.json`, the pace of training), and so are names of parts of activations.
    """
    found = []
    for mine, other in zip(ours.steps, theirs.steps, strict=True):
        assert mine.name == other.name, "other settings, not other bits"
        found += [f"{mine.label}/{name}" for name in _differing(_results(mine), _results(other))]
    reports = [_contents(plan.root / REPORT, (plan.root / REPORT).files(recursive=True)) for plan in (ours, theirs)]
    return found + [f"{REPORT}/{name}" for name in _differing(*reports) if name not in DIFFERS]


def _results(step: Step) -> dict[str, Any]:
    """The files that `step.json` lists; the parts of activations under the numbers of their parts."""
    record = step.record()
    assert record is not None, f"{step.name} is not finished"
    found: dict[str, Any] = _contents(step.folder, record["files"])
    if HISTORY_FILE in found:
        found[HISTORY_FILE] = repr(step.folder.read_parquet(HISTORY_FILE).drop_columns(["rows_per_second"]).to_pydict())
    if step.stage == "extract":
        found.pop(NAMES_PARTS)
        found = {name.rpartition("-")[0] if name.startswith("data/") else name: data for name, data in found.items()}
    return found


def _contents(folder: Folder, names) -> dict[str, bytes]:
    return {name: folder.read_bytes(name) for name in names}


def _differing(mine: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in sorted(mine.keys() | other.keys()) if mine.get(name) != other.get(name)]
