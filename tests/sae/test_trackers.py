"""Trackers, each with its real package, which writes to disk; and what that package reads there.

W&B comes with the tests; `make test-trackers` installs the others and runs them, too.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_ray import open_tracker, train_sae
from sae_ray.errors import UsageError
from sae_ray.sae.trackers import TRACKERS
from sae_ray.sae.training import StepMetrics
from tests.machine import until

INSTALLED = Path(__file__).parents[2] / ".venv" / "trackers"
OTHERS = [pytest.param(kind, marks=pytest.mark.clients) for kind in TRACKERS if kind != "wandb"]
Curve = list[tuple[int, float]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where trackers write, and nowhere else."""
    if INSTALLED.exists():
        monkeypatch.setattr(sys, "path", [*sys.path, str(INSTALLED)])
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    with suppress(ImportError):  # it reads the variable when it is imported
        monkeypatch.setattr(importlib.import_module("trackio.sqlite_storage"), "TRACKIO_DIR", tmp_path / "trackio")
    return tmp_path


def wandb_records(file: Path) -> Iterator[Any]:
    """Of a log of W&B: a header of 7 bytes, then records in blocks, as in LevelDB."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := -at % 2**15) and left < 7:
            at += left  # filled with zeros
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            found = wandb_internal_pb2.Record()
            found.ParseFromString(record)
            yield found
            record = b""


def wandb_curve(place: Path, name: str, key: str) -> Curve:
    """Of all attempts, in order."""
    curve, logs = [], f"wandb/offline-run-*-{name}/*.wandb"
    # Its own process makes the file, and writes the last records after the run has ended.
    until(lambda: any(place.glob(logs)))
    for file in sorted(place.glob(logs)):
        until(lambda file=file: any(one.WhichOneof("record_type") == "exit" for one in wandb_records(file)))
        for one in wandb_records(file):
            if one.WhichOneof("record_type") == "history":
                items = one.history.item
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
                if key in row:
                    curve.append((row["_step"], row[key]))
    return curve


def curve_of(kind: str, place: Path, name: str, key: str) -> Curve:
    """What the package itself shows of a metric."""
    match kind:
        case "tensorboard":
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

            events = EventAccumulator(str(place / name)).Reload()
            return [(one.step, one.value) for one in events.Scalars(key)] if key in events.Tags()["scalars"] else []
        case "mlflow":
            from mlflow import MlflowClient

            client = MlflowClient(f"sqlite:///{place}/mlflow.db")
            number = client.get_experiment_by_name("mine").experiment_id
            [run] = client.search_runs([number], f"attributes.run_name = '{name}'")
            assert run.data.params == {"k": "4"}
            return [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, key)]
        case "trackio":
            from trackio.sqlite_storage import SQLiteStorage

            return [(row["step"], row[key]) for row in SQLiteStorage.get_logs("mine", name) if key in row]
        case _:
            return wandb_curve(place, name, key)


def metrics(step: int) -> StepMetrics:
    threshold = float("nan") if step < 2 else 0.5
    return StepMetrics(step, 1 / (step + 1), 0.5, 0.0, 0.0, 0.0, 0.0, 3.0, 2, threshold, 0.1, 1e-3)


@pytest.mark.parametrize("kind", ["wandb", *OTHERS])
def test_a_tracker_shows_what_it_hears(kind: str, place: Path):
    """Of several SAEs at once, and of one that resumes from a checkpoint before what it had told."""
    common = {"project": "mine", "directory": place, "config": {"k": 4}}
    with open_tracker(kind, "a", **common) as first, open_tracker(kind, "b", **common) as second:
        for step in range(4):
            first(metrics(step))
            second(metrics(10 * step))
    np.testing.assert_allclose(
        curve_of(kind, place, "a", "loss"), [(step, 1 / (step + 1)) for step in range(4)], rtol=1e-6
    )
    assert [step for step, _ in curve_of(kind, place, "b", "l0")] == [0, 10, 20, 30]
    assert curve_of(kind, place, "a", "threshold") == [(2, 0.5), (3, 0.5)]
    with open_tracker(kind, "a", **common) as again:
        for step in (3, 4):
            again(metrics(step))
    assert sorted({step for step, _ in curve_of(kind, place, "a", "loss")}) == [0, 1, 2, 3, 4]


def test_a_training_is_tracked(place: Path):
    x = np.random.default_rng(0).normal(size=(200, 6))
    with open_tracker("wandb", "mine", directory=place) as tracker:
        sae = train_sae(x, k=2, steps=30, batch_size=16, progress=False, callback=tracker)
    assert sae.history is not None
    expected = [*zip(sae.history["step"].to_pylist(), sae.history["loss"].to_pylist(), strict=True)]
    np.testing.assert_allclose(wandb_curve(place, "mine", "loss"), expected, rtol=1e-6)


def test_the_pages_example_runs(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place)
    page = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    exec(example.replace("k=16", "k=2, steps=5"), {"x": np.eye(20, 6)})
    assert len(wandb_curve(place / "trackers", "my first SAE", "l0")) == 5


def test_a_tracker_that_never_heard_of_a_step_writes_nothing(place: Path):
    with open_tracker("wandb", "mine", directory=place / "none"):
        pass
    assert not (place / "none").exists()


@pytest.mark.parametrize("kind", TRACKERS)
def test_what_is_not_installed_is_named(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, TRACKERS[kind].package, None)
    with pytest.raises(UsageError, match=rf"tracker = '{kind}': .*; install sae-ray\[{kind}\]"):
        open_tracker(kind, "mine")


def test_a_tracker_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="tracker = 'aim': choose one of tensorboard, wandb, mlflow, trackio"):
        open_tracker("aim", "mine")
