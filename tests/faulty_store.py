"""An S3 server (moto) that can be told to fail: `python -m tests.faulty_store PORT`.

`PUT /-/fault/503/30` makes it answer everything with 503 for 30 seconds; `slow` in its place lets clients wait instead
for longer than they do. `GET /-/refused` says how many requests met a fault.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

SLOW_S = 20


class FaultyStore:
    """The WSGI application."""

    def __init__(self):
        self.store = DomainDispatcherApplication(create_backend_app)
        self.fault = ""
        self.until = 0.0
        self.refused = 0

    def __call__(self, environ: dict, start_response) -> Iterable[bytes]:
        match environ["PATH_INFO"].split("/"):
            case ["", "-", "fault", fault, seconds]:
                self.fault, self.until = fault, time.monotonic() + float(seconds)
                return self._answer(start_response, 200)
            case ["", "-", "refused"]:
                return self._answer(start_response, 200, str(self.refused))
        if time.monotonic() > self.until:
            return self.store(environ, start_response)
        self.refused += 1
        if self.fault == "slow":
            time.sleep(SLOW_S)
            return self._answer(start_response, 500)
        return self._answer(start_response, int(self.fault))

    def _answer(self, start_response, status: int, text: str = "") -> Iterable[bytes]:
        start_response(f"{status} -", [("Content-Type", "text/plain"), ("Content-Length", str(len(text)))])
        return [text.encode()]


if __name__ == "__main__":
    run_simple("127.0.0.1", int(sys.argv[1]), FaultyStore(), threaded=True)
