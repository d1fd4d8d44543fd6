"""Serves a report to a browser on this machine, or on one that forwards a port to it."""

from __future__ import annotations

import mimetypes
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from sae_ray.errors import UsageError
from sae_ray.loopback import LOOPBACK, names_this_machine
from sae_ray.store.files import Folder

PORT = 8600


def report_server(report: Folder, port: int) -> ThreadingHTTPServer:
    """A server of a report's files, wherever they lie, that only this machine reaches. It needs no key.

    Args:
        report: the folder of the report.
        port: 0 for a free one.

    Raises:
        UsageError: the port is taken, or may not be used.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(*_found(report, self.path, self.headers.get("Host", "")))

        do_HEAD = do_GET

        def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
            self.send_response(status)
            headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-cache"}
            for name, value in (headers | {"X-Content-Type-Options": "nosniff"}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing of every file."""

    try:
        return ThreadingHTTPServer((LOOPBACK, port), Handler)
    except OSError as error:
        raise UsageError(f"--port {port} cannot be used ({error.strerror}); name another one") from error


def _found(report: Folder, path: str, host: str) -> tuple[HTTPStatus, str, bytes]:
    """Status, media type and content of a path of the report."""
    if not names_this_machine(host):
        return _words(HTTPStatus.FORBIDDEN, f"open http://{LOOPBACK} instead of {host[:100]}")
    name = unquote(path.partition("?")[0]).removeprefix("/") or "index.html"
    if "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        return _words(HTTPStatus.NOT_FOUND, "there is no such file")
    try:
        content = report.read_bytes(name)
    except OSError:
        return _words(HTTPStatus.NOT_FOUND, "there is no such file; if the report was made again, reload the page")
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return HTTPStatus.OK, f"{kind}; charset=utf-8" if kind.startswith("text/") else kind, content


def _words(status: HTTPStatus, text: str) -> tuple[HTTPStatus, str, bytes]:
    return status, "text/plain; charset=utf-8", text.encode()


def serve_until_interrupted(server: ThreadingHTTPServer, say: Callable[[str], None]) -> None:
    """Serves a report until Ctrl-C."""
    port = server.server_address[1]
    say(f"The report is at http://{LOOPBACK}:{port}/ until you press Ctrl-C.")
    say(f"To open it on another machine, first run there: ssh -N -L {port}:{LOOPBACK}:{port} USER@THIS_HOST")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say("Stopped.")
