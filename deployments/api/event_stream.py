"""Server-sent events as OpenAI's clients read them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deployments.api.disconnect import cancelled_on_disconnect
from deployments.api.error_responses import as_api_error, error_object
from deployments.api.protocol.responses import CompletedImageEvent, PartialImageEvent

Frames = AsyncGenerator[PartialImageEvent | CompletedImageEvent | str, None]
"""Events. A string becomes a comment, which clients skip and which keeps proxies from closing the connection."""


SILENCE_SECONDS = 15.0
"""After this long without a frame a comment is sent: proxies (nginx, AWS) close a connection silent for 60 s."""


class EventStream(Response):
    """Sends one event per frame.

    The status line waits for the first frame, at most `SILENCE_SECONDS`, so that an immediate failure (a full queue, a
    job the pipeline refuses) is a plain error with its own status. A later failure becomes an `error` event. The frames
    are closed when the client disconnects.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: Frames):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_body(data: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async with cancelled_on_disconnect(receive), aclosing(_never_silent(self._frames)) as frames:
            first = await anext(frames)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send_body(_encoded(first))
            try:
                async for frame in frames:
                    await send_body(_encoded(frame))
            except Exception as failure:
                error = to_json({"type": "error", "error": error_object(as_api_error(failure))})
                await send_body(b"event: error\ndata: " + error + b"\n\n")
            await send_body(b"", more=False)


async def _never_silent(frames: Frames) -> Frames:
    """`frames`, with comments wherever the next one takes long."""
    async with aclosing(frames):
        coming = asyncio.ensure_future(anext(frames))
        try:
            while True:
                await asyncio.wait((coming,), timeout=SILENCE_SECONDS)
                if not coming.done():
                    yield "waiting"
                    continue
                try:
                    frame = coming.result()
                except StopAsyncIteration:
                    return
                yield frame
                coming = asyncio.ensure_future(anext(frames))
        finally:
            coming.cancel()
            await asyncio.wait((coming,))


def _encoded(frame: PartialImageEvent | CompletedImageEvent | str) -> bytes:
    if isinstance(frame, str):
        return f": {frame}\n\n".encode()
    return f"event: {frame.type}\ndata: {frame.model_dump_json()}\n\n".encode()
