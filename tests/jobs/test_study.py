import json
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from sae_ray.jobs import study

from tests.machine import DEAD_PROXY, PATIENCE_S, until

REPOSITORY = Path(__file__).parents[2]


def snapshot(root: Path) -> dict[str, int]:
    return {
        str(path): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.name != "summary.json"
    }


def test_a_finished_study_has_nothing_left_to_do(finished, make_plan, capsys):
    before = snapshot(finished)
    summary = study.run(make_plan(finished))
    assert snapshot(finished) == before
    assert "nothing left to do" in capsys.readouterr().err
    assert summary == json.loads((finished / "summary.json").read_text())
    assert [row["name"] for row in summary["cells"]] == [
        "raw-projection",
        "projection-batch_topk-x2-k4",
        "projection-matryoshka_batch_topk-x2-k4",
    ]


def test_the_summary_shows_where_everything_lies(finished, make_plan):
    plan = make_plan(finished)
    text = study.summary_text(plan, study.write_summary(plan))
    for step in plan.steps:
        assert str(step.folder) in text
    assert str(finished / "report" / "index.html") in text


def test_a_mean_far_from_0_is_pointed_out(finished, make_plan):
    summary = study.write_summary(make_plan(finished))
    for centre, offset, told in ((False, 5.2, True), (False, 4.9, False), (True, 5.2, False)):
        plan = make_plan(finished, **{"training.centre": centre})
        text = study.summary_text(plan, summary | {"mean_over_spread": {"projection": offset}})
        assert ("try training.centre = true" in text) == told


def test_of_many_comparisons_and_folders_the_summary_tells_what_matters(finished, make_plan, monkeypatch):
    plan = make_plan(finished)
    summary = study.write_summary(plan)
    [first, *others] = summary["comparisons"]
    summary["comparisons"] = [{"statement": first["statement"], "holds": False}, *others]
    told = study.summary_text(plan, summary)
    monkeypatch.setattr(study, "MANY", 1)
    short = study.summary_text(plan, summary)
    assert [line for line in told.splitlines() if line.startswith(("yes", "NO"))][1:]
    assert [line for line in short.splitlines() if line.startswith(("yes", "NO"))] == [f"NO   {first['statement']}"]
    assert f"{len(others)} of {len(others) + 1} comparisons hold, all but those above\n" in short
    assert f"2 folders {finished}/sae-…" in short
    assert str(plan.trains[0].step.folder) not in short
    assert str(plan.pictures.step.folder) in short


@pytest.mark.ray
def test_a_study_is_submitted_by_the_script_that_users_have(ran, tmp_path):
    """`ray start --head` and `ray job submit` for real. A proxy does not answer, HOME cannot be written.

    What is done already is not done again.
    """
    root = shutil.copytree(ran.root, tmp_path / "root")
    command = ["cluster/submit_local.sh", str(ran.study), "--root", str(root)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= DEAD_PROXY | {"HOME": "/proc/nowhere"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing left to do" in done.stdout
    assert "comparisons hold" in done.stdout
    summary = json.loads((root / "summary.json").read_text())
    assert summary["root"] == str(root)
    assert len(summary["cells"]) == 3
    assert not summary["failed"]


@pytest.mark.ray
def test_the_script_ends_with_all_that_it_started(ran, tmp_path):
    """As a batch system ends it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    script = subprocess.Popen(
        ["cluster/submit_local.sh", str(ran.study), "--root", str(tmp_path / "root")],
        cwd=REPOSITORY,
        env=environment | {"SUBMITTED_BY": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def started() -> list[int]:
        """Processes that have the script's environment."""
        found = []
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            with suppress(OSError):
                if f"SUBMITTED_BY={tmp_path}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(pid)
        return found

    try:
        until(lambda: (tmp_path / "root" / "study.json").exists() or script.poll() is not None)
        assert len(started()) > 5
        script.terminate()
        assert script.wait(PATIENCE_S) == 128 + signal.SIGTERM
        until(lambda: not started())
    finally:
        for pid in started():
            os.kill(pid, signal.SIGKILL)
