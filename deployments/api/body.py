"""Request bodies of any encoding as one dictionary of fields.

Clients differ: OpenAI's send multipart for every video and JSON for images, curl labels whatever `-d` carries as
urlencoded, LiteLLM puts structures into form fields as JSON text. So JSON is recognised by its first character, and
forms may nest as the SDKs nest them: `image[]`, `input_reference[image_url]`, `lora[][nickname]`.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request
from pydantic_core import from_json

from deployments.api.multipart import MAX_PARTS, read_multipart
from deployments.errors import APIError

Fields = dict[str, Any]
"""JSON values; from forms, strings and bytes (files)."""

MAX_TEXT_BYTES = 2**20
"""Limit for all fields but images together: a prompt of 32,000 characters is at most 128 KB."""

_FIELD_NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\]){0,4})")


async def read_fields(request: Request, *, max_images: int = 0, max_image_bytes: int = 0) -> Fields:
    """The fields of the body, which may carry `max_images` images of `max_image_bytes` each; empty without a body.

    Raises:
        APIError: 400 for a body that cannot be parsed, 413 for one that is too large.
    """
    chunks = _limited(request.stream(), MAX_TEXT_BYTES + max_images * max_image_bytes * 4 // 3)  # base64 takes 4/3
    content_type = request.headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    if kind.startswith("multipart/"):
        # Text parts have the same limit as files, because an image may be sent as text: a data URL.
        max_part_bytes = max(MAX_TEXT_BYTES, max_image_bytes)
        return _nested(await read_multipart(chunks, content_type, max_part_bytes=max_part_bytes))
    body = b"".join([chunk async for chunk in chunks]).strip()
    if not body:
        return {}
    if kind == "application/x-www-form-urlencoded" and not body.startswith((b"{", b"[")):
        return _nested(_form_fields(body))
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise APIError(400, f"The request body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise APIError(400, "The request body must be a JSON object", code="invalid_json")
    return fields


def _form_fields(body: bytes) -> list[tuple[str, str]]:
    """Fields of a urlencoded form. The limit excludes images: decoding percent codes takes a second per 5 MB."""
    if len(body) > MAX_TEXT_BYTES:
        raise _too_large(MAX_TEXT_BYTES)
    try:
        return parse_qsl(body.decode(errors="replace"), keep_blank_values=True, max_num_fields=MAX_PARTS)
    except ValueError:
        raise APIError(400, f"The form has more than {MAX_PARTS} fields", code="invalid_form") from None


def _too_large(limit: int) -> APIError:
    return APIError(413, f"The request body is larger than {limit} bytes", code="request_too_large")


async def _limited(chunks: AsyncIterator[bytes], limit: int) -> AsyncIterator[bytes]:
    """The chunks, counted as they arrive: a declared Content-Length is neither required nor trusted."""
    received = 0
    async for chunk in chunks:
        received += len(chunk)
        if received > limit:
            raise _too_large(limit)
        yield chunk


def _nested(pairs: Iterable[tuple[str, str | bytes]]) -> Fields:
    fields: Fields = {}
    for name, value in pairs:
        match = _FIELD_NAME.fullmatch(name)
        if match is None:
            raise APIError(400, f"'{name}' is not a field name", param=name, code="invalid_value")
        head, brackets = match.groups()
        _insert(fields, [head, *brackets[1:-1].split("][")] if brackets else [head], value)
    return fields


def _insert(fields: Fields, path: list[str], value: str | bytes) -> None:
    """Set one form value. In `path`, an empty name marks the one before it as a list."""
    name, *rest = path
    if not rest:  # a repeated field is a list too
        fields[name] = value if name not in fields else [*_as_list(fields[name]), value]
    elif rest[0]:
        inner = fields.setdefault(name, {})
        if not isinstance(inner, dict):
            raise APIError(400, f"'{name}' is given both as a value and as an object", param=name, code="invalid_value")
        _insert(inner, rest, value)
    else:
        items = fields[name] = _as_list(fields.get(name, []))
        if len(rest) == 1:
            items.append(value)
            return
        # A repeated `lora[][nickname]` starts the next object; a repeated `lora[][target][]` extends this one.
        if not items or not isinstance(items[-1], dict) or (len(rest) == 2 and rest[1] in items[-1]):
            items.append({})
        _insert(items[-1], rest[1:], value)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
