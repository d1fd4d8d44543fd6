"""What holds for every request: who may ask, how much may be sent, what is counted."""

from __future__ import annotations

import hmac
import os
import re
import time
from collections.abc import Collection
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sae_ray.errors import UsageError

from .config import API_KEY, ServeConfig
from .errors import ApiError, as_api_error, refused
from .metrics import Metrics

SHOWN = 60
"""Characters of a refused value that are repeated in the refusal."""

_LOCAL = re.compile(rb"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.IGNORECASE)
"""`Host` headers that no other site's name in the browser leads to."""


def api_key(config: ServeConfig) -> str | None:
    """The key that clients must send.

    Raises UsageError when the environment holds none and the configuration does not allow that.
    """
    key = os.environ.get(API_KEY)
    if not key and not config.without_key:
        raise UsageError(
            f"{API_KEY} is not set, so everybody could use this server; set it to a secret of yours, or serve this "
            "machine alone with without_key = true"
        )
    return key or None


class Manners:
    """ASGI middleware: key, size of the body, metrics. Without a key it answers only to this machine's own names."""

    def __init__(self, app: ASGIApp, key: str | None, open_to_all: Collection[str], max_bytes: float, metrics: Metrics):
        self.app = app
        self._key = key
        self._open_to_all = open_to_all
        self._max_bytes = max_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 499

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await refusal.response()(scope, receive, noting)
            else:
                await self.app(scope, self._limited(receive), noting)
        except Exception:  # its answer is given outside of here
            status = 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, status, time.monotonic() - started)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self._key is None:
            if not _LOCAL.fullmatch(headers.get(b"host", b"")):
                message = f"without an API key only localhost and 127.0.0.1 are served; use these, or set {API_KEY}"
                return ApiError(403, "foreign_host", message)
        elif scope["path"].removeprefix(scope.get("root_path", "")) not in self._open_to_all:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
                message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
                return ApiError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            return self._too_large()
        return None

    def _limited(self, receive: Receive) -> Receive:
        """For bodies that do not tell their length, or lie about it."""
        received = 0

        async def counting() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise self._too_large()
            return message

        return counting

    def _too_large(self) -> ApiError:
        return ApiError(413, "body_too_large", f"the request has more than {self._max_bytes:,.0f} bytes")


def answer_errors(app: FastAPI) -> None:
    """Has every refusal and failure of the app in one form."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _as_refusal(error.errors()[0]).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if isinstance(error, ApiError):
            return error.response()
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return ApiError(error.status_code, code, str(error.detail), headers=error.headers).response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()


def _as_refusal(error: dict[str, Any]) -> ApiError:
    where = ".".join(str(part) for part in error["loc"] if part not in ("body", "query", "path"))
    message = error["msg"].removeprefix("Value error, ")
    value = error.get("input")
    if isinstance(value, str | int | float | bool) and error["type"] != "extra_forbidden":
        shown = repr(value)
        message += f"; it is {shown if len(shown) <= SHOWN else shown[:SHOWN] + '…'}"
    if not where and error["type"].endswith("_type"):
        message = "the body must be a JSON object, sent with Content-Type: application/json"
    if error["type"] == "extra_forbidden":
        message = "this field is not known here; leave it out"
    return refused(f"{where}: {message}" if where else message, where or None)
