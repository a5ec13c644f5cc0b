"""What the server remembers: its videos, its stored images and the adapters that it knows.

It imports neither torch nor model code. All it knows is on disk, so it may be killed at any time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from configs.server_args import ServerArgs
from deployments import log
from deployments.errors import APIError
from deployments.interfaces import (
    AdapterLoader,
    Composition,
    Content,
    Engine,
    LoRARequest,
    LoRAStatus,
    Variant,
    Video,
    VideoError,
    VideoPage,
    VideoStatus,
)
from deployments.state.adapters import AdapterRegistry
from deployments.state.content import ContentStore, image_key, input_key
from deployments.state.default_lora import DefaultLoRA
from deployments.state.metrics import StateMetrics
from deployments.state.records import Records
from deployments.state.retention import Retention
from deployments.state.storage import Storage
from deployments.state.video_runner import VideoRunner
from pipelines.job import Job, LoRASpec, Media

logger = logging.getLogger(__name__)

MEASURE_SECONDS = 5.0
"""Interval between sums of all that is stored; a sum takes 10 ms for 100,000 files."""

RELOAD_DELAY_S = 1.0
"""Between two attempts to read the default adapter again after a restart, while there is no engine."""

RELOAD_PATIENCE_S = 3.0
"""How long a new job waits for that. Without an engine it then gets the default as it was, which is the same unless the
file has changed."""

RETRY_AFTER_SECONDS = "10"
"""Sent to a client whose video finds the queue full; OpenAI's clients wait that long, and retry twice."""


class ServedEngine(Engine, AdapterLoader, Protocol):
    """What the state actor needs from the engine: to compute videos and to read adapters."""


class State:
    """`interfaces.State` by delegation: records to `Records`, files to `ContentStore`, work to `VideoRunner`,
    adapters to `AdapterRegistry` and `DefaultLoRA`.

    Plain asyncio, without Ray; `deployments.state.actor` turns it into an actor.
    """

    def __init__(self, args: ServerArgs, engine: Callable[[], ServedEngine]):
        """Resume, in the running event loop, all work that an earlier process left unfinished.

        `engine` is called in this process whenever the engine is needed; it may raise `APIError` 503.
        """
        self._args = args
        self._records = Records(args.state_path, ttl_s=args.video_ttl)
        self._videos = self._records.videos
        self._content = ContentStore(self._records.files, self._records.images, Storage(args.output_path))
        self._adapters = AdapterRegistry(engine, cache_bytes=args.lora_cache_bytes)
        self._default_lora = DefaultLoRA(self._adapters, switch=args.lora_switch)
        self._runner = VideoRunner(
            self._videos,
            self._content,
            engine,
            max_retries=args.max_retries,
            num_replicas=lambda: self._default_lora.num_replicas,
        )
        self._max_unfinished = args.max_queue
        self._content.sweep()
        for video in self._videos.unfinished():
            with log.about(video.job.id):
                logger.info("taken up again")
                self._runner.start(video.job)
        retention = Retention(self._records, self._content, ttl_s=args.video_ttl, max_bytes=args.storage_bytes)
        self._retention = asyncio.create_task(retention.enforce())
        self._measuring = asyncio.create_task(self._measure_stored_bytes())
        self._recalling_adapters = asyncio.create_task(self._recall_adapters())
        self._setting_startup_adapter = asyncio.create_task(self._set_startup_adapter())
        self._reloading_default = asyncio.create_task(self._reload_default())

    async def close(self) -> None:
        """Stop working and release the files. The next `State` on the same paths continues."""
        self._recalling_adapters.cancel()
        self._setting_startup_adapter.cancel()
        self._reloading_default.cancel()
        background = (self._retention, self._measuring)
        for task in background:
            task.cancel()
        await asyncio.wait(background)
        await self._runner.stop_all()
        self._records.close()

    async def _measure_stored_bytes(self) -> None:
        metrics = StateMetrics()
        while True:
            metrics.stored_bytes.set(self._records.files.num_bytes())
            await asyncio.sleep(MEASURE_SECONDS)

    async def create_video(
        self, job: Job, media: Media, model: str, idempotency_key: str | None = None, tenant: str | None = None
    ) -> Video:
        if video := self._videos.find(job.id, idempotency_key, tenant):
            return video
        self._demand_room()
        inputs = {input_key(job.id, name): data for name, data in media.items()}
        await self._content.write(inputs)
        try:
            self._demand_room()  # others may have taken it meanwhile
        except APIError:
            await self._content.discard(inputs)
            raise
        video = self._videos.create(job, model, idempotency_key, inputs, tenant)
        if video.job.id == job.id:
            if job.lora:  # their nicknames may have been deleted meanwhile
                self._note_adapters()
            with log.about(job.id):
                logger.info("queued")
                self._runner.start(job)
        else:  # another call with the same idempotency key was faster
            await self._content.discard(inputs)
        return video

    def _demand_room(self) -> None:
        if self._videos.count_unfinished() >= self._max_unfinished:
            raise APIError(
                429,
                f"{self._max_unfinished} videos are unfinished already; try again when one is done.",
                code="queue_full",
                headers={"Retry-After": RETRY_AFTER_SECONDS},
            )

    async def get_video(self, video_id: str, tenant: str | None = None) -> Video:
        return self._videos.get(video_id, tenant)

    async def list_videos(
        self, after: str | None, limit: int, order: Literal["asc", "desc"], tenant: str | None = None
    ) -> VideoPage:
        return self._videos.page(after, limit, order, tenant)

    async def cancel_video(self, video_id: str, tenant: str | None = None) -> Video:
        self._videos.get(video_id, tenant)
        await self._runner.stop(video_id)
        if not self._videos.get(video_id).finished:
            error = VideoError("cancelled", "The video was cancelled")
            await self._content.discard(self._videos.transition(video_id, VideoStatus.FAILED, error=error, files=()))
            with log.about(video_id):
                logger.info("cancelled")
        return self._videos.get(video_id)

    async def delete_video(self, video_id: str, tenant: str | None = None) -> None:
        self._videos.get(video_id, tenant)
        await self._runner.stop(video_id)
        await self._content.discard(self._videos.delete(video_id))
        with log.about(video_id):
            logger.info("deleted")

    async def video_content(
        self, video_id: str, variant: Variant, index: int = 0, tenant: str | None = None
    ) -> Content:
        video = self._videos.get(video_id, tenant)
        if video.error is not None:
            raise APIError(404, f"Generation failed: {video.error.message}", code=video.error.code)
        if video.status is not VideoStatus.COMPLETED:
            raise APIError(404, "Generation is still in progress", code="video_not_ready")
        return await self._content.video(video_id, len(video.job.seeds), variant, index)

    async def store_image(self, job: Job, outputs: Sequence[bytes], tenant: str | None = None) -> None:
        files = {image_key(job.id, index, job.output_format): data for index, data in enumerate(outputs)}
        await self._content.write(files)
        self._records.images.add(job.id, job.output_format, files, tenant)

    async def image_content(self, image_id: str, index: int = 0, tenant: str | None = None) -> Content:
        return await self._content.image(image_id, index, tenant)

    async def read(self, key: str, offset: int, length: int) -> bytes:
        return await self._content.read(key, offset, length)

    async def _recall_adapters(self) -> None:
        """Restore the adapters of an earlier process. What was merged into another model stays out of this one."""
        if known := self._records.notes.read("adapters"):
            self._adapters.restore(known)
            if known.get("model", self._args.model_path) == self._args.model_path:
                await self._default_lora.restore(known)

    async def _set_startup_adapter(self) -> None:
        """Make the startup adapter the default, if it is due."""
        await self._recalling_adapters
        if self._startup_adapter_is_due:
            args = self._args
            await self._default_lora.unmerge_lora()
            await self._default_lora.set_lora([LoRARequest(args.lora_nickname, str(args.lora_path), args.lora_scale)])
            self._note_adapters()
            self._forget_startup_adapter()

    async def _reload_default(self) -> None:
        """Read the default of an earlier process from its files as they are now, as soon as an engine can."""
        await self._recalling_adapters
        while not self._startup_adapter_is_due:
            before = self._default_lora.snapshot()
            try:
                await self._default_lora.reload()
            except APIError:
                await asyncio.sleep(RELOAD_DELAY_S)
                continue
            if self._default_lora.snapshot() != before:
                self._note_adapters()
            return

    @property
    def _startup_adapter_is_due(self) -> bool:
        """Whether there is one that neither an earlier process has merged nor a client has overridden."""
        return self._args.lora_path is not None and self._records.notes.read("startup adapter") != self._startup_adapter

    @property
    def _startup_adapter(self) -> list[Any]:
        """As it is noted in the records."""
        return [self._args.model_path, self._args.lora_nickname, self._args.lora_path, self._args.lora_scale]

    def _forget_startup_adapter(self) -> None:
        """Note that it was merged or a client has chosen otherwise: a restart keeps the current default."""
        if self._args.lora_path is not None:
            self._records.notes.write("startup adapter", self._startup_adapter)

    def _note_adapters(self) -> None:
        of_jobs = {spec.identity for video in self._videos.unfinished() for spec in video.job.lora}
        adapters = self._adapters.snapshot(of_jobs | self._default_lora.identities)
        known = {"model": self._args.model_path, **adapters, **self._default_lora.snapshot()}
        self._records.notes.write("adapters", known)

    async def adapters_open(self) -> None:
        """Return once the startup adapter is merged, if it is due. If that has failed, it is retried: the reason may
        have passed.

        Raises:
            APIError: it cannot be merged.
        """
        if self._setting_startup_adapter.done() and self._setting_startup_adapter.exception():
            self._setting_startup_adapter = asyncio.create_task(self._set_startup_adapter())
        await asyncio.shield(self._setting_startup_adapter)

    async def set_lora(self, requests: Sequence[LoRARequest]) -> LoRAStatus:
        await self._recalling_adapters
        status = await self._default_lora.set_lora(requests)
        self._note_adapters()
        self._forget_startup_adapter()
        return status

    async def merge_lora(self, strength: float | None = None, target: tuple[str, ...] | None = None) -> LoRAStatus:
        await self._recalling_adapters
        status = await self._default_lora.merge_lora(strength, target)
        self._note_adapters()
        return status

    async def unmerge_lora(self, target: tuple[str, ...] | None = None) -> LoRAStatus:
        await self._recalling_adapters
        status = await self._default_lora.unmerge_lora(target)
        self._note_adapters()
        self._forget_startup_adapter()
        return status

    async def delete_lora(self, nickname: str) -> LoRAStatus:
        await self._recalling_adapters
        status = await self._default_lora.delete_lora(nickname)
        self._note_adapters()
        return status

    async def list_loras(self) -> LoRAStatus:
        await self._recalling_adapters
        return self._default_lora.status()

    async def lora_for_job(self, requests: Sequence[LoRARequest] | None) -> tuple[LoRASpec, ...]:
        """Jobs that use adapters wait for the startup adapter, if any, or fail with the reason it cannot be merged."""
        if requests is not None and not requests:
            return ()
        await self.adapters_open()
        if requests is None:
            await asyncio.wait([self._reloading_default], timeout=RELOAD_PATIENCE_S)
            return self._default_lora.composition
        before = self._adapters.changes
        specs = await self._adapters.for_job(requests)
        if self._adapters.changes != before:
            self._note_adapters()
        return specs

    async def lora_factors(self, identity: str) -> Any:
        """What a rank needs to merge an adapter, by reference."""
        return await self._adapters.factors(identity)

    async def watch_default(self, replica_id: str, known_version: int | None) -> tuple[int, Composition]:
        return await self._default_lora.watch_default(replica_id, known_version)

    async def report_merged(
        self, replica_id: str, version: int, composition: Composition, error: str | None, num_bytes_held: int
    ) -> None:
        await self._default_lora.report_merged(replica_id, version, composition, error, num_bytes_held)
