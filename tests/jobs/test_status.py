"""What `sae-ray status` says of work that is not finished, from files alone, and what Prometheus reads of it."""

import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import httpx
import pytest
import ray
from click.testing import CliRunner
from fsspec.implementations.local import LocalFileSystem
from prometheus_client.parser import text_string_to_metric_families
from pyarrow import fs
from sae_ray.jobs import progress, train
from sae_ray.jobs.cli import main
from sae_ray.jobs.cluster import reason
from sae_ray.jobs.progress import duration, pace_of, pace_texts
from sae_ray.jobs.status import status

from sae_ray.errors import UsageError
from sae_ray.sae.bundle import CHECKPOINTS
from sae_ray.store import steps
from sae_ray.store.checkpoints import save_checkpoint
from sae_ray.store.steps import CLOCK_ERROR_SECONDS, STALE_SECONDS, hold, note_failure, tell
from sae_ray.study.root import remember
from tests.counting import Counting
from tests.machine import until
from tests.test_monitoring import exported_names

OF_CELL = pace_of(12_400, 110_000, "steps", 4_100, 100) | {
    "of": "cell",
    "loss": 0.21312,
    "l0": 20.06,
    "n_dead": 4,
    "d_sae": 128,
}
OF_STAGE = pace_of(1_200, 5_000, "images", 200, 100) | {"of": "stage"}


def shown(root: Path, *options: str) -> str:
    result = CliRunner().invoke(main, ["status", "--root", str(root), *options])
    assert result.exit_code == 0, result.output
    return result.stdout


def line_of(step: steps.Step, root: Path) -> str:
    [line] = [line for line in shown(root).splitlines() if f" {step.name}" in line]
    return " ".join(line.split())


def test_status_shows_how_far_running_work_is(make_plan, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "HEARTBEAT_SECONDS", 0.01)
    plan = make_plan(tmp_path)
    remember(plan)
    cell, waiting = (one.step for one in plan.trains)
    extract = plan.extracts[0].step
    with hold([cell, waiting, extract]):
        tell(cell, OF_CELL)
        tell(extract, OF_STAGE)
        until(lambda: all(steps.look(step).progress for step in (cell, extract)))
        assert line_of(cell, tmp_path) == (
            f"running {cell.name} 12,400 of 110,000 steps loss 0.213 L0 20.1 dead 3 % 41 steps/s ETA 40 min"
        )
        assert line_of(waiting, tmp_path) == f"running {waiting.name}"
        assert line_of(extract, tmp_path) == (
            f"running {extract.name} stage: 1,200 of 5,000 images 2 images/s ETA 32 min"
        )
        entries = {entry["step"]: entry for entry in json.loads(shown(tmp_path, "--json"))}
        assert entries[cell.name]["progress"] == OF_CELL
        assert entries[waiting.name]["progress"] is None
    assert "running" not in shown(tmp_path)


def test_work_of_a_dead_driver_has_stopped(make_plan, tmp_path):
    """A driver elsewhere, which nobody can ask whether it lives."""
    plan = make_plan(tmp_path)
    remember(plan)
    step = plan.trains[0].step
    step.folder.write_json("lock-a.json", {"host": "elsewhere", "pid": 1, "time": 0, "progress": OF_CELL})
    assert "running" in line_of(step, tmp_path)
    long_ago = time.time() - STALE_SECONDS - CLOCK_ERROR_SECONDS - 1
    os.utime(step.folder.path_of("lock-a.json"), (long_ago, long_ago))
    text = shown(tmp_path)
    assert line_of(step, tmp_path).startswith(f"partial {step.name}")
    assert "    stopped: 12,400 of 110,000 steps  loss 0.213  L0 20.1  dead 3 %\n" in text
    assert "ETA" not in text


def test_status_shows_the_last_failure(make_plan, tmp_path):
    plan = make_plan(tmp_path)
    remember(plan)
    step = plan.scores[0].step
    note_failure(step, "the disk is full")
    [entry] = [entry for entry in json.loads(shown(tmp_path, "--json")) if entry["failure"]]
    assert (entry["step"], entry["status"]) == (step.name, "partial")
    failure = entry["failure"]
    last = f"    last failure, {failure['time']} on {failure['host']}: the disk is full\n"
    assert last in shown(tmp_path)
    with hold([step]):
        assert "running" in line_of(step, tmp_path)
        assert last in shown(tmp_path)


def test_what_status_asks_of_a_store(make_plan, tmp_path, monkeypatch):
    counting = Counting(LocalFileSystem())
    store = (fs.PyFileSystem(counting), str(tmp_path))
    monkeypatch.setattr("sae_ray.store.files._store", lambda uri: store)
    plan = make_plan("counting://store/root")

    def asked() -> int:
        counting.asked = 0
        status(plan)
        return counting.asked

    root = asked()
    *others, running = plan.steps
    for step in others:
        step.folder.write_bytes("content", b"1")
        step.finish(0.0, {})
    assert asked() - root == 2 * len(others), "a record and a listing each"
    finished = asked()
    with hold([running]):
        assert asked() - finished == 4, "the record that is not there, two listings, the lock"
        note_failure(running, "the disk is full")
        assert asked() - finished == 5
    for step in others:  # what a killed driver may leave
        note_failure(step, "the disk is full")
        step.folder.write_json("lock-a.json", {"host": "elsewhere", "pid": 1, "time": 0})
    running.finish(0.0, {})
    assert asked() - root == 2 * (len(others) + 1)


def test_durations():
    shown = [duration(seconds) for seconds in (0.2, 59, 99, 100, 2_345, 6_100, 86_400, 400_000)]
    assert shown == ["0 s", "59 s", "99 s", "2 min", "39 min", "1.7 h", "24.0 h", "4.6 days"]


def test_work_that_has_not_moved_has_no_end():
    assert pace_of(5, 10, "images", 0, 3.0)["eta_seconds"] is None
    assert pace_texts(pace_of(5, 10, "images", 0, 3.0) | {"of": "stage"}) == ["5 of 10 images"]


def test_work_that_has_just_begun_has_no_end(monkeypatch, capsys):
    """Workers start, and by the pace so far a study of minutes would take an hour."""
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)

    def line(settling: float) -> str:
        monkeypatch.setattr(progress, "SETTLING_SECONDS", settling)
        shown = [""]
        with progress.Progress("train", 100, "steps") as work:
            work.advance(10)
            until(lambda: shown.append(capsys.readouterr().err) or "10 of 100 steps, " in shown[-1])
        return shown[-1]

    assert "ETA" not in line(settling=600.0)
    assert "ETA" in line(settling=0.0)


def test_reasons_are_one_line_without_keys(ray_cluster):
    @ray.remote(max_retries=0)
    def fails(error: Exception):
        raise error

    def seen(error: Exception) -> str:
        with pytest.raises(type(error)) as raised:
            ray.get(fails.remote(error))
        assert reason(raised.value) == reason(error)
        return reason(error)

    assert seen(ValueError("3 of 4\nare wrong")) == "ValueError: 3 of 4"
    assert seen(UsageError("choose another k")) == "choose another k"
    assert seen(OSError("s3://key:secret@study/x?region=y is gone")) == (
        "a file could not be read or written (s3://study/x is gone)"
    )
    assert seen(MemoryError()) == "MemoryError"

    @ray.remote(max_retries=0)
    def dies():
        os._exit(1)

    with pytest.raises(ray.exceptions.WorkerCrashedError) as raised:
        ray.get(dies.remote())
    assert re.fullmatch(r".*WorkerCrashedError: The worker died unexpectedly.*", reason(raised.value))


def exported(root: Path) -> dict[tuple[str, str], float]:
    """Name and step (or stage) of a root's metrics, as Prometheus reads them from the agent of this node -> value."""
    [node] = ray.nodes()
    text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
    return {
        (sample.name, sample.labels.get("step", sample.labels.get("stage", ""))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("root") == str(root)
    }


def test_a_training_is_seen_while_it_runs(ray_cluster, extracted, make_plan, tmp_path, monkeypatch):
    """One bundle trains, the other one ends with an error: its checkpoint is of another cell."""
    monkeypatch.setattr(steps, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(progress, "SETTLING_SECONDS", 0)
    root = tmp_path / "root"
    shutil.copytree(extracted, root)
    bundles = {"cells_per_bundle": 1, "bundles": 2, "max_failures": 0}
    plan = make_plan(root, **{"training.steps": 2000}, **{f"resources.train.{name}": n for name, n in bundles.items()})
    wrong, right = plan.trains
    save_checkpoint(wrong.step.folder / CHECKPOINTS, 5, {}, {"n_steps": 5, "failed": None, "attempts": []})

    seen: list[dict] = []
    found: dict[tuple[str, str], float] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            seen.extend(entry for entry in status(plan) if entry["progress"])
            found.update(exported(root))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with pytest.raises(UsageError, match="belongs to another cell"):
            train.run(plan)
    finally:
        ended.set()
        watcher.join()

    own = [entry["progress"] for entry in seen if entry["progress"]["of"] == "cell"]
    assert {entry["step"] for entry in seen if entry["progress"]["of"] == "cell"} == {right.step.name}
    assert all(0 < one["done"] <= one["total"] == 2000 for one in own)
    assert [one["done"] for one in own] == sorted(one["done"] for one in own)
    assert all(one["d_sae"] == right.d_sae and 0 < one["l0"] <= right.d_sae and one["loss"] > 0 for one in own)

    entries = {entry["step"]: entry for entry in status(plan)}
    assert entries[right.step.name]["status"] == "done"
    assert entries[right.step.name]["failure"] is None
    failure = entries[wrong.step.name]["failure"]
    assert failure["reason"].startswith("the checkpoint belongs to another cell")

    def all_exported() -> bool:
        found.update(exported(root))  # gauges vanish again
        return exported_names() <= {name for name, _ in found}

    until(all_exported)
    assert found["ray_sae_ray_stage_units", "train"] == 2 * 2000
    assert 0 < found["ray_sae_ray_cell_steps_done", right.step.name] <= 2000
    assert 0 < found["ray_sae_ray_cell_l0", right.step.name] <= right.d_sae
    assert found["ray_sae_ray_failures_total", wrong.step.name] == 1
