"""An engine and a state actor in memory, which make real files of random pixels, and a server over them.

They keep the promises of `deployments.interfaces` as far as HTTP can tell: one job at a time, closing frees the engine
within a step, a deleted video is gone.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import uvicorn

from configs.model_family import Match, ModelCard, ModelFamily, SamplingDefaults
from configs.server_args import ServerArgs
from deployments.errors import APIError, not_found
from deployments.ingress import create_app
from deployments.interfaces import (
    Content,
    LoadedLoRA,
    LoRARequest,
    LoRAStatus,
    Variant,
    Video,
    VideoPage,
    VideoStatus,
)
from pipelines.job import Event, Job, LoRASpec, Media, Output, Preview, Progress, Result, Task
from pipelines.media import Frame, encode_image, encode_spritesheet, encode_thumbnail, encode_video

STEP_SECONDS = 0.002


class StandInEngine:
    def __init__(self, card: ModelCard):
        self._card = card
        self._gang = asyncio.Lock()

    async def card(self) -> ModelCard:
        return self._card

    async def ready(self) -> None:
        return

    async def generate(self, job: Job, media: Media, *, progress: bool) -> AsyncGenerator[Event, None]:
        assert set(media) == {*job.images, *([job.mask] if job.mask else [])}
        async with self._gang:
            total = job.num_inference_steps * len(job.seeds)
            previews = 0
            for step in range(1, total + 1):
                await asyncio.sleep(STEP_SECONDS)
                if progress:
                    yield Progress(step, total)
                if previews < job.partial_images:
                    frame = next(_frames(job, job.seeds[0]))
                    yield Preview(previews, encode_image(frame, job.output_format, job.output_compression))
                    previews += 1
            yield Result(tuple(_output(job, seed) for seed in job.seeds), {"denoise": total * STEP_SECONDS})


def _frames(job: Job, seed: int) -> Iterator[Frame]:
    source = repr((job.prompt, job.negative_prompt, job.images, job.mask, job.lora, seed)).encode()
    generator = np.random.default_rng(list(sha256(source).digest()))
    for _ in range(job.num_frames):
        yield generator.integers(0, 256, (job.height, job.width, 3), np.uint8)


def _output(job: Job, seed: int) -> Output:
    if not job.task.is_video:
        return Output(encode_image(next(_frames(job, seed)), job.output_format, job.output_compression))
    frames = list(_frames(job, seed))
    return Output(encode_video(frames, job.fps), encode_thumbnail(frames[0]), encode_spritesheet(frames))


class StandInState:
    def __init__(self, engine: StandInEngine):
        self._engine = engine
        self._videos: dict[str, Video] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._by_idempotency_key: dict[str, str] = {}
        self._files: dict[str, bytes] = {}
        self._adapters: dict[str, LoadedLoRA] = {}
        self._set: tuple[LoRASpec, ...] = ()
        self._merged = False

    async def create_video(self, job: Job, media: Media, model: str, idempotency_key: str | None = None) -> Video:
        if idempotency_key in self._by_idempotency_key:
            return self._videos[self._by_idempotency_key[idempotency_key]]
        if idempotency_key:
            self._by_idempotency_key[idempotency_key] = job.id
        self._videos[job.id] = Video(job, model, VideoStatus.QUEUED, 0, int(time.time()))
        self._tasks[job.id] = asyncio.create_task(self._make(job, media))
        return self._videos[job.id]

    async def _make(self, job: Job, media: Media) -> None:
        async with aclosing(self._engine.generate(job, media, progress=True)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    self._update(job.id, status=VideoStatus.IN_PROGRESS, progress=99 * event.step // event.total)
                if isinstance(event, Result):
                    for index, output in enumerate(event.outputs):
                        self._files[f"/secret/folder/{job.id}-video-{index}"] = output.data
                        self._files[f"/secret/folder/{job.id}-thumbnail-{index}"] = output.thumbnail or b""
                        self._files[f"/secret/folder/{job.id}-spritesheet-{index}"] = output.spritesheet or b""
        self._update(job.id, status=VideoStatus.COMPLETED, progress=100, completed_at=int(time.time()))

    def _update(self, video_id: str, **changes: object) -> None:
        self._videos[video_id] = replace(self._videos[video_id], **changes)  # type: ignore[arg-type]

    async def get_video(self, video_id: str) -> Video:
        if video_id not in self._videos:
            raise not_found("video", video_id)
        return self._videos[video_id]

    async def list_videos(self, after: str | None, limit: int, order: str) -> VideoPage:
        ids = list(self._videos) if order == "asc" else list(self._videos)[::-1]
        if after is not None:
            ids = ids[ids.index((await self.get_video(after)).job.id) + 1 :]
        return VideoPage(tuple(self._videos[name] for name in ids[:limit]), has_more=len(ids) > limit)

    async def delete_video(self, video_id: str) -> None:
        await self.get_video(video_id)
        self._tasks.pop(video_id).cancel()
        del self._videos[video_id]

    async def video_content(self, video_id: str, variant: Variant, index: int = 0) -> Content:
        if (await self.get_video(video_id)).status is not VideoStatus.COMPLETED:
            raise APIError(404, "Generation is still in-progress", code="video_not_ready")
        kind = {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/jpeg"}[variant]
        return self._content(f"/secret/folder/{video_id}-{variant}-{index}", kind, f"{video_id}.mp4")

    async def store_image(self, job: Job, outputs: Sequence[bytes]) -> None:
        for index, data in enumerate(outputs):
            self._files[f"/secret/folder/{job.id}-{index}"] = data

    async def image_content(self, image_id: str, index: int = 0) -> Content:
        return self._content(f"/secret/folder/{image_id}-{index}", "image/png", f"{image_id}.png")

    def _content(self, key: str, media_type: str, filename: str) -> Content:
        if key not in self._files:
            raise not_found("image", filename)
        return Content(key, len(self._files[key]), media_type, filename)

    async def read(self, key: str, offset: int, length: int) -> bytes:
        return self._files[key][offset : offset + length]

    async def set_lora(self, requests: Sequence[LoRARequest]) -> LoRAStatus:
        wanted = await self.lora_for_job(requests)
        if self._merged and {a.nickname for a in wanted} != {a.nickname for a in self._set}:
            merged = ", ".join(adapter.nickname for adapter in self._set)
            raise APIError(409, f"'{merged}' is merged: POST /v1/unmerge_lora_weights first", code="lora_merged")
        self._set, self._merged = wanted, True
        return await self.list_loras()

    async def merge_lora(self, strength: float | None = None, target: tuple[str, ...] | None = None) -> LoRAStatus:
        if not self._set:
            raise APIError(400, "No adapter was set", code="no_lora_set")
        changes = {name: value for name, value in (("strength", strength), ("target", target)) if value is not None}
        self._set, self._merged = tuple(adapter.model_copy(update=changes) for adapter in self._set), True
        return await self.list_loras()

    async def unmerge_lora(self, target: tuple[str, ...] | None = None) -> LoRAStatus:
        self._merged = False
        return await self.list_loras()

    async def list_loras(self) -> LoRAStatus:
        return LoRAStatus(
            tuple(self._adapters.values()), self._set, self._merged, {"only": self._set if self._merged else ()}
        )

    async def lora_for_job(self, requests: Sequence[LoRARequest] | None) -> tuple[LoRASpec, ...]:
        if requests is None:
            return self._set if self._merged else ()
        return tuple(self._load(request) for request in requests)

    def _load(self, request: LoRARequest) -> LoRASpec:
        if request.path is not None:
            if not Path(request.path).is_file():
                raise APIError(404, f"There is no adapter at '{request.path}'", param="lora_path")
            self._adapters[request.nickname] = LoadedLoRA(request.nickname, request.path, 1, 1)
        if request.nickname not in self._adapters:
            raise APIError(404, f"Adapter '{request.nickname}' is not loaded: give its path", param="lora_nickname")
        path = self._adapters[request.nickname].path
        return LoRASpec(nickname=request.nickname, identity=path, strength=request.strength, target=request.target)


def model_card(name: str, tasks: Sequence[Task], parameters: Sequence[str], **defaults: int) -> ModelCard:
    family = ModelFamily(
        name=name,
        match=Match(pipelines=()),
        tasks={task.value: "AnyPipeline" for task in tasks},
        parameters=frozenset(parameters),
        defaults=SamplingDefaults(num_inference_steps=4, **defaults),
        max_images=2,
    )
    return ModelCard(
        id=f"stand-in/{name}",
        pipeline_class="AnyPipeline",
        family=family,
        dtype="fp32",
        device="cpu",
        num_gpus=1,
        created=int(time.time()),
    )


@contextmanager
def stand_in_server(card: ModelCard, port: int, public_url: str | None = None) -> Iterator[None]:
    engine = StandInEngine(card)
    app = create_app(ServerArgs(public_url=public_url), engine, StandInState(engine))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join()
