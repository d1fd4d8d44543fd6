"""Refusals and failures as clients see them."""

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

logger = logging.getLogger("ray.serve")

RETRY_AFTER = {"Retry-After": "1"}
NAMES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(HTTPException):
    """An answer that is no success."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(status, message, dict(headers or {}))
        self.code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        """As OpenAI's API says it, with the id by which the logs know the request."""
        kind = NAMES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        facts = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        return {"error": facts | {"request_id": request_id()}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


def overloaded(message: str) -> ApiError:
    return ApiError(429, "overloaded", message, headers=RETRY_AFTER)


def refused(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, "invalid_value", message, param)


def as_api_error(error: BaseException) -> ApiError:
    """What became of a request, for its client; what nobody expected goes to the logs in full."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, RayTaskError):
        error = error.cause
    match error:
        case ApiError():
            return error
        case UsageError():
            return refused(str(error))
        case TimeoutError():
            return ApiError(504, "timeout", "the request took longer than this server allows; ask for fewer tokens")
        case RayActorError() | DeploymentUnavailableError():
            message = "the replica that worked on this request went away; send it again"
            return ApiError(503, "replica_lost", message, headers=RETRY_AFTER)
        case SaeRayError():
            logger.error("failed: %s", error)
            return ApiError(500, "failed", str(error))
    logger.error("unexpected %s", type(error).__name__, exc_info=error)
    return ApiError(500, "internal_error", "something went wrong here; the logs know it by the request id")


def request_id() -> str:
    """The id by which Serve's proxy answers and logs the request that is worked on."""
    from ray.serve.context import _get_serve_request_context

    return _get_serve_request_context().request_id or str(uuid.uuid4())
