"""Says what is being done, and again every few seconds while it lasts."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import click

EVERY_SECONDS = 5.0


class Progress:
    """Call it with what is being done. A thread repeats the latest, since a single step may take minutes."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._latest = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __call__(self, text: str) -> None:
        self._latest = text

    def say(self, text: str) -> None:
        """Prints it at once."""
        minutes, seconds = divmod(int(time.monotonic() - self._begun), 60)
        click.echo(f"{minutes}:{seconds:02d} {text}")

    def _repeat(self) -> None:
        while not self._ended.wait(EVERY_SECONDS):
            if self._latest:
                self.say(self._latest)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()


class Rate:
    """How fast something goes, and when it will be done."""

    def __init__(self, done: int, total: int, unit: str):
        self._begun, self._first, self._total, self._unit = time.monotonic(), done, total, unit

    def line(self, done: int) -> str:
        per_second = (done - self._first) / max(time.monotonic() - self._begun, 1e-9)
        left = f", {(self._total - done) / per_second / 60:.1f} min left" if per_second else ""
        return f"{done:,} of {self._total:,} {self._unit}, {per_second:.1f} a second{left}"
