"""What surrounds every request: its id, a whole answer whatever happens, and a body read before the answer."""

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

MAX_DRAINED_BYTES = 256 * 2**20
"""Bytes of a refused upload that are still read. A client that is answered while it sends sees a reset connection
instead of the answer, so most uploads are worth reading to their end; an endless one is not."""


class RequestMiddleware:
    """Gives the request an id (the client's own `x-request-id` where it has a sane one) and answers every failure."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        proposed = Headers(scope=scope).get("x-request-id", "")
        request_id.set(proposed if _SANE_ID.fullmatch(proposed) else f"req_{uuid4().hex}")
        body = _Body(receive, unread=scope["method"] in ("POST", "PUT", "PATCH"))
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                await body.drain()
                MutableHeaders(scope=message)["x-request-id"] = request_id.get()
            await send(message)

        try:
            await self.app(scope, body.receive, send_with_id)
        except ClientDisconnect:
            logger.info("Client of request %s left", request_id.get())
        except Exception as failure:
            if started:
                raise
            await error_response(as_api_error(failure))(scope, body.receive, send_with_id)


class _Body:
    """Remembers how far the request's body has been read."""

    def __init__(self, receive: Receive, *, unread: bool):
        self._receive = receive
        self._unread = unread

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._unread = False
        return message

    async def drain(self) -> None:
        drained = 0
        while self._unread and drained < MAX_DRAINED_BYTES:
            drained += len((await self.receive()).get("body", b""))
