"""What it costs to start: a study whose work takes seconds, and the same again when nothing is left to do.

    python -m bench.start [--against CHECKOUT] [--times 3]

Another checkout of this repository, with its own `.venv`, is measured in turns with this one. Wall times are only
worth something where nothing else runs; CPU times suffer less.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from bench.record import Table, record
from sae_ray.world import write_world

IMAGES = 200
STEPS = 200
STUDY = {
    "training.warmup_steps": "20",
    "training.decay_start": "160",
    "training.threshold_start_step": "50",
    "training.batch_size": "1024",
}
SAMPLE_S = 0.1
TAG = "SAE_RAY_BENCH_START"
"""The environment variable that all processes of a run have, whoever their parent is by then."""
STAGE = re.compile(r"^(extract|train|evaluate|score|pictures|report)\b")
FIRST = "until the first line"
LAST = "after the report"
PHASES = (FIRST, "extract", "train", "evaluate", "score", "pictures", "report", LAST)
HERE = Path(__file__).parents[1]


@dataclass
class Run:
    """What one command took."""

    seconds: Counter[str] = field(default_factory=Counter)
    """By phase."""
    cpu: Counter[str] = field(default_factory=Counter)
    """By phase, of all processes."""
    cpu_of: Counter[str] = field(default_factory=Counter)
    """By what processes are titled, such as `ray::fit_bundle`."""
    pids_of: dict[str, set[int]] = field(default_factory=dict)


def measured(command: list[str], cwd: Path) -> Run:
    """Runs it to its end."""
    tag = secrets.token_hex(8)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run, began = Run(), time.monotonic()
    driver = subprocess.Popen(
        command, cwd=cwd, env=environment | {TAG: tag}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    phase, last, lines = FIRST, began, []

    def read() -> None:
        """A stage takes from the end of the one before it to its own."""
        nonlocal phase, last
        assert driver.stderr
        for line in driver.stderr:
            lines.append(line)
            if not (found := STAGE.match(line)):
                continue
            now = time.monotonic()
            done = ": done in" in line
            if phase == FIRST or done:
                run.seconds[FIRST if phase == FIRST else found[1]] += now - last
                last = now
            following = PHASES[PHASES.index(found[1]) + 1]
            phase = following if done else found[1]

    reader = threading.Thread(target=read)
    reader.start()
    known: dict[int, float] = {driver.pid: 0.0}
    others: set[int] = set()
    while driver.poll() is None:
        sample(run, phase, known, others, tag, driver.pid)
        time.sleep(SAMPLE_S)
    reader.join()
    run.seconds[LAST] += time.monotonic() - last
    assert driver.returncode == 0, "".join(lines)
    return run


def sample(run: Run, phase: str, known: dict[int, float], others: set[int], tag: str, driver: int) -> None:
    """Adds what the processes of a run have used since the last sample.

    Args:
        known: its processes -> seconds of CPU so far.
        others: processes that are not of it.
    """
    for process in psutil.process_iter():
        pid = process.pid
        if pid in others:
            continue
        try:
            if pid not in known:
                if process.ppid() not in known and process.environ().get(TAG) != tag:
                    others.add(pid)
                    continue
                known[pid] = 0.0
            times, title = process.cpu_times(), "driver" if pid == driver else titled(process)
        except psutil.Error:
            continue
        used = times.user + times.system
        run.cpu[phase] += used - known[pid]
        run.cpu_of[title] += used - known[pid]
        run.pids_of.setdefault(title, set()).add(pid)
        known[pid] = used


def titled(process: psutil.Process) -> str:
    """What a process is, in short."""
    words = process.cmdline() or [process.name()]
    if words[0].startswith("ray::"):
        return re.split(r"[.(\s]", words[0].removeprefix("ray::MapWorker(").removeprefix("ray::"))[0]
    script = next((word for word in words if word.endswith(".py")), words[0])
    return {"agent": "a node's agent", "main": "a node's agent"}.get(Path(script).stem, Path(script).stem)


def command(checkout: Path, world: Path, root: Path) -> list[str]:
    words = [str(checkout / ".venv/bin/sae-ray"), "run", "--root", str(root), "--images", str(world / "train")]
    words += ["--encoder", str(world / "clip"), "--judge", f"open_clip:local-dir:{world}/judge"]
    words += ["--judge-point", "projection", "--site", "projection", "--k", "5", "--steps", str(STEPS)]
    words += ["--expansion", "1", "--expansion", "4"]
    for name, value in STUDY.items():
        words += ["--set", f"{name}={value}"]
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--times", type=int, default=3)
    arguments = parser.parse_args()
    checkouts = {"this program": HERE} | ({"the other checkout": arguments.against} if arguments.against else {})
    first: dict[str, list[Run]] = {name: [] for name in checkouts}
    again: dict[str, list[Run]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory(prefix="start") as scratch:
        world = Path(scratch, "world")
        write_world(world, n_train=IMAGES, n_heldout=1)
        for turn in range(arguments.times):
            for name, checkout in checkouts.items():
                root = Path(scratch, "root")
                first[name].append(measured(command(checkout, world, root), checkout))
                again[name].append(measured(command(checkout, world, root), checkout))
                shutil.rmtree(root)
                show(turn, name, first[name][-1], again[name][-1])
    against = " --against CHECKOUT" if arguments.against else ""
    facts = {"command": f"python -m bench.start{against} --times {arguments.times}"}
    print(record("start", tables(first, again), facts))


def show(turn: int, name: str, first: Run, again: Run) -> None:
    for what, run in (("first", first), ("again", again)):
        wall = ", ".join(f"{phase} {run.seconds[phase]:.1f}/{run.cpu[phase]:.1f}" for phase in PHASES)
        total = f"{sum(run.seconds.values()):.1f} s, {sum(run.cpu.values()):.1f} s of CPU"
        print(f"{turn} {name}, {what}: {total} ({wall})", flush=True)
    kinds = ", ".join(f"{kind} {len(first.pids_of[kind])}x {cpu:.1f}" for kind, cpu in first.cpu_of.most_common())
    print(f"  {kinds}", flush=True)


def tables(first: dict[str, list[Run]], again: dict[str, list[Run]]) -> list[Table]:
    """Medians, in pairs of wall and CPU seconds for each checkout."""

    def pairs(of: dict[str, list[Run]], phases: Sequence[str]) -> Iterator[float]:
        for runs in of.values():
            for taken in ([run.seconds for run in runs], [run.cpu for run in runs]):
                yield round(median(sum(one[phase] for phase in phases) for one in taken), 1)

    whose = [f", {name}" for name in first] if len(first) > 1 else [""]
    columns = [f"{what}{name}" for name in whose for what in ("seconds", "seconds of CPU")]
    rows: list[list[Any]] = [[phase, *pairs(first, [phase])] for phase in PHASES]
    rows += [["in all", *pairs(first, PHASES)], ["the same again", *pairs(again, PHASES)]]
    own = next(iter(first.values()))
    used = Counter({kind: round(median(run.cpu_of[kind] for run in own), 1) for run in own for kind in run.cpu_of})
    processes: list[list[Any]] = [
        [kind, round(median(len(run.pids_of.get(kind, ())) for run in own)), seconds]
        for kind, seconds in used.most_common()
        if seconds
    ]
    title = f"`sae-ray run` of {IMAGES} images and two SAEs of {STEPS} steps, and the same again"
    return [
        {"title": title, "columns": ["what", *columns], "rows": rows},
        {"title": "Seconds of CPU by process", "columns": ["process", "number", "seconds of CPU"], "rows": processes},
    ]


if __name__ == "__main__":
    main()
