"""Middleware for every request: authentication, limit on the body's size, metrics and the format of errors."""

from __future__ import annotations

import hmac
import os
import time
from collections.abc import Collection
from itertools import pairwise
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sae_ray.errors import UsageError
from sae_ray.loopback import names_this_machine

from .config import API_KEY, ServeConfig
from .errors import ApiError, as_api_error, invalid
from .metrics import Metrics
from .schemas import PART_TYPES

SHOWN = 60
"""Maximum number of characters of an invalid value that its error message repeats."""


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
    """ASGI middleware: checks the API key and the size of the body, answers HEAD as GET without a body, and counts
    requests.

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
        without_body = scope["method"] == "HEAD"
        if without_body:
            scope = {**scope, "method": "GET"}

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif without_body:
                message = {**message, "body": b""}
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
            if not names_this_machine(headers.get(b"host", b"").decode("latin-1")):
                message = (
                    "this server has no API key, so it accepts requests to localhost or 127.0.0.1 only; "
                    f"use one of these, or set {API_KEY} on the server"
                )
                return ApiError(403, "foreign_host", message)
        elif scope["path"].removeprefix(scope.get("root_path", "")) not in self._open_to_all:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key.encode()):
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
        message = str(error.detail)
        if error.status_code == 400:  # FastAPI could not parse it, and does not say why
            message = "the body cannot be read; send JSON in UTF-8, without compression"
        if error.status_code in (404, 405):
            message = f"there is no {request.method} {request.url.path[:100]} here; /docs lists what there is"
        return ApiError(error.status_code, code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()


def _as_refusal(error: dict[str, Any]) -> ApiError:
    # pydantic inserts the kind of a message's part behind its place.
    loc = [at for before, at in pairwise(error["loc"]) if not (isinstance(before, int) and at in PART_TYPES)]
    facts = error.get("ctx", {})
    where = ".".join(map(str, [*loc, *([facts["field"]] if "field" in facts else [])]))
    message, value = error["msg"].removeprefix("Value error, "), error.get("input")
    match error["type"]:
        case "json_invalid":
            return invalid(f"the body is not valid JSON: {facts['error']} at character {where}")
        case kind if not where and (kind.endswith("_type") or kind == "missing"):
            return invalid("the body must be a JSON object, sent with Content-Type: application/json")
        case "extra_forbidden":
            message = "unknown field; remove it"
        case "missing":
            message = "is missing"
        case "model_attributes_type" | "model_type" | "dict_type":
            message = f"must be a JSON object{_shown(value)}"
        case "union_tag_not_found":
            where, message = f"{where}.type", f"is missing; it must be {' or '.join(PART_TYPES)}"
        case "union_tag_invalid":
            message = f"parts of the type {facts['tag'][:SHOWN]} are not supported; send {' or '.join(PART_TYPES)}"
            where = f"{where}.type"
        case "wrong":
            pass
        case _:
            message += _shown(value)
    return invalid(f"{where}: {message}" if where else message, where or None)


def _shown(value: Any) -> str:
    if not isinstance(value, str | int | float | bool):
        return ""
    shown = repr(value)
    return f"; got {shown if len(shown) <= SHOWN else shown[:SHOWN] + '…'}"
