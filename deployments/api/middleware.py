"""What surrounds every request: its id, and an answer whatever happens."""

from __future__ import annotations

import logging
import re
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.api.error_responses import as_api_error, error_response, request_id

logger = logging.getLogger(__name__)

_SANE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class RequestMiddleware:
    """Gives the request an id (its own `x-request-id` where that is a sane one) and answers every failure."""

    def __init__(self, app: ASGIApp, *, sends_id: bool):
        self.app = app
        self.sends_id = sends_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        proposed = Headers(scope=scope).get("x-request-id", "")
        request_id.set(proposed if _SANE_ID.fullmatch(proposed) else f"req_{uuid4().hex}")
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self.sends_id:
                    MutableHeaders(scope=message)["x-request-id"] = request_id.get()
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            logger.info("Client of request %s left", request_id.get())
        except Exception as failure:
            if started:
                raise
            await error_response(as_api_error(failure))(scope, receive, send_with_id)
