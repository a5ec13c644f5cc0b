"""`State` after a kill: a new life finishes what the old one had accepted, and cleans up after it."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from deployments.interfaces import VideoStatus
from deployments.state.state import State
from deployments.state.storage import Storage
from tests.deployments.state.videos import (
    INPUTS,
    MAX_ATTEMPTS,
    VIDEO_1_FILES,
    a_job,
    files,
    finished,
    reaches,
    until,
)
from tests.deployments.step_engine import pixels

LAST_WORDS = """
import asyncio, os, signal, sys
from pathlib import Path
from configs.server_args import ServerArgs
from deployments.state.state import State
from deployments.state.storage import Storage
from pipelines.job import Job
from tests.deployments.step_engine import StepEngine
from tests.deployments.state.videos import INPUTS

args, job, prefix, folder = sys.argv[1:]
put = Storage.put

def put_and_die(storage, key, data):
    put(storage, key, data)
    if key.startswith(prefix):
        os.kill(os.getpid(), signal.SIGKILL)

async def main():
    Storage.put = put_and_die
    state = State(ServerArgs.model_validate_json(args), lambda: StepEngine(Path(folder)))
    await state.create_video(Job.model_validate_json(job), INPUTS, "wan")
    await asyncio.sleep(60)

asyncio.run(main())
"""
"""A server that kills itself as soon as it has written a file under a prefix."""


class TestANewLife:
    async def test_goes_on_with_queued_and_running_videos_to_the_same_pixels(self, args, engine):
        state = State(args, lambda: engine)
        engine.allow("video_1", 2)
        engine.allow("video_2", 0)
        for video_id in ("video_1", "video_2"):
            await state.create_video(a_job(video_id), INPUTS, "wan")
        await reaches(state, 50)
        await state.close()
        assert engine.journal("video_1") == ["began", "stopped"]

        state = State(args, lambda: engine)
        video = await state.get_video("video_1")
        assert (video.status, video.progress) == (VideoStatus.IN_PROGRESS, 50)
        for video_id in ("video_1", "video_2"):
            engine.allow(video_id, 4)
            assert (await finished(state, video_id)).status is VideoStatus.COMPLETED
            content = await state.video_content(video_id, "video")
            assert await state.read(content.key, 0, content.size) == pixels(a_job(video_id), INPUTS)[0].data
        assert engine.journal("video_1") == ["began", "stopped", "began", "ended"]
        await state.close()

        state = State(args, lambda: engine)  # what is finished is not restarted
        await asyncio.sleep(0.05)
        assert engine.journal("video_1") == ["began", "stopped", "began", "ended"]
        await state.close()

    async def test_is_lost_on_a_job_that_ends_each_of_them_but_not_on_those_that_wait(self, args, engine):
        engine.allow("video_1", 1)
        engine.allow("video_2", 0)
        for life in range(MAX_ATTEMPTS):
            state = State(args, lambda: engine)
            for video_id in ("video_1", "video_2"):
                await state.create_video(a_job(video_id), INPUTS, "wan")
            await until(lambda life=life: engine.journal("video_1").count("began") == life + 1)
            await reaches(state, 25)
            await asyncio.sleep(0.02)
            await state.close()
        state = State(args, lambda: engine)
        video = await finished(state)
        assert video.status is VideoStatus.FAILED
        assert video.error.message == f"Given up after {MAX_ATTEMPTS} attempts: the server stopped during each"
        engine.allow("video_2", 4)
        assert (await finished(state, "video_2")).status is VideoStatus.COMPLETED
        await state.close()

    async def test_sweeps_what_was_being_written_but_nothing_of_others(self, state, args, engine):
        await state.create_video(a_job(), INPUTS, "wan")
        await finished(state)
        await until(lambda: files(args) == VIDEO_1_FILES)
        state._records.files.reserve({"videos/video_2-0.mp4": 1, "inputs/video_3-0": 1})
        await state.close()
        root = Path(args.output_path)
        (root / "videos" / "video_2-0.mp4").write_bytes(b"whole, but without a record")
        (root / "inputs" / ".video_3-0.partial").write_bytes(b"ha")
        (root / "videos" / "holiday.mp4").write_bytes(b"somebody else's")

        state = State(args, lambda: engine)
        assert files(args) == VIDEO_1_FILES | {"videos/holiday.mp4"}
        assert state._records.files.unowned() == []
        await state.close()

    @pytest.mark.parametrize(("at", "left"), [("inputs/", 0), ("videos/", 1)])
    async def test_after_a_kill_between_file_and_record_finds_no_file_too_many(self, args, engine, at, left):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", LAST_WORDS, args.model_dump_json(), a_job().model_dump_json(), at, str(engine.folder)
        )
        assert await process.wait() == -signal.SIGKILL
        assert any(file.startswith(at) for file in files(args))

        engine.allow("video_1", 0)
        state = State(args, lambda: engine)
        assert files(args) == {f"inputs/video_1-{name}" for name in INPUTS if left}
        videos = (await state.list_videos(None, 10, "desc")).videos
        assert [video.status for video in videos] == [VideoStatus.IN_PROGRESS] * left
        engine.allow("video_1", 4)
        await state.create_video(a_job(), INPUTS, "wan")  # the client got no response, and retries
        assert (await finished(state)).status is VideoStatus.COMPLETED
        await until(lambda: files(args) == VIDEO_1_FILES)
        await state.close()

    async def test_starts_though_the_sweep_cannot_delete(self, args, engine, monkeypatch):
        state = State(args, lambda: engine)
        state._records.files.reserve({"videos/video_2-0.mp4": 1})
        await state.close()

        def refused(storage: Storage, key: str) -> None:
            raise PermissionError(key)

        monkeypatch.setattr(Storage, "delete", refused)
        state = State(args, lambda: engine)
        assert state._records.files.unowned() == ["videos/video_2-0.mp4"]
        await state.close()
