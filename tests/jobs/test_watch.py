"""What `sae-ray watch` shows, from files alone."""

import io
import re
import threading

import pytest
from click.testing import CliRunner
from sae_ray.jobs import watch as watching
from sae_ray.jobs.cli import main

from sae_ray.errors import UsageError
from sae_ray.store import steps
from sae_ray.store.steps import hold, tell
from sae_ray.study.root import remember
from tests.machine import until

from .test_status import OF_CELL

CURSOR = re.compile(r"\x1b\[(\d+)A\r\x1b\[J")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def frames(self) -> list[list[str]]:
        """What was on the screen, each time."""
        written = CURSOR.split(self.getvalue())
        ups, texts = written[1::2], written[0::2]
        rows = [sum(max(1, -(-len(line) // 80)) for line in text.splitlines()) for text in texts]
        assert [int(up) for up in ups] == rows[:-1], "each goes up by the rows that were written"
        assert max(rows) < 24
        return [text.splitlines() for text in texts]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(steps, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(watching, "EVERY_SECONDS", 0.01)
    monkeypatch.setattr(watching, "LINE_SECONDS", 0.0)


def finish(plan, but=()) -> None:
    for step in plan.steps:
        if step.name not in but and not step.finished:
            step.folder.write_bytes("content", b"1")
            step.finish(1.5, {})


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_a_study_is_seen_until_it_is_finished(make_plan, tmp_path, kind):
    plan = make_plan(tmp_path)
    remember(plan)
    cell, other = (one.step for one in plan.trains)
    reading = [one.step.name for one in plan.plans if one not in plan.trains and cell in getattr(one, "inputs", [])]
    out = kind()
    watcher = threading.Thread(target=watching.watch, args=(str(tmp_path), out))
    with hold([cell]):
        tell(cell, OF_CELL)
        until(lambda: steps.look(cell).progress)
        watcher.start()
        until(lambda: "loss 0.213  L0 20.1  dead 3 %" in out.getvalue())
        finish(plan, [cell.name, *reading])
        cell.finish(2.0, {}, "failed", "the loss is not finite")
        watcher.join(30)
    assert not watcher.is_alive(), "what reads a failed step is not waited for"
    text = out.getvalue()
    n = len(list(plan.steps))
    assert f"small under {tmp_path}: 0 of {n} steps done, 1 running\n" in text
    assert f"small under {tmp_path}: {n - 1 - len(reading)} of {n} steps done, 1 failed\n" in text
    assert "the loss is not finite" in text
    if kind is Terminal:
        first, *_, last = out.frames()
        assert first[1].split("  ")[0] == "manifest 0/2"
        assert any(line.startswith(f"running  {cell.name}") for line in first)
        assert "train 1/2" in last[1]
    else:
        assert len(re.findall(rf"^done +{other.name}", text, re.MULTILINE)) == 1
        assert "\x1b" not in text


def test_nobody_is_at_work(make_plan, tmp_path, monkeypatch):
    """Ctrl-C ends the display without a word. Advice does not wait for the lines of steps at work."""
    remember(make_plan(tmp_path))
    monkeypatch.setattr(watching, "LINE_SECONDS", 1e9)
    looks = iter(range(3))

    def interrupt(seconds: float) -> None:
        if next(looks, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(watching.time, "sleep", interrupt)
    shown = CliRunner().invoke(main, ["watch", "--root", str(tmp_path)])
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert "steps done, nobody is at work\n" in shown.stdout
    assert shown.stdout.count(f"Nobody is at work on it: `sae-ray run --root {tmp_path}` goes on.") == 1


def test_a_finished_step_is_looked_at_once(make_plan, tmp_path):
    plan = make_plan(tmp_path)
    remember(plan)
    finish(plan)
    entries = watching.status(plan)
    for step in plan.steps:
        step.folder.delete("step.json")
    assert watching.status(plan, {entry["step"]: entry for entry in entries}) == entries
    assert watching.n_left(plan, entries) == 0


def test_a_root_without_a_study_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"has no study\.json"):
        watching.watch(str(tmp_path))
