"""`/v1/images`: images from prompts and from other images, in one response or streamed."""

from __future__ import annotations

import time
from base64 import b64encode
from contextlib import aclosing
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response

from deployments.api.authentication import Known
from deployments.api.body import read_fields
from deployments.api.content import content_response
from deployments.api.disconnect import cancelled_on_disconnect
from deployments.api.event_stream import EventStream, Frames
from deployments.api.jobs import Submission, image_submission, require_right_to_load
from deployments.api.keys import Caller
from deployments.api.openapi import JSON, MULTIPART, errors, event_stream, files, request_body
from deployments.api.protocol.requests import ImageEditRequest, ImageGenerationRequest, ImageRequest
from deployments.api.protocol.responses import CompletedImageEvent, ImageData, ImagesResponse, PartialImageEvent
from deployments.api.services import Served, Services
from deployments.errors import APIError
from pipelines.job import Preview, Progress, Result

router = APIRouter(prefix="/v1/images", tags=["Images"])

_RESPONSES = {
    200: {"model": ImagesResponse, "content": event_stream()},
    **errors(400, 403, 404, 409, 413, 429, 500, 503, 504),
}


@router.post("/generations", responses=_RESPONSES, openapi_extra=request_body(ImageGenerationRequest, JSON))
async def create_image(request: Request, services: Served, caller: Known) -> Response:
    """Generate images from a prompt."""
    wanted = ImageGenerationRequest.parse(await read_fields(request))
    if wanted.response_format == "url":
        raise APIError(
            400,
            "response_format=url is not supported for POST /v1/images/generations; images come as b64_json",
            param="response_format",
            code="invalid_value",
        )
    return await _respond(request, services, caller, wanted, "image_generation")


@router.post("/edits", responses=_RESPONSES, openapi_extra=request_body(ImageEditRequest, MULTIPART, JSON))
async def edit_image(request: Request, services: Served, caller: Known) -> Response:
    """Generate images from a prompt and one or several images, within a mask if there is one."""
    card = await services.engine.card()
    fields = await read_fields(
        request,
        max_images=card.family.max_images + 1,  # the mask
        max_image_bytes=services.args.max_upload_bytes,
    )
    wanted = ImageEditRequest.parse(fields)
    return await _respond(request, services, caller, wanted, "image_edit")


@router.head("/{image_id}/content", include_in_schema=False)
@router.get(
    "/{image_id}/content",
    responses={**files("image/png", "image/webp", "image/jpeg"), **errors(400, 404, 416)},
)
async def image_content(
    request: Request,
    image_id: str,
    services: Served,
    caller: Known,
    variant: Annotated[int, Query(ge=0, description="Which of several images, from 0.")] = 0,
) -> Response:
    """Download an image that was made with `response_format` `url`."""
    content = await services.state.image_content(image_id, variant, caller.tenant)
    return await content_response(request, services.state, content)


async def _respond(
    request: Request,
    services: Services,
    caller: Caller,
    wanted: ImageRequest,
    event: Literal["image_generation", "image_edit"],
) -> Response:
    if wanted.stream and wanted.response_format == "url":
        raise APIError(400, "A stream carries b64_json, not urls", param="response_format", code="invalid_value")
    require_right_to_load(caller, wanted.lora, services.args)
    submission = await image_submission(wanted, services)
    if wanted.stream:
        return EventStream(_frames(services, submission, event))
    async with cancelled_on_disconnect(request.receive):
        result = await _result(services, submission)
    images = await _images(services, caller, submission, result, wanted.response_format)
    job = submission.job
    body = ImagesResponse(
        id=job.id,
        created=int(time.time()),
        output_format=job.output_format,
        size=f"{job.width}x{job.height}",
        data=images,
        timings=dict(result.seconds),
    )
    return Response(body.model_dump_json(exclude_none=True), media_type=JSON)


async def _result(services: Services, submission: Submission) -> Result:
    async with aclosing(services.engine.generate(submission.job, submission.media, progress=False)) as events:
        async for event in events:
            if isinstance(event, Result):
                return event
    raise RuntimeError(f"the engine ended job {submission.job.id} without a result")


async def _images(
    services: Services,
    caller: Caller,
    submission: Submission,
    result: Result,
    response_format: Literal["b64_json", "url"],
) -> list[ImageData]:
    job = submission.job
    if response_format == "b64_json":
        return [
            ImageData(b64_json=b64encode(output.data).decode(), seed=seed)
            for output, seed in zip(result.outputs, job.seeds, strict=True)
        ]
    await services.state.store_image(job, [output.data for output in result.outputs], caller.tenant)
    url = f"{(services.args.public_url or '').rstrip('/')}/v1/images/{job.id}/content"
    if len(job.seeds) == 1:
        return [ImageData(url=url, seed=job.seeds[0])]
    return [ImageData(url=f"{url}?variant={index}", seed=seed) for index, seed in enumerate(job.seeds)]


async def _frames(
    services: Services, submission: Submission, name: Literal["image_generation", "image_edit"]
) -> Frames:
    """The job's events as a client sees them; denoising steps become comments, which keep the connection alive."""
    job = submission.job
    size = f"{job.width}x{job.height}"
    async with aclosing(services.engine.generate(job, submission.media, progress=True)) as events:
        async for event in events:
            match event:
                case Progress(step, total):
                    yield f"step {step} of {total}"
                case Preview(index, data):
                    yield PartialImageEvent(
                        type=f"{name}.partial_image",
                        b64_json=b64encode(data).decode(),
                        created_at=int(time.time()),
                        output_format=job.output_format,
                        size=size,
                        partial_image_index=index,
                    )
                case Result(outputs):
                    for output, seed in zip(outputs, job.seeds, strict=True):
                        yield CompletedImageEvent(
                            type=f"{name}.completed",
                            b64_json=b64encode(output.data).decode(),
                            created_at=int(time.time()),
                            output_format=job.output_format,
                            size=size,
                            seed=seed,
                        )
