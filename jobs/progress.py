"""Progress of a long stage: a bar on a terminal, or a plain line every few seconds elsewhere (such as a job's log). The
locks of its steps tell of it too, for `sae-ray status`, and so do Ray's metrics.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, cast

from tqdm import tqdm

from sae_ray.store.files import without_keys
from sae_ray.store.steps import Step, tell

from .metrics import show_cell, show_stage

LINE_SECONDS = 10.0
POLL_SECONDS = 1.0
SETTLING_SECONDS = 30.0
"""In which workers start, so that the pace so far says little of what is left."""


class Progress:
    """Reports progress over `total` units of work on standard error, and of the `steps` that the work is for.

    Use as a context manager. Call `advance` with the amount done since the last call. Workers tell a `board` what they
    have done of work that is not finished.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0, steps: Sequence[Step] = ()):
        self.label = label
        self.total = total
        self.unit = unit
        self.done = done
        self.steps = steps
        self._resumed_at = self._shown = done
        self._begun = 0
        self._cells: dict[str, dict[str, Any]] = {}
        self._board: StageBoard | None = None
        self._bar = tqdm(total=total, initial=done, desc=label, unit=f" {unit}") if sys.stderr.isatty() else None
        self._started = self._last_line = time.monotonic()
        self._stop = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        if self._bar is None:
            already = f", {self.done:,} already done" if self.done else ""
            say(f"{self.label}: {self.total:,} {self.unit}{already}")
        self._ticker.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._stop.set()
        self._ticker.join()
        if error is None:
            self._update()
        if self._bar is not None:
            self._bar.close()
        elif error is None:
            say(f"{self.label}: done in {time.monotonic() - self._started:.1f} s")

    def advance(self, amount: int) -> None:
        self.done += amount

    def board(self) -> StageBoard:
        """An empty one, for workers."""
        self._board = empty_board()
        return self._board

    def _tick(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            pace = self._update()
            if self._bar is None and time.monotonic() - self._last_line >= LINE_SECONDS:
                self._last_line = time.monotonic()
                say(f"{self.label}: {', '.join(pace_texts(pace))}")

    def _ask_board(self) -> None:
        if self._board is None:
            return
        import ray
        from ray.exceptions import RayError

        with suppress(RayError):  # lost or late: shown is what was known before
            told = ray.get(self._board.actor.told.remote(), timeout=2 * POLL_SECONDS)
            self._begun, self._cells = cast("tuple[int, dict[str, dict[str, Any]]]", told)

    def _update(self) -> dict[str, Any]:
        """Passes on how far the work is, and returns it."""
        self._ask_board()
        # Work that is done again does not turn the display back.
        shown = max(self._shown, min(self.total, self.done + self._begun))
        if self._bar is not None:
            self._bar.update(shown - self._shown)
        self._shown = shown
        seconds = time.monotonic() - self._started
        pace = {"of": "stage"} | pace_of(shown, self.total, self.unit, shown - self._resumed_at, seconds)
        if seconds < SETTLING_SECONDS:
            pace["eta_seconds"] = None
        if self.steps:
            show_stage(self.steps[0], pace)
        for step in self.steps:
            cell = self._cells.get(step.name)
            tell(step, cell or pace)
            if cell:
                show_cell(step, cell)
        return pace


class Board:
    """An actor that collects what workers have done of unfinished work, piece by piece. One serves all stages of a
    driver, since it takes a process to start; what is told late of a stage that is over is dropped.
    """

    def __init__(self, stage: int):
        self.begin(stage)

    def begin(self, stage: int) -> None:
        self.stage = stage
        self.done: dict[str, int] = {}
        self.cells: dict[str, dict[str, Any]] = {}

    def set(self, stage: int, piece: str, amount: int, cells: dict[str, dict[str, Any]]) -> None:
        if stage == self.stage:
            self.done[piece] = amount
            self.cells |= cells

    def told(self) -> tuple[int, dict[str, dict[str, Any]]]:
        return sum(self.done.values()), self.cells


class StageBoard(NamedTuple):
    """The board for the workers of one stage."""

    actor: Any
    stage: int

    def set(self, piece: str, amount: int, cells: dict[str, dict[str, Any]] | None = None) -> None:
        """Tells what a worker knows, without waiting.

        Args:
            piece: names a piece of work.
            amount: what is done of it, in the units of the progress; 0 once the driver counts the piece itself.
            cells: name of a step -> its own pace, with figures of its own.
        """
        self.actor.set.remote(self.stage, piece, amount, cells or {})


_boards: dict[tuple[str, str], Any] = {}
"""A driver's node and its job -> its board, which lives as long as this handle."""
_stages = itertools.count()


def empty_board() -> StageBoard:
    """The board of this driver for a new stage. A new one if it was lost."""
    import ray
    from ray.exceptions import RayError

    from .cluster import beside_driver

    context = ray.get_runtime_context()
    driver, stage = (context.get_node_id(), context.get_job_id()), next(_stages)
    if driver in _boards:
        with suppress(RayError):
            ray.get(_boards[driver].begin.remote(stage), timeout=SETTLING_SECONDS)
            return StageBoard(_boards[driver], stage)
    _boards[driver] = ray.remote(num_cpus=0)(Board).options(scheduling_strategy=beside_driver()).remote(stage)
    return StageBoard(_boards[driver], stage)


def pace_of(done: int, total: int, unit: str, progressed: int, seconds: float) -> dict[str, Any]:
    """How far work is, how fast it goes and how long it will take.

    It is worked out where the work is done: the clock of whoever reads it may be another one.

    Args:
        progressed: units done in the last `seconds`.
    """
    rate = progressed / seconds if seconds > 0 else 0.0
    remaining = (total - done) / rate if rate else None
    return {"done": done, "total": total, "unit": unit, "per_second": rate, "eta_seconds": remaining}


def pace_texts(pace: dict[str, Any], running: bool = True) -> list[str]:
    """A pace as users read it: how far, the figures of a cell, and of running work how fast and how long."""
    texts = [f"{pace['done']:,} of {pace['total']:,} {pace['unit']}"]
    if pace["of"] == "cell":
        dead = 100 * pace["n_dead"] / pace["d_sae"]
        texts += [f"loss {pace['loss']:.3g}", f"L0 {pace['l0']:.1f}", f"dead {dead:.0f} %"]
    if running and pace["per_second"]:
        rate = pace["per_second"]
        texts += [f"{rate:,.0f} {pace['unit']}/s" if rate >= 10 else f"{rate:.2g} {pace['unit']}/s"]
        if pace["eta_seconds"] is not None:
            texts += [f"ETA {duration(pace['eta_seconds'])}"]
    return texts


def duration(seconds: float) -> str:
    """`39 min`."""
    for unit, length, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{seconds / length:.0f} {unit}" if unit != "h" else f"{seconds / length:.1f} h"
    return f"{seconds / 86400:.1f} days"


def say(text: str) -> None:
    """Prints a line on standard error without breaking a progress bar, and without the keys of URIs in it."""
    tqdm.write(without_keys(text), file=sys.stderr)
    sys.stderr.flush()
