"""A video to store, and ways to wait for its outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import ray

from configs.server_args import ServerArgs
from deployments.clients import StateClient
from deployments.interfaces import Video, VideoStatus
from deployments.names import STATE_ACTOR
from deployments.state.state import State
from pipelines.job import Job, Task, content_key

PHOTO = b"a photo of a lighthouse"
INPUTS = {content_key(PHOTO): PHOTO}

MAX_ATTEMPTS = 3
"""As set by the fixture `args`."""

VIDEO_1_FILES = {"videos/video_1-0.mp4", "videos/video_1-0.webp", "videos/video_1-0.jpg"}


def a_job(video_id: str = "video_1", **fields) -> Job:
    return Job(
        **{
            "id": video_id,
            "task": Task.IMAGE_TO_VIDEO,
            "prompt": "waves",
            "width": 64,
            "height": 64,
            "num_inference_steps": 4,
            "seeds": (7,),
            "images": tuple(INPUTS),
            "output_format": "mp4",
        }
        | fields
    )


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def until_the_state_actor_is_gone() -> None:
    await until(lambda: not any(named["name"] == STATE_ACTOR for named in ray.util.list_named_actors(True)))


async def finished(state: State | StateClient, video_id: str = "video_1") -> Video:
    async with asyncio.timeout(20):
        while (video := await state.get_video(video_id)).status in (VideoStatus.QUEUED, VideoStatus.IN_PROGRESS):
            await asyncio.sleep(0.005)
    return video


async def reaches(state: State, progress: int, video_id: str = "video_1") -> None:
    async with asyncio.timeout(20):
        while (await state.get_video(video_id)).progress < progress:
            await asyncio.sleep(0.005)


def files(args: ServerArgs) -> set[str]:
    root = Path(args.output_path)
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def assert_never_goes_back(seen: list[Video]) -> None:
    order = [VideoStatus.QUEUED, VideoStatus.IN_PROGRESS, VideoStatus.COMPLETED]
    positions = [(order.index(video.status), video.progress) for video in seen]
    assert positions == sorted(positions)
