"""Parts of a `multipart/form-data` body, counted as they arrive and kept in memory.

Starlette's own form parser spools files of any size to disk before anybody can object; here a part is refused as soon
as it exceeds its limit. Clients' content types and file names, which range from `blob` to the full path on the client's
disk, are ignored. Only an empty name of an empty file counts: no file was chosen.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from deployments.errors import APIError

MAX_PARTS = 256
"""Far above what any request has: some 30 parameters, 16 images, a mask."""


async def read_multipart(
    chunks: AsyncIterator[bytes], content_type: str, *, max_part_bytes: int
) -> list[tuple[str, str | bytes]]:
    """The parts in body order: text for plain fields, bytes for files.

    Raises:
        APIError: 400 for a body that is broken or cut short, 413 naming the part that exceeds `max_part_bytes`.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise _broken("its Content-Type names no boundary")
    form = _Form(max_part_bytes)
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": form.on_part_begin,
                "on_header_field": form.on_header_field,
                "on_header_value": form.on_header_value,
                "on_header_end": form.on_header_end,
                "on_headers_finished": form.on_headers_finished,
                "on_part_data": form.on_part_data,
                "on_part_end": form.on_part_end,
                "on_end": form.on_end,
            },
        )
        async for chunk in chunks:
            parser.write(chunk)
    except FormParserError as error:
        raise _broken(str(error)) from error
    if not form.complete:
        raise _broken("it ends before its closing boundary")
    return form.parts


def _broken(reason: str) -> APIError:
    return APIError(400, f"The multipart body cannot be read: {reason}", code="invalid_multipart")


class _Form:
    """Receives the parser's callbacks. Each slice `data[start:end]` belongs to the element that began last."""

    def __init__(self, max_part_bytes: int):
        self.parts: list[tuple[str, str | bytes]] = []
        self.complete = False
        self._max_part_bytes = max_part_bytes

    def on_part_begin(self) -> None:
        if len(self.parts) == MAX_PARTS:
            raise _broken(f"it has more than {MAX_PARTS} parts")
        self._headers: dict[bytes, bytes] = {}
        self._header, self._value = bytearray(), bytearray()
        self._data = bytearray()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def on_headers_finished(self) -> None:
        options = parse_options_header(self._headers.get(b"content-disposition"))[1]
        if b"name" not in options:
            raise _broken("a part has no name")
        self._name = options[b"name"].decode(errors="replace")
        self._filename = options.get(b"filename")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if len(self._data) + end - start > self._max_part_bytes:
            raise too_large(self._name, self._max_part_bytes)
        self._data += data[start:end]

    def on_part_end(self) -> None:
        data = bytes(self._data)
        if self._filename == b"" == data:  # how browsers send a file input that was left empty
            return
        try:
            self.parts.append((self._name, data.decode() if self._filename is None else data))
        except UnicodeDecodeError as error:
            raise APIError(400, f"Invalid '{self._name}': not UTF-8 text", param=self._name) from error

    def on_end(self) -> None:
        self.complete = True


def too_large(name: str, limit: int) -> APIError:
    """A 413 for the field `name`, as the client wrote it but without brackets."""
    param = name.partition("[")[0]
    message = f"'{param}' is larger than {limit / 10**6:g} MB"
    return APIError(413, message, param=param, code="file_too_large")
