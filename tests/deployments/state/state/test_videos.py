"""`State` and videos: each is made once, and leaves only the files that its record names."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest

from deployments.errors import APIError
from deployments.interfaces import VideoError, VideoStatus
from deployments.state.files import FileRecords
from deployments.state.state import State
from deployments.state.storage import Storage
from pipelines.job import content_key
from tests.deployments.state.videos import (
    INPUTS,
    PHOTO,
    VIDEO_1_FILES,
    a_job,
    files,
    finished,
    reaches,
    until,
)
from tests.deployments.step_engine import pixels


class TestAVideo:
    async def test_is_persisted_with_its_inputs_before_the_answer(self, state, engine, args):
        engine.allow("video_1", 0)
        video = await state.create_video(a_job(), INPUTS, "wan")
        assert (video.job, video.model, video.status, video.progress) == (a_job(), "wan", VideoStatus.QUEUED, 0)
        assert files(args) == {f"inputs/video_1-{content_key(PHOTO)}"}
        await state.close()
        reopened = State(args, lambda: engine)
        assert await reopened.get_video("video_1") == video
        await reopened.close()

    async def test_shows_each_step_and_is_completed_once_its_files_are_there(self, state, engine, args):
        engine.allow("video_1", 0)
        await state.create_video(a_job(), INPUTS, "wan")
        for step, percent in [(1, 25), (2, 50), (3, 75), (4, 99)]:
            engine.allow("video_1", step)
            await reaches(state, percent)
            if step < 4:
                video = await state.get_video("video_1")
                assert (video.status, video.progress) == (VideoStatus.IN_PROGRESS, percent)
        video = await finished(state)
        assert (video.status, video.progress, video.error) == (VideoStatus.COMPLETED, 100, None)
        assert video.timings == {"denoise": 0.25, "decode": 0.5}
        await until(lambda: files(args) == VIDEO_1_FILES)  # the inputs are no longer needed

    async def test_is_downloaded_in_ranges_in_every_variant(self, state):
        job = a_job(seeds=(7, 8))
        await state.create_video(job, INPUTS, "wan")
        await finished(state)
        for index, output in enumerate(pixels(job, INPUTS)):
            for variant, data, media_type, filename in [
                ("video", output.data, "video/mp4", f"video_1-{index}.mp4"),
                ("thumbnail", output.thumbnail, "image/webp", f"video_1-{index}.webp"),
                ("spritesheet", output.spritesheet, "image/jpeg", f"video_1-{index}.jpg"),
            ]:
                content = await state.video_content("video_1", variant, index)
                assert (content.size, content.media_type, content.filename) == (len(data), media_type, filename)
                assert await state.read(content.key, 100, 50) == data[100:150]
                assert await state.read(content.key, 0, content.size) == data
        with pytest.raises(APIError, match="has no video 2") as error:
            await state.video_content("video_1", "video", 2)
        assert error.value.status == 404

    async def test_of_one_output_is_named_by_its_id_alone(self, state):
        await state.create_video(a_job(), INPUTS, "wan")
        await finished(state)
        assert (await state.video_content("video_1", "video")).filename == "video_1.mp4"

    async def test_cannot_be_downloaded_before_it_is_completed(self, state, engine):
        engine.allow("video_1", 1)
        await state.create_video(a_job(), INPUTS, "wan")
        await reaches(state, 25)
        with pytest.raises(APIError, match="Generation is still in progress") as error:
            await state.video_content("video_1", "video")
        assert error.value.status == 404

    async def test_whose_file_was_removed_by_hand_is_a_404(self, state, args):
        await state.create_video(a_job(), INPUTS, "wan")
        await finished(state)
        content = await state.video_content("video_1", "video")
        Path(args.output_path, content.key).unlink()
        for call in (state.video_content("video_1", "video"), state.read(content.key, 0, 1)):
            with pytest.raises(APIError, match="no longer stored") as error:
                await call
            assert error.value.status == 404

    async def test_is_unknown_until_it_was_created(self, state):
        for call in (state.get_video, state.delete_video, partial(state.video_content, variant="video")):
            with pytest.raises(APIError, match="No video with id 'video_9'"):
                await call("video_9")

    async def test_is_made_once_for_one_idempotency_key(self, state, engine, args):
        calls = (state.create_video(a_job(f"video_{n}"), INPUTS, "wan", "key") for n in range(5))
        videos = await asyncio.gather(*calls)
        assert len({video.job.id for video in videos}) == 1
        (only,) = (await state.list_videos(None, 10, "desc")).videos
        await finished(state, only.job.id)
        assert await state.create_video(a_job("video_later"), INPUTS, "wan", "key") == await state.get_video(
            only.job.id
        )
        assert sum(len(engine.journal(f"video_{n}")) for n in range(5)) == 2  # began, ended
        await until(lambda: len(files(args)) == 3)

    async def test_may_be_created_again_by_a_repeated_call(self, state, engine):
        engine.allow("video_1", 1)
        await state.create_video(a_job(), INPUTS, "wan")
        await reaches(state, 25)
        again = await state.create_video(a_job(), INPUTS, "wan")
        assert again.progress == 25
        engine.allow("video_1", 4)
        await finished(state)
        assert engine.journal("video_1") == ["began", "ended"]


@pytest.fixture
def held_writes(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Files of videos are not written before the second event is set; the first says that one is about to be."""
    writing, go_on = threading.Event(), threading.Event()
    put = Storage.put

    def slow_put(storage: Storage, key: str, data: bytes) -> None:
        if key.startswith("videos/"):
            writing.set()
            go_on.wait(5)
        put(storage, key, data)

    monkeypatch.setattr(Storage, "put", slow_put)
    return writing, go_on


class TestDeletion:
    async def test_of_a_running_video_closes_the_engines_iterator(self, state, engine, args):
        engine.allow("video_1", 2)
        await state.create_video(a_job(), INPUTS, "wan")
        await reaches(state, 50)
        await state.delete_video("video_1")
        assert engine.journal("video_1") == ["began", "stopped"]
        assert files(args) == set()
        with pytest.raises(APIError, match="No video"):
            await state.get_video("video_1")

    async def test_of_a_completed_video_takes_its_files_along_and_no_others(self, state, args):
        for video_id in ("video_1", "video_2"):
            await state.create_video(a_job(video_id), INPUTS, "wan")
            await finished(state, video_id)
        await state.delete_video("video_2")
        await until(lambda: files(args) == VIDEO_1_FILES)
        assert [video.job.id for video in (await state.list_videos(None, 10, "desc")).videos] == ["video_1"]

    @pytest.mark.parametrize("times", [1, 2])
    async def test_while_the_result_is_being_written_leaves_nothing(self, state, args, held_writes, times):
        writing, go_on = held_writes
        await state.create_video(a_job(), INPUTS, "wan")
        await until(writing.is_set)
        deletions = []
        for _ in range(times):
            deletions.append(asyncio.create_task(state.delete_video("video_1")))
            await asyncio.sleep(0.05)
        assert not any(deletion.done() for deletion in deletions)
        go_on.set()
        await deletions[0]
        await asyncio.wait(deletions)
        assert files(args) == set()

    async def test_while_the_database_is_full_stops_a_write_too(self, state, held_writes, monkeypatch):
        writing, go_on = held_writes

        def full(records: FileRecords, keys: Iterable[str]) -> None:
            monkeypatch.undo()
            raise sqlite3.OperationalError("database or disk is full")

        await state.create_video(a_job(), INPUTS, "wan")
        await until(writing.is_set)
        monkeypatch.setattr(FileRecords, "forget", full)
        deletion = asyncio.create_task(state.delete_video("video_1"))
        await asyncio.sleep(0.05)
        go_on.set()
        await asyncio.wait_for(deletion, 5)
        with pytest.raises(APIError, match="No video"):
            await state.get_video("video_1")

    async def test_twice_at_once_succeeds_once(self, state, engine):
        engine.allow("video_1", 1)
        await state.create_video(a_job(), INPUTS, "wan")
        await reaches(state, 25)
        deletions = (state.delete_video("video_1") for _ in range(2))
        outcomes = await asyncio.gather(*deletions, return_exceptions=True)
        assert sorted(str(outcome) for outcome in outcomes) == ["No video with id 'video_1'", "None"]


class TestCancelling:
    async def test_a_running_video_stops_it_and_keeps_its_record(self, state, engine, args):
        engine.allow("video_1", 2)
        await state.create_video(a_job(), INPUTS, "wan")
        await reaches(state, 50)
        video = await state.cancel_video("video_1")
        assert video.status is VideoStatus.FAILED
        assert video.error == VideoError("cancelled", "The video was cancelled")
        assert engine.journal("video_1") == ["began", "stopped"]
        assert files(args) == set()

    async def test_a_queued_video_keeps_it_from_beginning(self, state, engine):
        engine.allow("video_1", 0)
        await state.create_video(a_job(), INPUTS, "wan")
        assert (await state.cancel_video("video_1")).error.code == "cancelled"
        assert (await state.cancel_video("video_1")).error.code == "cancelled"

    async def test_a_finished_video_leaves_it_as_it_is(self, state, args):
        await state.create_video(a_job(), INPUTS, "wan")
        await finished(state)
        assert (await state.cancel_video("video_1")).status is VideoStatus.COMPLETED
        assert files(args) == VIDEO_1_FILES

    async def test_an_unknown_video_is_not_found(self, state):
        with pytest.raises(APIError) as refused:
            await state.cancel_video("video_nobody_made")
        assert refused.value.status == 404


class TestAFullQueue:
    async def test_refuses_before_there_is_a_job_and_takes_the_next_when_one_is_done(self, args, engine):
        state = State(args.model_copy(update={"max_queue": 2}), lambda: engine)
        engine.allow("video_1", 1)
        engine.allow("video_2", 0)
        for name in ("video_1", "video_2"):
            await state.create_video(a_job(name), INPUTS, "wan")
        kept = files(args)
        with pytest.raises(APIError) as refused:
            await state.create_video(a_job("video_3"), INPUTS, "wan")
        assert (refused.value.status, refused.value.code) == (429, "queue_full")
        assert int(refused.value.headers["Retry-After"]) > 0
        assert files(args) == kept
        with pytest.raises(APIError):
            await state.get_video("video_3")
        engine.allow("video_1", 4)
        await finished(state)
        await state.create_video(a_job("video_3"), INPUTS, "wan")
        assert (await finished(state, "video_3")).status is VideoStatus.COMPLETED
        await state.close()

    async def test_still_answers_a_repeated_request_with_its_video(self, args, engine):
        state = State(args.model_copy(update={"max_queue": 1}), lambda: engine)
        engine.allow("video_1", 0)
        await state.create_video(a_job(), INPUTS, "wan", "key")
        assert (await state.create_video(a_job("video_2"), INPUTS, "wan", "key")).job.id == "video_1"
        await state.close()


async def test_files_are_read_and_written_beside_the_event_loop(state, monkeypatch):
    threads = set()
    for name in ("put", "read", "size", "delete"):
        method = getattr(Storage, name)

        def recorded(*args, method=method):
            threads.add(threading.current_thread())
            return method(*args)

        monkeypatch.setattr(Storage, name, recorded)
    await state.create_video(a_job(), INPUTS, "wan")
    await finished(state)
    content = await state.video_content("video_1", "video")
    await state.read(content.key, 0, 10)
    await state.delete_video("video_1")
    assert threads
    assert threading.current_thread() not in threads
