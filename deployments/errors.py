"""`APIError`: a failure reported to the client, raised anywhere in the server, rendered by the ingress."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class APIError(Exception):
    """Becomes `{"error": {"message", "type", "param", "code"}, "detail": message}` with the given status.

    It crosses process boundaries whole: Ray re-raises it at the caller as an instance of this class.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's error type. LiteLLM maps a body that says `invalid_request_error` to a 400 whatever the status, so
        only 400-like client errors carry it."""
        if self.status >= 500:
            return "server_error"
        return {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            429: "rate_limit_error",
        }.get(self.status, "invalid_request_error")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.status, self.message, self.param, self.code, self.headers)


def _rebuild(status: int, message: str, param: str | None, code: str | None, headers: dict[str, str]) -> APIError:
    return APIError(status, message, param=param, code=code, headers=headers)


def too_late() -> APIError:
    return APIError(504, "The job was not done in time", code="timeout")


def not_found(what: str, identifier: str) -> APIError:
    return APIError(404, f"No {what} with id '{identifier}'", code=f"{what.replace(' ', '_')}_not_found")
