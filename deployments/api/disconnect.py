"""Stops the computation for a request when its client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect
from starlette.types import Receive


@asynccontextmanager
async def cancelled_on_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Cancel the body of the `async with` and raise `ClientDisconnect` from it when the client disconnects.

    `receive` is the request's ASGI channel. The request body must have been read, so that the next message is the
    disconnect. Ray Serve also cancels the whole request itself; plain uvicorn does not. Only one task may listen at a
    time, since Ray Serve delivers the message once.
    """
    handler = asyncio.current_task()
    assert handler is not None
    left = False

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        handler.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if left and handler.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()
