"""Middleware for every request: authentication, limit on the body's size, metrics and the format of errors."""

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
from .errors import ApiError, as_api_error, invalid
from .metrics import Metrics

SHOWN = 60
"""Maximum number of characters of an invalid value that its error message repeats."""

_LOCAL = re.compile(rb"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.IGNORECASE)
"""`Host` headers that can only mean this machine. Others may come from a web page by DNS rebinding."""


def api_key(config: ServeConfig) -> str | None:
    """The key that clients must send.

    Raises UsageError if the environment sets none and the configuration requires one.
    """
    key = os.environ.get(API_KEY)
    if not key and not config.without_key:
        raise UsageError(
            f"{API_KEY} is not set, so anyone could use this server; set it to a secret, or serve only this machine "
            "with without_key = true"
        )
    return key or None


class ApiMiddleware:
    """ASGI middleware: checks the API key and the size of the body, and counts requests.

    Without a key it accepts only requests to localhost.
    """

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

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await refusal.response()(scope, receive, send_and_note_status)
            else:
                await self.app(scope, self._limited(receive), send_and_note_status)
        except Exception:  # an outer middleware sends the response
            status = 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, status, time.monotonic() - started)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self._key is None:
            if not _LOCAL.fullmatch(headers.get(b"host", b"")):
                message = (
                    "this server has no API key, so it accepts requests to localhost or 127.0.0.1 only; "
                    f"use one of these, or set {API_KEY} on the server"
                )
                return ApiError(403, "foreign_host", message)
        elif scope["path"].removeprefix(scope.get("root_path", "")) not in self._open_to_all:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
                message = "the API key is missing or wrong; send it in the header Authorization: Bearer KEY"
                return ApiError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            return self._too_large()
        return None

    def _limited(self, receive: Receive) -> Receive:
        """Counts the bytes received, since a request may omit its length or state a wrong one."""
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
        return ApiError(413, "body_too_large", f"the request body has more than {self._max_bytes:,.0f} bytes")


def answer_errors(app: FastAPI) -> None:
    """Makes the app return all errors in one format."""

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
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
        message += f"; got {shown if len(shown) <= SHOWN else shown[:SHOWN] + '…'}"
    if not where and error["type"].endswith("_type"):
        message = "the body must be a JSON object, sent with Content-Type: application/json"
    if error["type"] == "extra_forbidden":
        message = "unknown field; remove it"
    return invalid(f"{where}: {message}" if where else message, where or None)
