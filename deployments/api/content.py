"""Stored files over HTTP: whole or in part, in chunks, with validators for caches and resumed downloads."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from hashlib import sha256

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from deployments.errors import APIError
from deployments.interfaces import Content, State

CHUNK_BYTES = 2**20
"""Size of one read from the store: each is a round trip to the state actor, and a download holds one in memory."""

_RANGE = re.compile(r"bytes=\s*([0-9]{0,18})\s*-\s*([0-9]{0,18})\s*", re.IGNORECASE)
"""Numbers have at most 18 digits: no file is longer, and Python refuses to parse thousands of digits."""


async def content_response(request: Request, state: State, content: Content) -> Response:
    """`content` as `request` asks for it: 200, 206 for a range, 304 for a cached copy, no body for HEAD.

    Raises:
        APIError: 416 for a range outside the file; whatever `State.read` raises before the status is sent.
    """
    # A key's bytes never change. The key may reveal where the file is stored, so clients see a digest of it.
    etag = f'"{sha256(content.key.encode()).hexdigest()[:32]}"'
    headers = {
        "accept-ranges": "bytes",
        "etag": etag,
        "cache-control": "private, max-age=31536000, immutable",
        "content-disposition": f'attachment; filename="{content.filename}"',
    }
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if etag in known or known == ["*"]:
        return Response(status_code=304, headers=headers)

    wanted = request.headers.get("range", "")
    # HEAD has no ranges (RFC 9110 section 14.2), and a range of another file (If-Range) does not apply to this one.
    if request.method == "HEAD" or request.headers.get("if-range", etag) != etag:
        wanted = ""
    span = requested_span(wanted, content.size)
    start, end = span or (0, content.size)
    headers["content-length"] = str(end - start)
    if span:
        headers["content-range"] = f"bytes {start}-{end - 1}/{content.size}"
    status = 206 if span else 200
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=content.media_type)

    first = await state.read(content.key, start, min(CHUNK_BYTES, end - start))

    async def chunks() -> AsyncIterator[bytes]:
        yield first
        for offset in range(start + CHUNK_BYTES, end, CHUNK_BYTES):
            yield await state.read(content.key, offset, min(CHUNK_BYTES, end - offset))

    return StreamingResponse(chunks(), status, headers, content.media_type)


def requested_span(header: str, size: int) -> tuple[int, int] | None:
    """The half-open byte span that a `Range` header requests of a file of `size` bytes; None for the whole file.

    A header that is malformed or names several ranges is ignored, as RFC 9110 section 14.2 allows.
    """
    match = _RANGE.fullmatch(header)
    if match is None or not any(match.groups()):
        return None
    first, last = match.groups()
    if first:
        start, end = int(first), min(int(last) + 1, size) if last else size
        if last and int(last) < int(first):
            return None
    else:  # a suffix: the last N bytes
        start, end = max(size - int(last), 0), size
    if start >= size or start == end:
        raise APIError(
            416,
            f"The file has {size} bytes; '{header}' lies outside of it",
            code="range_not_satisfiable",
            headers={"content-range": f"bytes */{size}"},
        )
    return start, end
