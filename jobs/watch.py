"""What `sae-ray watch` shows: a study while it runs, from files alone, until it is finished."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, TextIO

from sae_ray.store.files import without_keys
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import recalled_plan
from sae_ray.study.step_plans import ListPlan

from .progress import LINE_SECONDS
from .status import status, status_lines

EVERY_SECONDS = 3.0
"""Drivers tell of their work every 10 s."""
ENDED = ("done", "failed")


def watch(root: str, out: TextIO | None = None) -> None:
    """Shows the study that was run last under a root until nothing is left to do, or Ctrl-C.

    On a terminal the display is renewed in place. Elsewhere there is a line for every step that ends, and one for every
    step at work now and then. Where nobody is at work, it says how the study goes on, and waits.

    Raises UsageError if the root has no study.
    """
    screen = _screen(out or sys.stdout)
    known: dict[str, dict[str, Any]] = {}
    try:
        while True:
            plan = recalled_plan(root)  # it may have been run again, with other settings
            entries = status(plan, known)
            known = {entry["step"]: entry for entry in entries if entry["status"] in ENDED}
            left = n_left(plan, entries)
            screen.show(plan, entries, left)
            if not left:
                return
            time.sleep(EVERY_SECONDS)
    except KeyboardInterrupt:
        return


def n_left(plan: StudyPlan, entries: Sequence[dict[str, Any]]) -> int:
    """Steps that are left to do: neither done nor failed, and reading none that failed."""
    found = {entry["step"]: entry["status"] for entry in entries}
    return sum(
        found[one.step.name] not in ENDED
        and (isinstance(one, ListPlan) or all(found.get(read.name) != "failed" for read in one.inputs))
        for one in plan.plans
    )


def headline(plan: StudyPlan, entries: Sequence[dict[str, Any]], left: int) -> str:
    """`demo under runs/demo: 12 of 30 steps done, 2 running, 1 failed`."""
    counts = Counter(entry["status"] for entry in entries)
    texts = [f"{counts['done']} of {len(entries)} steps done"]
    texts += [f"{counts[kind]} {kind}" for kind in ("running", "failed", "torn") if counts[kind]]
    if left and not counts["running"]:
        texts.append("nobody is at work")
    return without_keys(f"{plan.study.name} under {plan.root}: {', '.join(texts)}")


def advice(plan: StudyPlan, entries: Sequence[dict[str, Any]], left: int) -> list[str]:
    """What to do if nobody is at work and something is left."""
    if not left or any(entry["status"] == "running" for entry in entries):
        return []
    text = f"Nobody is at work on it: `sae-ray run --root {plan.root}` goes on. Ctrl-C ends this display."
    return [without_keys(text)]


def _unsettled(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that there is something to say of."""
    return [entry for entry in entries if entry["status"] not in ("done", "missing")]


def _screen(out: TextIO) -> _Terminal | _Log:
    return _Terminal(out) if out.isatty() else _Log(out)


class _Terminal:
    """Renews its lines in place."""

    def __init__(self, out: TextIO):
        self.out = out
        self._n_shown = 0

    def show(self, plan: StudyPlan, entries: Sequence[dict[str, Any]], left: int) -> None:
        width, height = _size(self.out)
        stages = Counter(entry["stage"] for entry in entries)
        done = Counter(entry["stage"] for entry in entries if entry["status"] == "done")
        lines = [
            headline(plan, entries, left),
            *advice(plan, entries, left),
            "  ".join(f"{stage} {done[stage]}/{n}" for stage, n in stages.items()),
            "",
            *status_lines(_unsettled(entries)),
        ]
        rows = [max(1, -(-len(line) // width)) for line in lines]  # long lines are wrapped
        fit = [shown for shown in accumulate(rows) if shown < height]  # what scrolls away could not be renewed
        up = f"\x1b[{self._n_shown}A\r\x1b[J" if self._n_shown else ""
        self.out.write(up + "".join(f"{line}\n" for line in lines[: len(fit)]))
        self.out.flush()
        self._n_shown = fit[-1] if fit else 0


def _size(out: TextIO) -> tuple[int, int]:
    """Columns and rows."""
    try:
        size = os.get_terminal_size(out.fileno())
        return size.columns, size.lines
    except (OSError, ValueError):
        return 80, 24


class _Log:
    """Adds lines only."""

    def __init__(self, out: TextIO):
        self.out = out
        self._ended: set[str] | None = None
        self._idle = 0
        self._last = 0.0

    def show(self, plan: StudyPlan, entries: Sequence[dict[str, Any]], left: int) -> None:
        ended = [entry for entry in entries if entry["status"] in ENDED]
        if self._ended is None:
            lines = [headline(plan, entries, left)]
        else:
            lines = status_lines([entry for entry in ended if entry["step"] not in self._ended])
        self._ended = {entry["step"] for entry in ended}
        now = time.monotonic()
        if now - self._last >= LINE_SECONDS:
            self._last = now
            lines += status_lines([entry for entry in _unsettled(entries) if entry["status"] not in ENDED])
        told = advice(plan, entries, left)
        self._idle = self._idle + 1 if told else 0
        lines += told if self._idle == 2 else []  # between two stages nobody is at work for a moment
        if not left:
            lines.append(headline(plan, entries, left))
        self.out.write("".join(f"{line}\n" for line in lines))
        self.out.flush()
