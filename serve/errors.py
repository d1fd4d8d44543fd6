"""Errors as clients see them."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.store.files import without_keys

logger = logging.getLogger("ray.serve")

RETRY_AFTER = {"Retry-After": "1"}
NAMES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An error response."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(status, _whole(message), dict(headers or {}))
        self.code = code
        self.param = param and _whole(param)

    def body(self) -> dict[str, Any]:
        """The error in the format of OpenAI's API, with the request id that appears in the logs."""
        kind = NAMES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        facts = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        return {"error": facts | {"request_id": request_id()}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


def _whole(text: str) -> str:
    """A text that repeats what a client sent: half of a character, which UTF-8 does not have, is spelled out."""
    return text.encode(errors="backslashreplace").decode()


def overloaded(message: str) -> ApiError:
    return ApiError(429, "overloaded", message, headers=RETRY_AFTER)


def invalid(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, "invalid_value", message, param)


def as_api_error(error: BaseException) -> ApiError:
    """The error to send to the client. Unexpected errors are logged with their traceback."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, RayTaskError):
        error = error.cause
    match error:
        case ApiError():
            return error
        case UsageError():
            return invalid(str(error))
        case TimeoutError():
            return ApiError(504, "timeout", "the request exceeded this server's time limit; ask for fewer tokens")
        case RayActorError() | DeploymentUnavailableError():
            message = "the replica that processed this request stopped; send the request again"
            return ApiError(503, "replica_lost", message, headers=RETRY_AFTER)
        case SaeRayError():
            logger.error("failed: %s", message := without_keys(str(error)))
            return ApiError(500, "failed", message)
    logger.error("unexpected %s", type(error).__name__, exc_info=error)
    return ApiError(500, "internal_error", "internal error; look for the request id in the server's logs")


def request_id() -> str:
    """The id of the current request, as Serve's proxy logs it and returns it to the client."""
    # Private; as of Ray 2.60.0 Serve has no public way to read it.
    from ray.serve.context import _get_serve_request_context

    return _get_serve_request_context().request_id or str(uuid.uuid4())
