"""The engine over a gang without ranks: what happens to jobs that are requested twice, and when a gang is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from configs.server_args import ServerArgs
from deployments.engine import engine as engine_module
from deployments.engine.engine import Engine
from deployments.engine.gang import GangBroken
from deployments.engine.rank import Stopped, Suspended, TooLarge
from deployments.errors import APIError
from deployments.interfaces import Composition
from deployments.names import APPLICATION
from pipelines.job import Event, Job, LoRASpec, Media, Output, Progress, Result, Task


class StepwiseGang:
    """Takes the steps that `allow` permits, and obeys orders as ranks do: at the end of a step, by the job's id."""

    def __init__(self, args: ServerArgs, placement_group: object):
        self.loaded = True
        self.composition: Composition = ()
        self.is_lost = False
        self.began: list[str] = []
        self.discarded: list[str] = []
        self.breaks_under: list[str] = []
        """Jobs under which it breaks, once for each time they are listed."""
        self.failure: TooLarge | None = None
        """Why it breaks, if the job itself is the cause."""
        self.tells_every = 1
        """It reports one step in so many."""
        self.merging: list[Composition] = []
        """What it was told to merge."""
        self.may_merge = asyncio.Event()
        self.may_merge.set()
        self.merge_breaks_it: Composition | None = None
        """Breaks it once."""
        self._orders: dict[str, type[Exception]] = {}
        self._steps = asyncio.Semaphore(0)

    async def start(self) -> str:
        return "the model's card"

    async def lost(self) -> None:
        await asyncio.Event().wait()

    def allow(self, steps: int) -> None:
        for _ in range(steps):
            self._steps.release()

    def stop(self, job_id: str) -> None:
        self._orders[job_id] = Stopped

    def suspend(self, job_id: str) -> None:
        self._orders[job_id] = Suspended

    def discard(self, job_id: str) -> None:
        self.discarded.append(job_id)

    async def merge(self, composition: Composition, factors: Mapping[str, str]) -> None:
        self.merging.append(composition)
        await self.may_merge.wait()
        if composition == self.merge_breaks_it:
            self.merge_breaks_it = None
            raise GangBroken("rank 1 died")
        self.composition = composition

    def kill(self) -> None:
        """There is nothing to kill."""

    async def run(self, job: Job, media: Media, progress: bool) -> AsyncIterator[Event]:
        self.began.append(job.id)
        if job.id in self.breaks_under:
            self.breaks_under.remove(job.id)
            raise GangBroken("rank 0 died", self.failure)
        for step in range(job.num_inference_steps):
            await self._steps.acquire()
            if order := self._orders.pop(job.id, None):
                raise order(job.id)
            if progress and (step + 1) % self.tells_every == 0:
                yield Progress(step + 1, job.num_inference_steps)
        yield Result((Output(b"clip"),), {})


class SilentState:
    """Has no news."""

    async def lora_factors(self, identity: str) -> str:
        return f"factors of {identity}"

    async def watch_default(self, replica_id: str, known_version: int | None) -> tuple[int, tuple[()]]:
        await asyncio.Event().wait()
        raise AssertionError


class NoMetrics:
    def __init__(self) -> None:
        self.counted: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(inc=lambda *_: None) if name.endswith("s") else lambda *_: None

    def steps(self, ticket: object, count: int) -> None:
        assert count > 0, "Ray's counters refuse it"
        self.counted.append(count)


def in_application(name: str) -> SimpleNamespace:
    return SimpleNamespace(app_name=name, replica_id=SimpleNamespace(unique_id="one"))


@pytest.fixture
async def engine(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Engine]:
    monkeypatch.setattr(engine_module, "Gang", StepwiseGang)
    monkeypatch.setattr(engine_module, "EngineMetrics", NoMetrics)
    monkeypatch.setattr(engine_module, "StateClient", lambda find: SilentState())
    monkeypatch.setattr(engine_module, "get_current_placement_group", lambda: None)
    monkeypatch.setattr(engine_module.serve, "get_replica_context", lambda: in_application(APPLICATION))
    engine = Engine.__new__(Engine)
    await engine.__init__(ServerArgs())  # type: ignore[misc]
    yield engine
    for task in engine._tasks:
        task.cancel()


VIDEO = Job(
    id="video_1", task=Task.TEXT_TO_VIDEO, prompt="waves", width=64, height=64, num_inference_steps=4, seeds=(1,)
)

PICTURE = VIDEO.model_copy(update={"id": "image_1", "task": Task.TEXT_TO_IMAGE})


def asked_for(engine: Engine, video_id: str = "video_1", asker: str = "") -> asyncio.Task[list[Event]]:
    async def events() -> list[Event]:
        video = VIDEO.model_copy(update={"id": video_id})
        return [event async for event in engine.generate(video, {}, progress=True, asker=asker)]

    return asyncio.create_task(events())


async def all_of(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


def steps_of(events: list[Event]) -> list[int]:
    return [event.step for event in events if isinstance(event, Progress)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def test_an_application_of_another_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state actor would not find its engine."""
    monkeypatch.setattr(engine_module.serve, "get_replica_context", lambda: in_application("wan"))
    with pytest.raises(ValueError, match="named 'ditserve', not 'wan'"):
        await Engine.__new__(Engine).__init__(ServerArgs())  # type: ignore[misc]


async def test_a_job_that_is_asked_for_again_ends_for_who_asked_before(engine: Engine) -> None:
    gang = engine.gang
    first = asked_for(engine)
    await until(lambda: gang.began == ["video_1"])
    second = asked_for(engine)
    with pytest.raises(APIError) as taken:
        await asyncio.wait_for(first, 5)
    assert taken.value.code == "taken_over"
    gang.allow(5)
    assert (await asyncio.wait_for(second, 5))[-2] == Progress(4, 4)
    assert gang.began == ["video_1", "video_1"]


async def test_steps_that_were_not_told_are_counted(engine: Engine) -> None:
    engine.gang.tells_every = 2
    engine.gang.allow(4)
    assert steps_of(await asyncio.wait_for(asked_for(engine), 5)) == [0, 2, 4]
    assert engine.metrics.counted == [2, 2]


async def test_a_job_that_waits_is_taken_over_too(engine: Engine) -> None:
    gang = engine.gang
    running = asyncio.create_task(anext(engine.generate(VIDEO.model_copy(update={"id": "video_0"}), {}, True)))
    await until(lambda: gang.began == ["video_0"])
    first, second = asked_for(engine), asked_for(engine)
    with pytest.raises(APIError):
        await asyncio.wait_for(first, 5)
    gang.allow(8)
    assert isinstance((await asyncio.wait_for(second, 5))[-1], Result)
    assert gang.began == ["video_0", "video_1"]
    await running


async def test_the_videos_of_a_state_actor_that_is_gone_are_not_computed_for_nobody(engine: Engine) -> None:
    """The next state actor may request them from other replicas."""
    gang = engine.gang
    left = [asked_for(engine, f"video_{number}", asker="a life that ended") for number in range(3)]
    await until(lambda: gang.began == ["video_0"])
    again = asked_for(engine, "video_2", asker="the next life")
    for task in left:
        with pytest.raises(APIError):
            await asyncio.wait_for(task, 5)
    gang.allow(5)
    assert isinstance((await asyncio.wait_for(again, 5))[-1], Result)
    assert gang.began == ["video_0", "video_2"]


async def test_an_order_that_comes_late_loses_no_job(engine: Engine) -> None:
    gang = engine.gang
    gang.stop("video_1")  # meant for a request that had already ended
    asked = asked_for(engine)
    gang.allow(5)
    assert steps_of(await asyncio.wait_for(asked, 5)) == [0, 1, 2, 3, 4]
    assert gang.began == ["video_1", "video_1"]


async def test_each_break_under_a_video_is_an_attempt_of_its_own(engine: Engine) -> None:
    engine.gang.breaks_under = ["video_1"]
    asked = asked_for(engine)
    engine.gang.allow(5)
    assert steps_of(await asyncio.wait_for(asked, 5)) == [0, 0, 1, 2, 3, 4]


async def test_a_picture_that_breaks_its_gang_twice_is_given_up_with_the_reason(engine: Engine) -> None:
    engine.gang.breaks_under = 2 * [PICTURE.id]
    with pytest.raises(APIError, match="broke its workers 2 times: rank 0 died") as given_up:
        await asyncio.wait_for(anext(engine.generate(PICTURE, {}, False)), 5)
    assert (given_up.value.status, given_up.value.code) == (500, "worker_failed")
    engine.gang.allow(5)
    await asyncio.wait_for(anext(engine.generate(PICTURE, {}, False)), 5)


async def test_a_job_that_is_too_large_for_the_gang_breaks_it_once(engine: Engine) -> None:
    engine.gang.breaks_under = 2 * ["video_1"]
    engine.gang.failure = TooLarge("OutOfMemoryError: 80 GB")
    with pytest.raises(APIError, match="The generation failed: OutOfMemoryError: 80 GB") as failed:
        await asyncio.wait_for(asked_for(engine), 5)
    assert (failed.value.status, failed.value.code) == (500, "generation_failed")
    assert engine.gang.began == ["video_1"]


async def test_a_video_that_gave_way_pays_no_attempt_for_a_break_under_the_picture(engine: Engine) -> None:
    gang = engine.gang
    video = asked_for(engine)
    gang.allow(1)
    await until(lambda: engine.metrics.counted == [1])
    gang.breaks_under = [PICTURE.id]
    picture = asyncio.create_task(anext(engine.generate(PICTURE, {}, False)))
    gang.allow(10)
    assert steps_of(await asyncio.wait_for(video, 5)) == [0, 1, 1, 2, 3, 4], "it has to begin again"
    assert engine.metrics.counted == [1, 4, 1, 1, 1, 1], "the picture's are counted at once"
    assert gang.began == ["video_1", PICTURE.id, PICTURE.id, "video_1"]
    await picture


STYLE = (LoRASpec(nickname="style", identity="style@1"),)


async def test_a_job_that_is_left_while_its_adapters_are_merged_is_not_computed(engine: Engine) -> None:
    gang = engine.gang
    gang.may_merge.clear()
    left = asyncio.create_task(anext(engine.generate(PICTURE.model_copy(update={"lora": STYLE}), {}, False)))
    await until(lambda: gang.merging == [STYLE])
    left.cancel()
    gang.may_merge.set()
    gang.allow(4)
    await asyncio.wait_for(asked_for(engine), 5)
    assert gang.began == ["video_1"]


async def test_a_break_while_a_paused_video_gets_its_adapters_back_is_an_attempt_from_the_first_step(
    engine: Engine,
) -> None:
    gang = engine.gang
    video = VIDEO.model_copy(update={"lora": STYLE})
    made = asyncio.create_task(all_of(engine.generate(video, {}, True)))
    gang.allow(1)
    await until(lambda: engine.metrics.counted == [1])
    picture = asyncio.create_task(anext(engine.generate(PICTURE, {}, False)))
    await until(lambda: len(engine.schedule) > 0)
    gang.merge_breaks_it = STYLE
    gang.allow(10)
    assert steps_of(await asyncio.wait_for(made, 5)) == [0, 1, 0, 1, 2, 3, 4]
    assert engine.metrics.counted == [1, 4, 1, 1, 1, 1]
    assert gang.began == ["video_1", PICTURE.id, "video_1"]
    assert gang.discarded == [], "the ranks that held its latents are gone"
    await picture


async def test_a_paused_video_that_is_left_frees_what_the_ranks_hold_of_it(engine: Engine) -> None:
    gang = engine.gang
    video = asked_for(engine)
    gang.allow(1)
    await until(lambda: engine.metrics.counted == [1])
    picture = asyncio.create_task(anext(engine.generate(PICTURE, {}, False)))
    gang.allow(1)
    await until(lambda: gang.began == ["video_1", PICTURE.id])
    video.cancel()
    await until(lambda: gang.discarded == ["video_1"])
    gang.allow(4)
    await asyncio.wait_for(picture, 5)


async def test_an_engine_whose_work_has_ended_is_unhealthy(engine: Engine) -> None:
    await engine.check_health()

    def broken(*args: object) -> None:
        raise ArithmeticError("a mistake of ours")

    engine.schedule.take = broken  # type: ignore[method-assign]
    asked = asked_for(engine)
    await until(lambda: any(task.done() for task in engine._tasks))
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        await engine.check_health()
    asked.cancel()
