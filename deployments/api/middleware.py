"""Gives every request an id, a response whatever happens, and a line in the log."""

from __future__ import annotations

import logging
import re
import time
from http import HTTPStatus
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.error_responses import as_api_error, error_response
from deployments.log import request_id

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""The status that nginx logs for a client that disconnects before its response."""

_SANE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class RequestMiddleware:
    """Gives the request an id (its own `x-request-id` if well-formed) and turns every failure into a response."""

    def __init__(self, app: ASGIApp, *, sends_id: bool):
        self.app = app
        self.sends_id = sends_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        proposed = Headers(scope=scope).get("x-request-id", "")
        request_id.set(proposed if _SANE_ID.fullmatch(proposed) else f"req_{uuid4().hex}")
        begun = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.sends_id:
                    MutableHeaders(scope=message)["x-request-id"] = request_id.get()
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = CLIENT_LEFT
        except Exception as failure:
            if status:
                raise
            await error_response(as_api_error(failure))(scope, receive, send_with_id)
        finally:
            _log(scope, status, time.monotonic() - begun)


def _log(scope: Scope, status: int, seconds: float) -> None:
    """Log the route's pattern, because a path's content is the client's own. Successful probes are only for DEBUG."""
    route = getattr(scope.get("route"), "path", "an unknown route")
    is_probe = not route.startswith("/v1") and status < HTTPStatus.BAD_REQUEST
    level = logging.DEBUG if is_probe else logging.INFO
    logger.log(level, "%s %s %d in %.3f s", scope["method"], route, status, seconds)
