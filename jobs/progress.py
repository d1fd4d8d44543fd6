"""Progress of a long stage: a bar on a terminal, or a plain line every few seconds elsewhere (such as a job's log)."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from typing import Any, cast

from tqdm import tqdm

LINE_SECONDS = 10.0
POLL_SECONDS = 1.0


class Progress:
    """Reports progress over `total` units of work on standard error.

    Use as a context manager. Call `advance` with the amount done since the last call. Workers tell a `board` what they
    have done of work that is not finished; what they tell is only for show, and may be lost.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0):
        self.label = label
        self.total = total
        self.unit = unit
        self.done = done
        self._resumed_at = self._shown = done
        self._begun = 0
        self._board: Any = None
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
        if self._bar is not None:
            self._ask_board()
            self._show()
            self._bar.close()
        elif error is None:
            say(f"{self.label}: done in {time.monotonic() - self._started:.1f} s")

    def advance(self, amount: int) -> None:
        self.done += amount

    def board(self) -> Any:
        """The handle of a new `Board`, for workers."""
        import ray

        from .cluster import beside_driver

        self._board = ray.remote(num_cpus=0)(Board).options(scheduling_strategy=beside_driver()).remote()
        return self._board

    def _tick(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._ask_board()
            self._show()

    def _ask_board(self) -> None:
        if self._board is None:
            return
        import ray
        from ray.exceptions import RayError

        with suppress(RayError):  # lost or late: shown is what was known before
            self._begun = cast("int", ray.get(self._board.total.remote(), timeout=2 * POLL_SECONDS))

    def _show(self) -> None:
        # Work that is done again does not turn the display back.
        shown = max(self._shown, min(self.total, self.done + self._begun))
        if self._bar is not None:
            self._bar.update(shown - self._shown)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            rate = (shown - self._resumed_at) / (self._last_line - self._started)
            say(f"{self.label}: {shown:,} of {self.total:,} {self.unit}, {rate:,.1f} per second")
        self._shown = shown


class Board:
    """An actor that collects what workers have done of unfinished work, piece by piece."""

    def __init__(self):
        self.done: dict[str, int] = {}

    def set(self, piece: str, amount: int) -> None:
        """`amount` is in the units of the progress; 0 once the driver counts the piece itself."""
        self.done[piece] = amount

    def total(self) -> int:
        return sum(self.done.values())


def say(text: str) -> None:
    """Prints a line on standard error without breaking a progress bar."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()
