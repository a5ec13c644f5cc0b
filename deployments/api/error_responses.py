"""Every failure as OpenAI's error envelope, with the message also under `detail`, where SGLang's clients look."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from deployments.errors import APIError
from deployments.log import request_id
from pipelines.job import InvalidJob

logger = logging.getLogger(__name__)


FINAL = (HTTPStatus.CONFLICT, HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.GATEWAY_TIMEOUT)
"""Statuses that OpenAI's clients would retry twice by themselves, in vain: an adapter is still merged half a second
later, a failed generation was already retried where that may help, and an expired timeout was the client's own."""


RETRY_AFTER_SECONDS = "5"
"""When a missing part of the server may be back, unless the error says otherwise: most are within ten seconds."""


def error_object(error: APIError) -> dict[str, str | None]:
    return {"message": error.message, "type": error.type, "param": error.param, "code": error.code}


def error_response(error: APIError) -> JSONResponse:
    headers = dict(error.headers)
    if error.status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.setdefault("Retry-After", RETRY_AFTER_SECONDS)
    if error.status in FINAL:
        headers["x-should-retry"] = "false"
    return JSONResponse({"error": error_object(error), "detail": error.message}, error.status, headers)


def as_api_error(failure: Exception) -> APIError:
    """The error to send for any failure. An unexpected one is logged in full but sent without details."""
    if isinstance(failure, APIError):
        return failure
    if isinstance(failure, InvalidJob):
        return APIError(400, str(failure), param=failure.param, code="invalid_value")
    logger.error("failed unexpectedly", exc_info=failure)
    return APIError(
        500,
        "The server failed to handle this request; its log has the reason under the request id "
        f"'{request_id.get()}' (header x-request-id).",
        code="internal_error",
    )


def invalid_field(errors: Sequence[Any]) -> APIError:
    """A 400 for the first of pydantic's `errors`, naming the field as the client wrote it.

    FastAPI puts the location (`query`, `path`) before the field's name; wire models do not.
    """
    first = errors[0]
    names = [part for part in first["loc"] if part not in ("query", "path", "header")]
    param = str(names[0]) if names else None
    if first["type"] == "missing":
        return APIError(400, f"Missing required parameter: '{param}'", param=param, code="missing_required_parameter")
    reason = first["msg"].removeprefix("Value error, ")
    code = "invalid_type" if first["type"].endswith(("_type", "_parsing")) else "invalid_value"
    return APIError(400, f"Invalid '{param}': {reason}", param=param, code=code)


def methods_of(app: FastAPI, request: Request) -> list[str]:
    """Methods that the path of `request` takes: each is a route of its own, and Starlette names only the first's."""

    def is_taken(method: str) -> bool:
        return any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in app.routes)

    return [method for method in ("DELETE", "GET", "HEAD", "POST") if is_taken(method)]


def install(app: FastAPI) -> None:
    """Make `app` respond with the envelope to any failure inside a route, or before one is found."""

    async def known_failure(request: Request, failure: Exception) -> JSONResponse:
        return error_response(as_api_error(failure))

    async def invalid_query(request: Request, failure: RequestValidationError) -> JSONResponse:
        return error_response(invalid_field(failure.errors()))

    async def no_route(request: Request, failure: HTTPException) -> JSONResponse:
        call = f"{request.method} {request.url.path}"
        match failure.status_code:
            case HTTPStatus.NOT_FOUND:
                error = APIError(404, f"There is no {call}; GET /openapi.json lists every route", code="unknown_url")
            case HTTPStatus.METHOD_NOT_ALLOWED:
                allowed = ", ".join(methods_of(app, request))
                message = f"{call} is not allowed; the path takes {allowed}"
                error = APIError(405, message, code="method_not_allowed", headers={"Allow": allowed})
            case status:
                error = APIError(status, str(failure.detail), headers=failure.headers)
        return error_response(error)

    app.exception_handler(APIError)(known_failure)
    app.exception_handler(InvalidJob)(known_failure)
    app.exception_handler(RequestValidationError)(invalid_query)
    app.exception_handler(HTTPException)(no_route)
