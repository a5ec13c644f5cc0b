"""The OpenAPI document. Routes read their bodies themselves, in any encoding (see `body.py`); this describes them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from deployments.api.protocol.lora import LoRATargets, MergeLoRA, SetLoRA
from deployments.api.protocol.requests import ImageEditRequest, ImageGenerationRequest, VideoRequest, WireRequest
from deployments.api.protocol.responses import (
    CompletedImageEvent,
    ErrorResponse,
    PartialImageEvent,
)

_REF = "#/components/schemas/{model}"
_REQUESTS = (ImageGenerationRequest, ImageEditRequest, VideoRequest, SetLoRA, MergeLoRA, LoRATargets)
_EVENTS = (PartialImageEvent, CompletedImageEvent)

JSON = "application/json"
MULTIPART = "multipart/form-data"
URLENCODED = "application/x-www-form-urlencoded"


def request_body(model: type[WireRequest], *encodings: str, required: bool = True) -> dict[str, Any]:
    """`openapi_extra` of a route whose body is a `model` in any of these encodings."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": required, "content": {encoding: {"schema": schema} for encoding in encodings}}}


def event_stream() -> dict[str, Any]:
    """`content` of a streamed image response, beside the plain one."""
    return {"text/event-stream": {"schema": {"anyOf": [{"$ref": _REF.format(model=e.__name__)} for e in _EVENTS]}}}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that may fail with these statuses, each in the same envelope."""
    return {status: {"model": ErrorResponse} for status in statuses}


def files(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that returns a file, whole or in part."""
    content = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in media_types}
    return {
        200: {"description": "The file", "content": content},
        206: {"description": "The bytes that `Range` asks for", "content": content},
        304: {"description": "The copy named in `If-None-Match` is current"},
    }


def install(app: FastAPI, *, needs_key: bool) -> None:
    """Make `app` serve its document, with the schemas of all request bodies among the components.

    Without `needs_key` no operation asks for an API key: generated clients would refuse to call without one.
    """

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            _, definitions = models_json_schema(
                [*((model, "validation") for model in _REQUESTS), *((event, "serialization") for event in _EVENTS)],
                ref_template=_REF,
            )
            app.openapi_schema["components"]["schemas"].update(definitions["$defs"])
            # FastAPI documents its own 422 wherever a route has parameters; the server sends the envelope's 400.
            for path in app.openapi_schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
                    if not needs_key:
                        operation.pop("security", None)
            for name in ("HTTPValidationError", "ValidationError"):
                app.openapi_schema["components"]["schemas"].pop(name, None)
            if not needs_key:
                del app.openapi_schema["components"]["securitySchemes"]
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
