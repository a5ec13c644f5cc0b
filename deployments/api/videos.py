"""`/v1/videos`: videos as jobs that are created, polled, downloaded and deleted."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from fastapi import APIRouter, Header, Query, Request, Response

from deployments.api.authentication import Known
from deployments.api.body import read_fields
from deployments.api.content import content_response
from deployments.api.jobs import require_right_to_load, video_submission
from deployments.api.openapi import JSON, MULTIPART, URLENCODED, errors, files, request_body
from deployments.api.protocol.requests import VideoRequest
from deployments.api.protocol.responses import DeletedVideo, VideoErrorObject, VideoList, VideoObject
from deployments.api.services import Served
from deployments.errors import APIError
from deployments.interfaces import Variant, Video

router = APIRouter(prefix="/v1/videos", tags=["Videos"])

POLL_AFTER_MS = 1000
"""Poll interval suggested to clients while a video is unfinished; OpenAI's own SDKs use 1 s by default."""


@router.post(
    "",
    responses=errors(400, 403, 404, 409, 413, 429, 500, 503),
    openapi_extra=request_body(VideoRequest, MULTIPART, JSON, URLENCODED),
)
async def create_video(
    request: Request,
    services: Served,
    caller: Known,
    idempotency_key: Annotated[
        str | None, Header(max_length=255, description="Requests with the same key give the same video; none if empty.")
    ] = None,
) -> VideoObject:
    """Start making a video from a prompt, and from an image if one is given."""
    fields = await read_fields(request, max_images=1, max_image_bytes=services.args.max_upload_bytes)
    wanted = VideoRequest.parse(fields)
    require_right_to_load(caller, wanted.lora, services.args)
    submission = await video_submission(wanted, services)
    card = await services.engine.card()
    video = await services.state.create_video(
        submission.job, submission.media, card.id, idempotency_key or None, caller.tenant
    )
    return _object(video)


@router.get("", responses=errors(400, 404))
async def list_videos(
    services: Served,
    caller: Known,
    after: Annotated[str | None, Query(description="The last id of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="By time of creation.")] = "desc",
) -> VideoList:
    """List the caller's videos, page by page."""
    page = await services.state.list_videos(after, limit, order, caller.tenant)
    data = [_object(video) for video in page.videos]
    return VideoList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.has_more,
    )


@router.get("/{video_id}", responses=errors(404))
async def get_video(video_id: str, services: Served, caller: Known, response: Response) -> VideoObject:
    """Report the status and progress of a video."""
    video = await services.state.get_video(video_id, caller.tenant)
    if not video.finished:
        response.headers["openai-poll-after-ms"] = str(POLL_AFTER_MS)
    return _object(video)


@router.post("/{video_id}/cancel", responses=errors(404))
async def cancel_video(video_id: str, services: Served, caller: Known) -> VideoObject:
    """Stop making a video, within a denoising step. It stays listed as failed, with the error code `cancelled`; a
    finished one stays as it is."""
    return _object(await services.state.cancel_video(video_id, caller.tenant))


@router.delete("/{video_id}", responses=errors(404))
async def delete_video(video_id: str, services: Served, caller: Known) -> DeletedVideo:
    """Delete a video and its files. One that is being made is stopped within a denoising step."""
    await services.state.delete_video(video_id, caller.tenant)
    return DeletedVideo(id=video_id)


@router.head("/{video_id}/content", include_in_schema=False)
@router.get(
    "/{video_id}/content", responses={**files("video/mp4", "image/webp", "image/jpeg"), **errors(400, 404, 416)}
)
async def video_content(
    request: Request,
    video_id: str,
    services: Served,
    caller: Known,
    variant: Annotated[
        str, Query(description="`video`, `thumbnail`, `spritesheet`, or the number of an output, from 0.")
    ] = "video",
    index: Annotated[int, Query(ge=0, description="Which of several outputs, from 0.")] = 0,
) -> Response:
    """Download a finished video, its first frame as a WebP, or a JPEG grid of its frames."""
    kind, clip = _variant(variant, index)
    content = await services.state.video_content(video_id, kind, clip, caller.tenant)
    return await content_response(request, services.state, content)


def _variant(variant: str, index: int) -> tuple[Variant, int]:
    for kind in get_args(Variant):
        if variant == kind:
            return kind, index
    if variant.isdecimal() and len(variant) < 3:
        return "video", int(variant)
    message = f"Invalid 'variant': '{variant}' is neither video, thumbnail or spritesheet nor the number of an output"
    raise APIError(400, message, param="variant", code="invalid_value")


def _object(video: Video) -> VideoObject:
    job = video.job
    return VideoObject(
        id=job.id,
        model=video.model,
        status=video.status.value,
        progress=video.progress,
        created_at=video.created_at,
        completed_at=video.completed_at,
        expires_at=video.expires_at,
        prompt=job.prompt,
        size=f"{job.width}x{job.height}",
        # Clients parse whole seconds; the exact length is num_frames / fps.
        seconds=str(max(1, round(job.num_frames / job.fps))),
        error=None if video.error is None else VideoErrorObject(code=video.error.code, message=video.error.message),
        n=len(job.seeds),
        seeds=list(job.seeds),
        num_frames=job.num_frames,
        fps=job.fps,
        num_inference_steps=job.num_inference_steps,
        timings=dict(video.timings),
    )
