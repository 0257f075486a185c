"""What a client is told when its request can't be done, in OpenAI's form."""

from __future__ import annotations

from typing import Any

from teegpu.errors import BusyError, DeadlineError, PromptError, ShieldError, UnmetError, UsageError

RETRY_AFTER_SECONDS = 1

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer with ``status`` and an error object: what happened, and of which parameter."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        return {"retry-after": str(RETRY_AFTER_SECONDS)} if self.status in (429, 503) else {}


def told(error: BaseException) -> ApiError:
    """``error`` of the engine, as a client is told of it. What nobody expected says nothing: it might quote values."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(429, str(error), code="queue_full")
    if isinstance(error, UnmetError):
        return ApiError(400, str(error), code="grammar")
    if isinstance(error, DeadlineError):
        return ApiError(504, str(error), code="deadline")
    if isinstance(error, (PromptError, UsageError)):
        return ApiError(400, str(error), code="invalid_prompt")
    if isinstance(error, ShieldError):  # more pads than fit: what ended the endpoint itself is not told here
        return ApiError(400, str(error), param="max_tokens", code="too_long")
    return ApiError(503, "the GPU server did not answer as it should: try again later", code="gpu_server_unavailable")
