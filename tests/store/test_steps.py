"""Steps: named by what decides their content, finished once, locked while written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sae_ray
from sae_ray.errors import SaeRayError
from sae_ray.store import steps
from sae_ray.store.files import Folder
from sae_ray.store.steps import (
    CLOCK_ERROR_SECONDS,
    RECORD,
    SCHEMA_VERSIONS,
    STALE_SECONDS,
    Step,
    digest,
    hold,
    look,
    note_failure,
    read_record,
    tell,
)
from tests.machine import PATIENCE_S, until

TRAIN = SCHEMA_VERSIONS["train"]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture
def step(tmp_path: Path) -> Step:
    return Step(Folder(tmp_path), "train", "sae-x", {"k": 4})


def finished(step: Step) -> Step:
    step.folder.write_bytes("weights", b"12345")
    step.folder.write_bytes("data/part", b"1")
    step.finish(1.23456, {"rows": 7})
    return step


@contextmanager
def other_driver(step: Step) -> Iterator[subprocess.Popen]:
    """A process that holds a step until it is told to end, by its standard input or a signal. It tells of its work."""
    code = """
import sys
from sae_ray.store import steps
from sae_ray.store.files import Folder
steps.HEARTBEAT_SECONDS = 0.05
step = steps.Step(Folder(sys.argv[1]), "train", "sae-x", {"k": 4})
with steps.hold([step]):
    steps.tell(step, {"done": 3})
    print("held", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(step.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reordered(inner) for key, inner in reversed(value.items())}
    return [reordered(inner) for inner in value] if isinstance(value, list) else value


@given(JSON)
def test_a_digest_does_not_depend_on_the_order_of_keys(value: Any):
    assert digest(reordered(value)) == digest(value)
    assert digest(json.loads(json.dumps(value))) == digest(value)


@given(JSON, JSON)
def test_other_values_have_other_digests(one: Any, other: Any):
    assert (digest(one) == digest(other)) == (json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True))


def test_a_name_is_a_label_and_a_hash_of_what_decides_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def name(root: Path = tmp_path, stage: str = "train", label: str = "sae-x", **config: Any) -> str:
        return Step(Folder(root), stage, label, {"k": 4, "seed": 0} | config).name

    assert name().startswith("sae-x-")
    assert name() == Step(Folder(tmp_path), "train", "sae-x", {"seed": 0, "k": 4}).name
    assert name(root=tmp_path / "elsewhere") == name()
    same_hash = {name(), name(label="sae-y").replace("sae-y", "sae-x")}
    others = {name(stage="score"), name(k=5), name(seed=1), name(more=None)}
    assert len(same_hash) == 1
    assert len(same_hash | others) == 5
    before, of_scores = name(), name(stage="score")
    monkeypatch.setitem(SCHEMA_VERSIONS, "train", SCHEMA_VERSIONS["train"] + 1)
    assert (name() != before, name(stage="score")) == (True, of_scores)  # each stage has a version of its own


def test_a_setting_at_its_neutral_default_does_not_show_in_the_name(tmp_path: Path):
    def step(config: dict[str, Any]) -> Step:
        return Step(Folder(tmp_path), "score", "scores", config, defaults={"top_images": 16, "later": None})

    assert step({"top_images": 16}).name == step({}).name == step({"top_images": 16, "later": None}).name
    assert len({step(config).name for config in ({}, {"top_images": 4}, {"later": 1}, {"other": None})}) == 4
    step({"top_images": 16}).finish(0.0, {})
    assert (step({}).record() or {})["config"] == {"top_images": 16}


def test_a_step_from_missing_to_done(step: Step):
    assert (step.status(), step.record(), step.finished) == ("missing", None, False)
    with hold([step]):
        assert (step.status(), step.finished) == ("running", False)
        step.folder.write_bytes("weights", b"12345")
    assert (step.status(), step.finished) == ("partial", False)
    with hold([step]):
        finished(step)
        assert step.status() == "done"
    assert (step.status(), step.finished) == ("done", True)
    record = step.record()
    assert record is not None
    assert record == read_record(step.folder) == json.loads((Path(str(step.folder)) / RECORD).read_text())
    expected = {
        "schema_version": SCHEMA_VERSIONS["train"],
        "stage": "train",
        "status": "done",
        "reason": None,
        "config": {"k": 4},
        "counts": {"rows": 7},
        "seconds": 1.235,
        "files": {"data/part": 1, "weights": 5},  # not the lock under which they were written
    }
    assert expected.items() <= record.items()
    assert {"sae-ray", "torch", "python"} <= record["versions"].keys()


def test_a_failed_step_is_finished_too_and_says_why(step: Step):
    step.finish(0.0, {}, status="failed", reason="the loss is NaN")
    assert (step.status(), step.finished) == ("failed", True)
    assert (step.record() or {})["reason"] == "the loss is NaN"


def test_what_is_not_finite_is_null_in_the_record(step: Step):
    step.finish(0.0, {"r2": float("nan"), "kinds": {"white": {"rate": float("inf"), "asked": 3}}})
    assert (step.record() or {})["counts"] == {"r2": None, "kinds": {"white": {"rate": None, "asked": 3}}}


def test_scratch_is_deleted_once_the_step_is_done(step: Step, monkeypatch: pytest.MonkeyPatch):
    step.folder.write_bytes("checkpoints/step-1.json", b"1")
    step.folder.write_bytes("answers/part-0.parquet", b"1")
    step.folder.write_bytes("answers.parquet", b"1")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "delete", killed)
        with pytest.raises(KeyboardInterrupt):
            step.finish(0.0, {})
    assert (step.record() or {})["files"] == {"answers.parquet": 1}
    step.finish(0.0, {})
    assert sorted(step.folder.files(recursive=True)) == ["answers.parquet", RECORD]
    assert step.status() == "done"


def test_files_that_are_added_later_do_no_harm(step: Step):
    finished(step).folder.write_bytes("notes.txt", b"mine")
    assert step.status() == "done"


@pytest.mark.parametrize(
    ("tear", "message"),
    [
        (lambda at, _: (at / "data" / "part").unlink(), "is torn: data/part should have 1 bytes and is missing"),
        (lambda at, _: (at / "weights").write_bytes(b"123"), "is torn: weights should have 5 bytes and has 3; delete"),
        (lambda at, text: (at / RECORD).write_text(text[:40]), "step.json is not JSON"),
        (
            lambda at, _: (at / RECORD).write_text("[]"),
            "was written by schema version None of the None stage, but this program reads None; delete",
        ),
        (
            lambda at, text: (at / RECORD).write_text(text.replace('"schema_version": ', '"schema_version": 9')),
            f"was written by schema version 9{TRAIN} of the train stage, but this program reads {TRAIN}; delete",
        ),
    ],
)
def test_a_torn_or_foreign_step_is_refused(step: Step, tear: Any, message: str):
    place = Path(str(finished(step).folder))
    tear(place, (place / RECORD).read_text())
    for read in (step.record, lambda: read_record(step.folder)):
        with pytest.raises(SaeRayError) as raised:
            read()
        assert message in str(raised.value)
        assert str(step.folder) in str(raised.value)
    assert step.status() == "torn"


def test_reading_a_step_that_is_not_finished_is_refused(step: Step):
    with pytest.raises(SaeRayError, match=r"is not a finished step: it has no step\.json"):
        read_record(step.folder)


def test_a_second_driver_is_kept_out_until_the_first_is_gone(step: Step):
    other_step = Step(step.root, "train", "sae-y", {})
    with other_driver(step) as driver:
        assert step.status() == "running"
        refusal = f"is being written by process {driver.pid} on "
        with pytest.raises(SaeRayError, match=refusal), hold([other_step, step]):
            pytest.fail("two drivers hold one step")
        assert other_step.status() == "missing"  # what was held already is let go
        assert step.status() == "running"
        driver.communicate("")
    assert step.status() == "missing"
    with hold([step]):
        pass


def test_a_second_hold_in_the_same_process_is_kept_out(step: Step):
    with hold([step]), pytest.raises(SaeRayError, match="is being written"), hold([step]):
        pytest.fail("held twice")


def test_the_lock_of_a_killed_driver_is_taken_over_at_once(step: Step):
    with other_driver(step) as driver:
        step.folder.write_bytes("half", b"1")
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert [name for name in step.folder.files() if name.startswith("lock-")] != []
        with hold([step]):
            assert step.status() == "running"
    assert step.folder.files() == {"half": 1}
    assert step.status() == "partial"


def test_a_lock_tells_of_the_work(step: Step, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(steps, "HEARTBEAT_SECONDS", 0.01)
    tell(step, {"done": 1})  # by nobody who holds it
    with hold([step]):
        assert (look(step).status, look(step).progress) == ("running", None)
        tell(step, {"done": 2, "loss": float("nan")})
        until(lambda: look(step).progress == {"done": 2, "loss": None})
        tell(step, {"done": 3})
        until(lambda: look(step).progress == {"done": 3})
        step.folder.write_bytes("half", b"1")
    assert look(step) == ("partial", None, None, {"half": 1})


def test_a_dead_driver_has_told_where_it_stopped(step: Step):
    with other_driver(step) as driver:
        until(lambda: look(step).progress == {"done": 3})
        assert look(step).status == "running"
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        assert (look(step).status, look(step).progress) == ("partial", {"done": 3})
        with hold([step]):
            assert (look(step).status, look(step).progress) == ("running", None)


@pytest.mark.parametrize("status", ["done", "failed"])
def test_the_last_failure_is_kept_until_the_step_is_finished(step: Step, status: Any):
    with hold([step]):
        note_failure(step, "the disk is full")
        note_failure(step, "a node was lost")
    assert step.status() == look(step).status == "partial"
    with hold([step]):
        found = look(step).failure
        assert found is not None
        assert found["reason"] == "a node was lost"
        assert found.keys() == {"reason", "time", "host"}
        step.folder.write_bytes("weights", b"12345")
        step.finish(0.0, {}, status=status, reason="the loss is NaN")
    assert sorted(step.folder.files()) == [RECORD, "weights"]
    assert (step.record() or {})["files"] == {"weights": 5}


def lock_of_another(step: Step, owner: dict, renewed: float, clock_error: float = 0.0) -> None:
    """A lock that was renewed so many seconds ago, by a driver whose clock is wrong by others."""
    now = time.time()
    step.folder.write_json("lock-a.json", owner | {"time": now - renewed + clock_error})
    os.utime(step.folder.path_of("lock-a.json"), (now - renewed, now - renewed))


@pytest.mark.parametrize("clock_error", [0, -300, 300])
def test_the_lock_of_another_host_lasts_as_long_as_its_heartbeat(step: Step, clock_error: float):
    """Whatever the time is there."""
    owner = {"host": "elsewhere", "pid": 1}
    lock_of_another(step, owner, STALE_SECONDS - 60, clock_error)
    assert step.status() == "running"
    with pytest.raises(SaeRayError, match="is being written by process 1 on elsewhere"), hold([step]):
        pytest.fail("two drivers hold one step")
    lock_of_another(step, owner, STALE_SECONDS + 1, clock_error)
    with hold([step]):
        assert "lock-a.json" not in step.folder.files()
    assert step.status() == "missing"


@pytest.mark.parametrize("clock_error", [-300, 300])
def test_a_driver_whose_own_clock_is_wrong_keeps_out_of_what_another_holds(
    step: Step, clock_error: float, monkeypatch: pytest.MonkeyPatch
):
    lock_of_another(step, {"host": "elsewhere", "pid": 1}, STALE_SECONDS - 60)
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + clock_error)
    assert step.status() == "running"
    with pytest.raises(SaeRayError, match="is being written"), hold([step]):
        pytest.fail("two drivers hold one step")


@pytest.mark.parametrize("elsewhere", [{"boot": "another start"}, {"pid_namespace": "pid:[1]"}])
def test_a_process_number_of_another_container_or_start_tells_nothing(step: Step, elsewhere: dict):
    """The process of that number that is here, or is not, is another one: the heartbeat alone counts."""
    for pid in (os.getpid(), 2**22 + 1):  # one that lives here, and one that no process has
        owner = steps._surroundings() | {"pid": pid}
        lock_of_another(step, owner | elsewhere, 0)
        assert step.status() == "running"
        lock_of_another(step, owner | elsewhere, STALE_SECONDS + CLOCK_ERROR_SECONDS + 1)
        assert step.status() == "partial"


def test_a_driver_whose_lock_has_vanished_stops(step: Step, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(steps, "HEARTBEAT_SECONDS", 0.01)

    def work() -> None:
        with hold([step]):
            step.folder.write_bytes("half", b"1")
            deadline = time.monotonic() + PATIENCE_S
            while time.monotonic() < deadline:
                for name in step.folder.files():
                    if name.startswith("lock-"):
                        step.folder.delete(name)  # once more if a renewal was under way, which writes it again
                time.sleep(0.1)
            pytest.fail("it went on")

    with pytest.raises(SaeRayError, match="has vanished: another driver took over"):
        work()
    assert step.folder.files() == {"half": 1}, "no lock is left that would keep the other driver out"


def test_a_step_is_not_finished_by_a_driver_whose_lock_has_vanished(step: Step):
    with hold([step]):
        step.folder.write_bytes("weights", b"1")
        [lock] = [name for name in step.folder.files() if name.startswith("lock-")]
        step.folder.delete(lock)
        with pytest.raises(SaeRayError, match="has vanished"):
            step.finish(0.0, {})
        with pytest.raises(SaeRayError, match="has vanished"):
            note_failure(step, "the disk is full")
    assert step.folder.files() == {"weights": 1}


@pytest.mark.parametrize(
    "as_started",
    [
        pytest.param("signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})", id="by ray job submit"),
        pytest.param("signal.signal(signal.SIGINT, signal.SIG_IGN)", id="by a script in the background"),
    ],
)
def test_a_driver_that_signals_do_not_reach_stops_too(step: Step, as_started: str):
    code = f"""
import os, signal, sys, time
{as_started}
from sae_ray.store import steps
from sae_ray.store.files import Folder
steps.HEARTBEAT_SECONDS = 0.05
step = steps.Step(Folder(sys.argv[1]), "train", "x", {{}})
ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
with steps.hold([step]):
    pass  # not the first of this driver
with steps.hold([step]):
    if ignored:
        os.kill(os.getpid(), signal.SIGINT)
    print("at work", flush=True)
    for name in step.folder.files():
        step.folder.delete(name)
    time.sleep(60)
    print("it went on")
"""
    done = subprocess.run([sys.executable, "-c", code, str(step.root)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "has vanished" in done.stderr
    assert done.stdout == "at work\n"


def test_looking_at_a_step_removes_no_lock(step: Step):
    lock_of_another(step, {"host": "elsewhere", "pid": 1}, STALE_SECONDS + CLOCK_ERROR_SECONDS + 1)
    assert step.status() == "partial"
    assert "lock-a.json" in step.folder.files()


def test_a_lock_is_let_go_when_the_work_fails(step: Step):
    step.folder.write_bytes("half", b"1")
    with pytest.raises(ZeroDivisionError), hold([step]):
        raise ZeroDivisionError
    assert step.folder.files() == {"half": 1}


def test_the_heartbeat_survives_a_disk_that_fails_for_a_while(step: Step, monkeypatch: pytest.MonkeyPatch):
    def beats(seen: float) -> float:
        """The time of the first heartbeat after `seen`."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for name in step.folder.files():
                if name.endswith(".json") and (beat := step.folder.read_json(name)["time"]) > seen:
                    return beat
            time.sleep(0.01)
        pytest.fail("the heart stands still")

    monkeypatch.setattr(steps, "HEARTBEAT_SECONDS", 0.01)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with hold([step]):
        beats(beats(0.0))
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
            time.sleep(0.1)
            with pytest.raises(OSError, match="File too large"):
                step.folder.write_bytes("x", b"1")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        beats(time.time())
    assert step.status() == "missing"


def test_the_commit_is_that_of_this_program_not_of_a_repository_around_it(tmp_path: Path):
    """As where a virtual environment lies inside the repository of somebody else's project."""
    project = tmp_path / "project"
    site_packages = project / ".venv" / "lib" / "site-packages"
    shutil.copytree(Path(sae_ray.__file__).parent, site_packages / "sae_ray", ignore=shutil.ignore_patterns("models"))
    code = "from sae_ray.store.steps import _git_commit; import sae_ray; print(sae_ray.__file__, _git_commit())"

    def git(*command: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(
            ["git", *identity, *command], cwd=project, check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "theirs")
    environment = os.environ | {"PYTHONPATH": str(site_packages)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(site_packages / "sae_ray" / "__init__.py"), "None"]
