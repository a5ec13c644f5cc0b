"""`State` and queued videos: how many the engine has, and which is next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from configs.server_args import ServerArgs
from deployments.interfaces import VideoError
from deployments.state import video_runner
from deployments.state.state import State
from deployments.state.video_runner import VIDEOS_PER_REPLICA
from pipelines.job import Event, Job, Media, Progress
from tests.deployments.state.videos import INPUTS, a_job, finished, until
from tests.deployments.step_engine import StepEngine

IDS = [f"video_{number}" for number in range(3 * VIDEOS_PER_REPLICA)]

LATE = "video_late"


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_runner, "_ROOM_DELAY_S", 0.01)


def begun(engine: StepEngine) -> list[str]:
    return [video_id for video_id in IDS if engine.journal(video_id)]


async def fill(state: State, engine: StepEngine) -> None:
    """Create more videos than one replica takes; none ends before the test lets it."""
    for video_id in IDS:
        engine.allow(video_id, 1)
        await state.create_video(a_job(video_id), INPUTS, "wan")


async def test_a_replica_is_given_few_videos_and_the_oldest_of_the_others_once_one_is_done(
    state: State, engine: StepEngine
) -> None:
    await fill(state, engine)
    await until(lambda: begun(engine) == IDS[:VIDEOS_PER_REPLICA])
    await asyncio.sleep(0.1)
    assert begun(engine) == IDS[:VIDEOS_PER_REPLICA]
    engine.allow(IDS[2], 4)
    await finished(state, IDS[2])
    await until(lambda: begun(engine) == IDS[: VIDEOS_PER_REPLICA + 1])


async def test_a_replica_that_starts_later_is_given_of_those_that_wait(state: State, engine: StepEngine) -> None:
    await fill(state, engine)
    await until(lambda: begun(engine) == IDS[:VIDEOS_PER_REPLICA])
    polls = [asyncio.create_task(state.watch_default(name, None)) for name in ("first", "second")]
    await until(lambda: begun(engine) == IDS[: 2 * VIDEOS_PER_REPLICA])
    await asyncio.gather(*polls)


async def test_a_video_that_waits_is_deleted_at_once_and_leaves_its_place(state: State, engine: StepEngine) -> None:
    await fill(state, engine)
    await until(lambda: begun(engine) == IDS[:VIDEOS_PER_REPLICA])
    await asyncio.wait_for(state.delete_video(IDS[VIDEOS_PER_REPLICA]), 1)
    engine.allow(IDS[0], 4)
    await until(lambda: begun(engine) == [*IDS[:VIDEOS_PER_REPLICA], IDS[VIDEOS_PER_REPLICA + 1]])


async def test_the_time_of_a_video_begins_when_it_is_accepted(state: State, engine: StepEngine) -> None:
    await fill(state, engine)
    await state.create_video(a_job(LATE, timeout=0.2), INPUTS, "wan")
    late = await finished(state, LATE)
    assert late.error == VideoError("timeout", "The job was not done in time")
    assert begun(engine) == IDS[:VIDEOS_PER_REPLICA]
    assert engine.journal(LATE) == []


async def test_a_video_that_waits_for_an_engine_replica_has_no_more_time_than_others(
    args: ServerArgs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Serve lets a call wait for a replica without limit."""
    monkeypatch.setattr(video_runner, "_ENGINE_GRACE_S", 0.05)

    class StartingEngine(StepEngine):
        async def generate(self, job: Job, media: Media, *, progress: bool) -> AsyncGenerator[Event, None]:
            await asyncio.Event().wait()
            yield Progress(0, 1)

    state = State(args, lambda: StartingEngine(tmp_path))
    await state.create_video(a_job(LATE, timeout=0.2), INPUTS, "wan")
    assert (await finished(state, LATE)).error == VideoError("timeout", "The job was not done in time")
    await state.close()


async def test_the_engine_is_given_what_is_left_of_a_videos_time(
    state: State, engine: StepEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Job] = []
    generate = engine.generate

    def noted(job: Job, media: Media, *, progress: bool) -> AsyncGenerator[Event, None]:
        given.append(job)
        return generate(job, media, progress=progress)

    monkeypatch.setattr(engine, "generate", noted)
    await state.create_video(a_job(LATE, timeout=60), INPUTS, "wan")
    await finished(state, LATE)
    assert given[0].timeout is not None
    assert 50 < given[0].timeout < 60


async def test_all_of_them_are_done_in_the_end(args: ServerArgs, engine: StepEngine) -> None:
    state = State(args, lambda: engine)
    for video_id in IDS:
        await state.create_video(a_job(video_id), INPUTS, "wan")
    for video_id in IDS:
        assert (await finished(state, video_id)).error is None
    await state.close()
