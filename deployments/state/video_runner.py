"""Runs video jobs: one asyncio task each, from the first attempt to `completed` or `failed`."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any

from deployments.errors import APIError, too_late
from deployments.interfaces import Engine, VideoError, VideoStatus
from deployments.losses import PROCESS_LOST, cause
from deployments.state.content import ContentStore, input_key, video_files
from deployments.state.videos import VideoRecords
from pipelines.job import InvalidJob, Job, Media, Progress, Result

logger = logging.getLogger(__name__)

_RETRY_DELAY_S = 1.0
"""Pause between attempts: a killed engine replica is back after 10 s."""

VIDEOS_PER_REPLICA = 4
"""How many videos the engine holds per replica; the others wait here, in order of arrival, for the first replica with
room, even one that starts later. More than the two that the YAMLs' autoscaling aims at, or it would not see that videos
wait; few, because videos cannot leave their replica, and keep it from being drained."""

_ENGINE_GRACE_S = 1.0
"""How much longer than a job's timeout an attempt may take. The engine ends a job that it has in time, and counts it;
this is for one that waits for an engine replica to start."""

_ROOM_DELAY_S = 0.2
"""Interval between checks for room at the engine."""


class VideoRunner:
    """Computes jobs on the engine, each in a task of its own, and writes their results.

    `APIError` 429 and 503, the death of the engine and a database that can't be written (a full disk) mean "not now":
    the job waits and is retried. Every other error is the job's own, and fails it.
    """

    def __init__(
        self,
        videos: VideoRecords,
        content: ContentStore,
        engine: Callable[[], Engine],
        *,
        max_retries: int,
        num_replicas: Callable[[], int],
    ):
        """`engine` returns the engine that serves now, or raises `APIError` 503. A job whose computation began 1 +
        `max_retries` times, and ended each time because the server died, fails alone. `num_replicas` returns how many
        replicas of the engine are known; at least one is assumed."""
        self._videos = videos
        self._content = content
        self._engine = engine
        self._max_attempts = 1 + max_retries
        self._num_replicas = num_replicas
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._at_the_engine = 0
        self._next_to_go = asyncio.Lock()

    def start(self, job: Job) -> None:
        """Run the job, unless it is already running."""
        if job.id not in self._tasks:
            task = asyncio.create_task(self._run(job), name=job.id)
            self._tasks[job.id] = task
            task.add_done_callback(lambda _: self._tasks.pop(job.id))

    async def stop(self, video_id: str) -> None:
        """Stop the job, if it runs, and leave its record as it is. On return the engine's iterator is closed, and
        nothing more is written."""
        if task := self._tasks.get(video_id):
            if not task.cancelling():  # a second cancellation would interrupt what the first one waits for
                task.cancel()
            await asyncio.wait([task])

    async def stop_all(self) -> None:
        await asyncio.gather(*(self.stop(video_id) for video_id in self._tasks))

    async def _run(self, job: Job) -> None:
        try:
            if self._videos.attempts(job.id) >= self._max_attempts:
                raise APIError(500, f"Given up after {self._max_attempts} attempts: the server stopped during each")
            async with self._room(job):
                inputs = {*job.images} if job.mask is None else {*job.images, job.mask}
                media = {name: await self._content.read(input_key(job.id, name)) for name in inputs}
                result = await self._compute(job, media)
            files = video_files(job.id, result.outputs)
            await self._finish(job, VideoStatus.COMPLETED, files, timings=result.seconds)
        except Exception as error:
            logger.warning("video %s failed", job.id, exc_info=True)
            await self._finish(job, VideoStatus.FAILED, {}, error=_explain(error))

    @asynccontextmanager
    async def _room(self, job: Job) -> AsyncIterator[None]:
        """Room for one job at the engine, granted in the order of the calls.

        Raises:
            APIError: 504; the job's time is up.
        """
        async with _within(self._seconds_left(job)), self._next_to_go:
            # Polling, because replicas come and go unannounced.
            while self._at_the_engine >= VIDEOS_PER_REPLICA * max(1, self._num_replicas()):  # noqa: ASYNC110
                await asyncio.sleep(_ROOM_DELAY_S)
            self._at_the_engine += 1
        try:
            yield
        finally:
            self._at_the_engine -= 1

    async def _compute(self, job: Job, media: Media) -> Result:
        while True:
            try:
                return await self._attempt(job, media)
            except Exception as error:
                if not _means_not_now(error) or self._videos.attempts(job.id) >= self._max_attempts:
                    raise
                logger.info("video %s waits for the engine: %s", job.id, cause(error))
            await asyncio.sleep(_RETRY_DELAY_S)

    async def _attempt(self, job: Job, media: Media) -> Result:
        """An attempt counts from its step 0, so that a job that merely waits does not pay for another job's crash. The
        engine restarts the job by itself when its ranks die, and gets what is left of the job's time."""
        seconds_left = self._seconds_left(job)
        if seconds_left == 0:
            raise too_late()
        result = None
        longest = None if seconds_left is None else seconds_left + _ENGINE_GRACE_S
        events = self._engine().generate(job.model_copy(update={"timeout": seconds_left}), media, progress=True)
        async with _within(longest), aclosing(events):
            async for event in events:
                if isinstance(event, Progress):
                    if event.step == 0:
                        self._videos.transition(job.id, VideoStatus.IN_PROGRESS)
                    self._videos.advance(job.id, 100 * event.step // event.total)
                elif isinstance(event, Result):
                    result = event
        if result is None:
            raise RuntimeError("the engine ended without a result")
        return result

    def _seconds_left(self, job: Job) -> float | None:
        """What is left of the job's `timeout`, which began when the job was accepted. None: it has none."""
        if job.timeout is None:
            return None
        return max(0.0, self._videos.accepted_at(job.id) + job.timeout - time.time())

    async def _finish(self, job: Job, status: VideoStatus, files: Mapping[str, bytes], **record: Any) -> None:
        """Store the files and record how the job ended, retrying while the database cannot be written: else what was
        computed would be lost, or the job would count as unfinished forever."""
        while True:
            try:
                await self._content.write(files)
                unneeded = self._videos.transition(job.id, status, files=files, **record)
                break
            except sqlite3.OperationalError:
                logger.exception("that video %s is %s can't be recorded yet", job.id, status)
            await asyncio.sleep(_RETRY_DELAY_S)
        await self._content.discard(unneeded)


@asynccontextmanager
async def _within(seconds: float | None) -> AsyncIterator[None]:
    """Cancel a body that takes longer, and raise `APIError` 504 in its place. None: no limit."""
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError:
        if limit.expired():
            raise too_late() from None
        raise


def _means_not_now(error: Exception) -> bool:
    reason = cause(error)
    if isinstance(reason, APIError):
        return reason.status in (429, 503)
    return isinstance(reason, (*PROCESS_LOST, sqlite3.OperationalError))


def _explain(error: Exception) -> VideoError:
    """What the client gets. Errors that were not written for clients may hold paths and stay in the log."""
    match cause(error):
        case InvalidJob() as invalid:
            return VideoError("invalid_request_error", str(invalid))
        case APIError() as refused:
            return VideoError(refused.code or refused.type, refused.message)
        case lost if isinstance(lost, PROCESS_LOST):
            return VideoError("server_error", "The engine stopped during each attempt")
        case _:
            return VideoError("server_error", "The server failed on this video; its log says why under the video's id")
