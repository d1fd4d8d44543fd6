"""Trackers of the SAEs of a study, in the processes that train them."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from sae_ray.errors import check
from sae_ray.sae.bundle import BundleJob, CellReport
from sae_ray.sae.trackers import Tracker, open_tracker
from sae_ray.study.plan import StudyPlan

FOLDER = "trackers"
"""Under a root."""


class Tracking(NamedTuple):
    """What a worker needs to know."""

    kinds: tuple[str, ...]
    project: str
    directory: Path

    def __bool__(self) -> bool:
        return bool(self.kinds)


def tracking_of(plan: StudyPlan) -> Tracking:
    """The trackers that a study asks for.

    Raises UsageError if there is no such tracker, it is not installed here, or it would write to a disk that the next
    worker does not have.
    """
    kinds, root = plan.study.resources.train.trackers, plan.root
    directory = Path(root.path if root.is_local else tempfile.gettempdir()) / FOLDER
    for kind in kinds:
        open_tracker(kind, "", directory=directory)  # nothing is written before the first step
        files = kind == "tensorboard" or (kind == "mlflow" and "MLFLOW_TRACKING_URI" not in os.environ)
        check(root.is_local or not files, "resources.train.trackers", kind,
              f"it writes files, and {root} is no directory; choose a tracker with a server (for mlflow set "
              "MLFLOW_TRACKING_URI)")  # fmt: skip
    return Tracking(kinds, plan.study.name, directory)


class Trackers:
    """Those of the cells of a bundle. One that fails is told of and left out: training goes on."""

    def __init__(self, bundle: BundleJob, tracking: Tracking):
        self._open: dict[str, list[Tracker]] = {}
        for job in bundle.cells if tracking else ():
            name, config = job.step.name, job.cell.identity()
            about = {"project": tracking.project, "config": config}
            self._open[name] = [
                open_tracker(kind, name, directory=tracking.directory / kind, **about) for kind in tracking.kinds
            ]

    def tell(self, reports: Mapping[str, CellReport]) -> None:
        for name, trackers in self._open.items():
            kept = reports[name].kept if name in reports else ()
            for metrics in kept:
                for tracker in [*trackers]:
                    try:
                        tracker(metrics)
                    except Exception as error:  # of whatever kind the tracker's library raises
                        trackers.remove(tracker)
                        print(f"{type(tracker).__name__} of {name} failed and is left out: {error}", file=sys.stderr)

    def close(self) -> None:
        for trackers in self._open.values():
            for tracker in trackers:
                try:
                    tracker.close()
                except Exception as error:
                    print(f"{type(tracker).__name__} could not be closed: {error}", file=sys.stderr)
        self._open.clear()
