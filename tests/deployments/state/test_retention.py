"""Retention: real files and a real clock, both small."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from configs.server_args import ServerArgs
from deployments.errors import APIError
from deployments.interfaces import VideoStatus
from deployments.state import retention
from deployments.state.content import video_files
from deployments.state.state import State
from deployments.state.storage import Storage
from pipelines.job import Job, Task
from tests.deployments.step_engine import StepEngine, pixels


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "PERIOD_S", 0.02)


@pytest.fixture
def engine(tmp_path: Path) -> StepEngine:
    return StepEngine(tmp_path)


def a_job(name: str) -> Job:
    task, output_format = (Task.TEXT_TO_IMAGE, "png") if name.startswith("image") else (Task.TEXT_TO_VIDEO, "mp4")
    return Job(
        id=name,
        task=task,
        prompt="p",
        width=8,
        height=8,
        num_inference_steps=2,
        seeds=(7,),
        output_format=output_format,
    )


VIDEO_BYTES = sum(len(data) for data in video_files("video", pixels(a_job("video"), {})).values())
"""What a video of the test's engine takes on disk."""


@asynccontextmanager
async def a_life(folder: Path, engine: StepEngine, **retention: float) -> AsyncIterator[State]:
    """A server on the files in `folder`."""
    paths = {"output_path": str(folder / "outputs"), "state_path": str(folder / "jobs.sqlite3")}
    state = State(ServerArgs(**paths, **retention), lambda: engine)
    yield state
    await state.close()


async def make(state: State, name: str) -> None:
    if name.startswith("image"):
        await state.store_image(a_job(name), [b"p" * 1000])
        return
    await state.create_video(a_job(name), {}, "wan")
    await until_async(lambda: is_finished(state, name))


async def is_finished(state: State, name: str) -> bool:
    return (await state.get_video(name)).status is VideoStatus.COMPLETED


async def until_async(condition: Callable) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.005)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def kept(folder: Path) -> set[str]:
    """The videos and images whose files are on disk."""
    return {path.stem.rpartition("-")[0] for path in (folder / "outputs").rglob("*") if path.is_file()}


async def recorded(state: State) -> set[str]:
    return {video.job.id for video in (await state.list_videos(None, 100, "desc")).videos}


async def test_what_is_too_old_goes_with_its_files_and_not_before(tmp_path: Path, engine: StepEngine) -> None:
    async with a_life(tmp_path, engine, video_ttl=1.0) as state:
        await make(state, "video_1")
        await make(state, "image_1")
        video = await state.get_video("video_1")
        assert video.expires_at - video.completed_at in (1, 2)  # both in whole seconds
        await asyncio.sleep(0.5)
        assert (kept(tmp_path), await recorded(state)) == ({"video_1", "image_1"}, {"video_1"})
        await until(lambda: kept(tmp_path) == set())
        assert await recorded(state) == set()
        for call in (state.get_video("video_1"), state.image_content("image_1")):
            with pytest.raises(APIError) as error:
                await call
            assert error.value.status == 404


async def test_the_oldest_go_where_there_is_too_much(tmp_path: Path, engine: StepEngine) -> None:
    async with a_life(tmp_path, engine, storage_bytes=2 * VIDEO_BYTES + 1000) as state:
        for name in ("video_1", "image_1", "video_2"):
            await make(state, name)
        await asyncio.sleep(0.1)
        assert kept(tmp_path) == {"video_1", "image_1", "video_2"}
        await make(state, "video_3")
        await until(lambda: kept(tmp_path) == {"image_1", "video_2", "video_3"})
        await make(state, "image_2")
        await until(lambda: kept(tmp_path) == {"image_2", "video_2", "video_3"})
        assert await recorded(state) == {"video_2", "video_3"}


async def test_what_is_unfinished_stays_whatever_its_age_and_size(tmp_path: Path, engine: StepEngine) -> None:
    engine.allow("video_1", 1)
    async with a_life(tmp_path, engine, video_ttl=0.05, storage_bytes=0) as state:
        await state.create_video(a_job("video_1"), {}, "wan")
        await asyncio.sleep(0.3)
        assert await recorded(state) == {"video_1"}
        engine.allow("video_1", 2)
        await until(lambda: "ended" in engine.journal("video_1"))
        await until_async(lambda: nothing_left(state, tmp_path))


async def nothing_left(state: State, folder: Path) -> bool:
    return not await recorded(state) and not kept(folder)


async def test_time_that_passed_without_a_server_counts(tmp_path: Path, engine: StepEngine) -> None:
    async with a_life(tmp_path, engine) as state:
        await make(state, "video_1")
        await make(state, "image_1")
        assert (await state.get_video("video_1")).expires_at is None
    await asyncio.sleep(0.2)
    async with a_life(tmp_path, engine, video_ttl=0.2) as state:
        await until(lambda: kept(tmp_path) == set())
        assert await recorded(state) == set()


async def test_a_budget_set_later_counts_what_lies_there(tmp_path: Path, engine: StepEngine) -> None:
    async with a_life(tmp_path, engine) as state:
        for name in ("video_1", "video_2"):
            await make(state, name)
    async with a_life(tmp_path, engine, storage_bytes=VIDEO_BYTES) as state:
        await until(lambda: kept(tmp_path) == {"video_2"})
        assert await recorded(state) == {"video_2"}


async def test_a_file_that_cannot_be_deleted_now_goes_at_the_next_start(
    tmp_path: Path, engine: StepEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(storage: Storage, key: str) -> None:
        raise PermissionError(key)

    async with a_life(tmp_path, engine, video_ttl=0.1) as state:
        with monkeypatch.context() as patched:
            patched.setattr(Storage, "delete", refused)
            await make(state, "video_1")
            await asyncio.sleep(0.3)
            assert (await recorded(state), kept(tmp_path)) == (set(), {"video_1"})
        await make(state, "video_2")
        await until(lambda: kept(tmp_path) == {"video_1"})  # and it continues with the others
    async with a_life(tmp_path, engine):
        assert kept(tmp_path) == set()
