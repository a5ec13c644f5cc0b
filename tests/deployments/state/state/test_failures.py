"""`State` and videos that fail: they are retried as often as promised, and report why they failed."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path

import pytest
import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError

from deployments.errors import APIError
from deployments.interfaces import VideoError, VideoStatus
from deployments.state.files import FileRecords
from deployments.state.state import State
from deployments.state.storage import Storage
from deployments.state.videos import VideoRecords
from pipelines.job import InvalidJob, Job
from tests.deployments.state.videos import (
    INPUTS,
    MAX_ATTEMPTS,
    VIDEO_1_FILES,
    a_job,
    assert_never_goes_back,
    files,
    finished,
    until,
)
from tests.deployments.step_engine import StepEngine


class RaisingEngine(StepEngine):
    """Raises `errors` one after the other, each after `after` steps; then it computes."""

    def __init__(self, folder: Path, *errors: Exception, after: int):
        super().__init__(folder)
        self.errors = list(errors)
        self.after = after

    async def generate(self, job: Job, media, *, progress: bool) -> AsyncGenerator:
        error = self.errors.pop(0) if self.errors else None
        step = 0
        async for event in super().generate(job, media, progress=progress):
            if error is not None and step == self.after:
                raise error
            step += 1
            yield event


class TestFailure:
    @pytest.mark.parametrize("after", [0, 2])
    @pytest.mark.parametrize(
        ("error", "told"),
        [
            (InvalidJob("The image is not an image"), VideoError("invalid_request_error", "The image is not an image")),
            (APIError(500, "Out of memory"), VideoError("server_error", "Out of memory")),
            (APIError(400, "No", code="no"), VideoError("no", "No")),
            (
                OSError(28, "No space left on device", "/secret/path"),
                VideoError("server_error", "The server failed on this video; its log says why under the video's id"),
            ),
        ],
    )
    async def test_is_told_in_words_for_the_client(self, args, tmp_path, error, told, after):
        engine = RaisingEngine(tmp_path, error, after=after)
        state = State(args, lambda: engine)
        await state.create_video(a_job(), INPUTS, "wan")
        video = await finished(state)
        assert (video.status, video.error, video.completed_at) == (VideoStatus.FAILED, told, None)
        with pytest.raises(APIError, match=f"Generation failed: {told.message}") as raised:
            await state.video_content("video_1", "video")
        assert (raised.value.status, raised.value.code) == (404, told.code)
        await until(lambda: files(args) == set())
        await state.create_video(a_job("video_2"), INPUTS, "wan")
        assert (await finished(state, "video_2")).status is VideoStatus.COMPLETED
        await state.close()

    async def test_to_store_the_result_leaves_no_files(self, state, args, monkeypatch):
        put = Storage.put

        def full(storage: Storage, key: str, data: bytes) -> None:
            if key.endswith(".jpg"):
                raise OSError(28, "No space left on device", key)
            put(storage, key, data)

        monkeypatch.setattr(Storage, "put", full)
        await state.create_video(a_job(), INPUTS, "wan")
        video = await finished(state)
        assert video.status is VideoStatus.FAILED
        assert "videos/" not in video.error.message
        await until(lambda: files(args) == set())

    @pytest.mark.parametrize("status", [429, 503])
    async def test_of_an_engine_that_is_not_there_yet_is_waited_out(self, args, tmp_path, status):
        refusals = [APIError(status, "Not now")] * (3 * MAX_ATTEMPTS)
        engine = RaisingEngine(tmp_path, *refusals, after=0)
        state = State(args, lambda: engine)
        await state.create_video(a_job(), INPUTS, "wan")
        assert (await finished(state)).status is VideoStatus.COMPLETED
        assert engine.errors == []
        await state.close()

    async def test_to_make_the_engine_is_waited_out_too(self, args, engine):
        makers = iter([APIError(503, "The engine is not deployed"), engine])

        def make() -> StepEngine:
            if isinstance(made := next(makers), APIError):
                raise made
            return made

        state = State(args, make)
        await state.create_video(a_job(), INPUTS, "wan")
        assert (await finished(state)).status is VideoStatus.COMPLETED
        await state.close()

    @pytest.mark.parametrize(
        "error",
        [
            ActorDiedError(),
            OutOfMemoryError("killed by Ray"),
            APIError(503, "The ranks are gone"),
            sqlite3.OperationalError("database or disk is full"),
        ],
    )
    async def test_of_the_engine_in_the_middle_is_survived_and_progress_never_falls(self, args, tmp_path, error):
        engine = RaisingEngine(tmp_path, *[error] * (MAX_ATTEMPTS - 1), after=2)
        state = State(args, lambda: engine)
        await state.create_video(a_job(), INPUTS, "wan")
        seen = []
        while not seen or seen[-1].status in (VideoStatus.QUEUED, VideoStatus.IN_PROGRESS):
            seen.append(await state.get_video("video_1"))
            await asyncio.sleep(0.001)
        assert seen[-1].status is VideoStatus.COMPLETED
        assert_never_goes_back(seen)
        await state.close()

    @pytest.mark.parametrize("engines_error", [None, APIError(500, "Out of memory")])
    async def test_to_record_the_end_is_waited_out(self, args, tmp_path, monkeypatch, engines_error):
        transition, full = VideoRecords.transition, [sqlite3.OperationalError("database or disk is full")] * 3

        def transition_on_a_full_disk(videos: VideoRecords, video_id: str, to: VideoStatus, **record) -> list[str]:
            if to is not VideoStatus.IN_PROGRESS and full:
                raise full.pop()
            return transition(videos, video_id, to, **record)

        monkeypatch.setattr(VideoRecords, "transition", transition_on_a_full_disk)
        engine = RaisingEngine(tmp_path, *([engines_error] if engines_error else []), after=2)
        state = State(args, lambda: engine)
        await state.create_video(a_job(), INPUTS, "wan")
        assert (await finished(state)).status is (VideoStatus.FAILED if engines_error else VideoStatus.COMPLETED)
        assert full == []
        assert engine.journal("video_1").count("began") == 1
        await state.close()

    async def test_to_record_the_files_is_waited_out(self, args, engine, monkeypatch):
        reserve, full = FileRecords.reserve, [sqlite3.OperationalError("database or disk is full")] * 3

        def reserve_on_a_full_disk(records: FileRecords, sizes: Mapping[str, int]) -> None:
            if any(key.startswith("videos/") for key in sizes) and full:
                raise full.pop()
            reserve(records, sizes)

        monkeypatch.setattr(FileRecords, "reserve", reserve_on_a_full_disk)
        state = State(args, lambda: engine)
        await state.create_video(a_job(), INPUTS, "wan")
        assert (await finished(state)).status is VideoStatus.COMPLETED
        assert engine.journal("video_1") == ["began", "ended"]
        await until(lambda: files(args) == VIDEO_1_FILES)
        await state.close()

    async def test_of_the_engine_at_every_attempt_fails_the_job_in_the_end(self, args, tmp_path):
        engine = RaisingEngine(tmp_path, *[ActorDiedError()] * 10, after=2)
        state = State(args, lambda: engine)
        await state.create_video(a_job(), INPUTS, "wan")
        video = await finished(state)
        assert video.error == VideoError("server_error", "The engine stopped during each attempt")
        assert len(engine.errors) == 10 - MAX_ATTEMPTS
        await state.close()


async def test_an_error_that_crossed_ray_is_told_without_its_traceback(ray_cluster, args):
    @ray.remote(num_cpus=0)
    def rank(error: Exception) -> None:
        raise error

    class RemoteEngine:
        async def generate(self, job, media, *, progress):
            yield await rank.remote(errors[job.id])

    errors = {
        "video_invalid": InvalidJob("Too many frames"),
        "video_refused": APIError(500, "Out of memory"),
        "video_broken": RuntimeError("/secret/path"),
    }
    state = State(args, RemoteEngine)
    told = {}
    for video_id in errors:
        await state.create_video(a_job(video_id, images=()), {}, "wan")
        told[video_id] = (await finished(state, video_id)).error
    assert told == {
        "video_invalid": VideoError("invalid_request_error", "Too many frames"),
        "video_refused": VideoError("server_error", "Out of memory"),
        "video_broken": VideoError(
            "server_error", "The server failed on this video; its log says why under the video's id"
        ),
    }
    await state.close()
