"""Progress of a long stage: a bar on a terminal, or a plain line every few seconds elsewhere (such as a job's log)."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 10.0


class Progress:
    """Reports progress over `total` units of work on standard error.

    Use as a context manager. Call `advance` with the amount done since the last call.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0):
        self.label = label
        self.total = total
        self.unit = unit
        self.done = done
        self.resumed_at = done
        self.bar = tqdm(total=total, initial=done, desc=label, unit=f" {unit}") if sys.stderr.isatty() else None
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> Progress:
        if self.bar is None:
            already = f", {self.done:,} already done" if self.done else ""
            say(f"{self.label}: {self.total:,} {self.unit}{already}")
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self.bar is not None:
            self.bar.close()
        elif error is None:
            say(f"{self.label}: done in {time.monotonic() - self.started:.1f} s")

    def advance(self, amount: int) -> None:
        self.done += amount
        if self.bar is not None:
            self.bar.update(amount)
        elif time.monotonic() - self.last_line > LINE_SECONDS:
            self.last_line = time.monotonic()
            rate = (self.done - self.resumed_at) / (self.last_line - self.started)
            say(f"{self.label}: {self.done:,} of {self.total:,} {self.unit}, {rate:,.1f} per second")


class Board:
    """An actor that collects the progress of bundles. Ray Train's own reports would make workers wait for a poll."""

    def __init__(self):
        self.done: dict[str, int] = {}

    def set(self, name: str, amount: int) -> None:
        self.done[name] = amount

    def total(self) -> int:
        return sum(self.done.values())


def say(text: str) -> None:
    """Prints a line on standard error without breaking a progress bar."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()
