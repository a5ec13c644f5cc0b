"""`State` as the actor that Ray runs: one for all its clients, and soon restarted when it is killed."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial

import pytest
import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError

from deployments import log
from deployments.clients import StateClient
from deployments.errors import APIError
from deployments.interfaces import Video, VideoStatus
from deployments.names import NAMESPACE, STATE_ACTOR
from deployments.state import state
from deployments.state.actor import SETTINGS, forget_state_actor, renew_state_actor, state_actor
from tests.deployments import step_engine
from tests.deployments.state.videos import (
    INPUTS,
    a_job,
    assert_never_goes_back,
    files,
    until,
    until_the_state_actor_is_gone,
)
from tests.deployments.step_engine import StepEngine, pixels


def test_the_state_needs_no_torch():
    subprocess.run(
        [sys.executable, "-c", "import sys, deployments.state.actor; assert 'torch' not in sys.modules"], check=True
    )


def test_its_settings_are_all_that_it_reads_of_the_arguments():
    """Otherwise it would keep the old value of an argument when the server is redeployed with a new one."""
    read = re.findall(r"args\.(\w+)", inspect.getsource(state) + inspect.getsource(log.configure))
    assert set(read) == set(SETTINGS)


@pytest.fixture
def engine_by_value() -> Iterator[None]:
    """So that Ray's workers need not import the tests."""
    ray.cloudpickle.register_pickle_by_value(step_engine)
    yield
    ray.cloudpickle.unregister_pickle_by_value(step_engine)


async def until_gone(actor: ActorHandle) -> None:
    """Until Ray has ended it, a killed actor still responds."""
    with pytest.raises(ActorDiedError):
        async with asyncio.timeout(20):
            while True:
                await actor.get_video.remote("video_1")


class TestTheActor:
    @pytest.fixture
    async def actor(self, ray_cluster, engine_by_value, args, engine) -> AsyncIterator[ray.actor.ActorHandle]:
        actor = state_actor(args, partial(StepEngine, engine.folder))
        yield actor
        forget_state_actor()
        await until_the_state_actor_is_gone()

    async def test_is_one_for_all_who_ask(self, actor, args, engine):
        await actor.create_video.remote(a_job(), INPUTS, "wan")
        again = state_actor(args, partial(StepEngine, engine.folder))
        by_name = ray.get_actor(STATE_ACTOR, namespace=NAMESPACE)
        for handle in (again, by_name):
            assert (await handle.get_video.remote("video_1")).job.id == "video_1"

    async def test_is_made_anew_after_it_was_forgotten_and_knows_what_it_knew(self, actor, args, engine):
        await actor.create_video.remote(a_job(), INPUTS, "wan")
        forget_state_actor()
        await until_gone(actor)
        again = state_actor(args, partial(StepEngine, engine.folder))
        assert (await again.get_video.remote("video_1")).job == a_job()

    async def test_is_replaced_where_its_own_arguments_are_others(self, actor, args, engine):
        await actor.create_video.remote(a_job(), INPUTS, "wan")
        make = partial(StepEngine, engine.folder)
        renew_state_actor(args.model_copy(update={"num_gpus": 2}), make)
        assert (await actor.get_video.remote("video_1")).job == a_job()  # it does not read `num_gpus`
        renew_state_actor(args.model_copy(update={"max_queue": 1}), make)
        await until_gone(actor)
        renewed = state_actor(args, make)
        assert (await renewed.get_video.remote("video_1")).job == a_job()
        assert not await renewed.serves.remote(args)

    async def test_is_found_again_by_clients_of_one_that_is_gone_for_good(self, actor, args, engine):
        client = StateClient(partial(state_actor, args, partial(StepEngine, engine.folder)))
        await client.create_video(a_job(), INPUTS, "wan")
        forget_state_actor()
        with pytest.raises(APIError) as gone:
            async with asyncio.timeout(20):
                while True:  # until Ray has ended it, it still responds
                    await client.get_video("video_1")
        assert gone.value.status == 503
        assert (await client.get_video("video_1")).job == a_job()

    async def test_answers_errors_as_they_are(self, actor):
        with pytest.raises(APIError) as error:
            await actor.get_video.remote("video_1")
        assert (error.value.status, error.value.code) == (404, "video_not_found")

    async def test_killed_in_the_middle_of_a_video_finishes_it_once(self, actor, engine):
        engine.allow("video_1", 2)
        await actor.create_video.remote(a_job(), INPUTS, "wan")
        seen: list[Video] = []

        async def watch(stop: Callable[[Video], bool]) -> None:
            async with asyncio.timeout(60):
                while not (seen and stop(seen[-1])):
                    seen.append(await actor.get_video.remote("video_1"))

        await watch(lambda video: video.progress == 50)
        victim = engine.pid()
        os.kill(victim, signal.SIGKILL)
        await watch(lambda _: engine.journal("video_1") == ["began", "began"])
        engine.allow("video_1", 4)
        await watch(lambda video: video.status is VideoStatus.COMPLETED)

        assert_never_goes_back(seen)
        assert engine.pid() != victim
        assert engine.journal("video_1") == ["began", "began", "ended"]
        content = await actor.video_content.remote("video_1", "video")
        assert await actor.read.remote(content.key, 0, content.size) == pixels(a_job(), INPUTS)[0].data

    async def test_killed_again_and_again_loses_no_video_and_no_file(self, actor, args, engine):
        ids = [f"video_{n}" for n in range(12)]
        for kill in range(2):
            half = ids[kill * 6 : kill * 6 + 6]
            calls = [actor.create_video.remote(a_job(video_id), INPUTS, "wan", video_id) for video_id in half]
            await until(lambda half=half: any("began" in engine.journal(video_id) for video_id in half))
            os.kill(engine.pid(), signal.SIGKILL)
            await asyncio.gather(*calls)  # Ray retries them
        for video_id in ids:
            async with asyncio.timeout(60):
                while (video := await actor.get_video.remote(video_id)).status is not VideoStatus.COMPLETED:
                    assert video.error is None
                    await asyncio.sleep(0.01)
            assert engine.journal(video_id).count("ended") >= 1
        expected = {f"videos/{video_id}-0.{extension}" for video_id in ids for extension in ("mp4", "webp", "jpg")}
        await until(lambda: files(args) == expected)
        assert len((await actor.list_videos.remote(None, 100, "desc")).videos) == len(ids)

    async def test_stops_the_engine_when_a_running_video_is_deleted(self, actor, engine):
        engine.allow("video_1", 1)
        await actor.create_video.remote(a_job(), INPUTS, "wan")
        await until(lambda: engine.journal("video_1"))
        await actor.delete_video.remote("video_1")
        assert engine.journal("video_1") == ["began", "stopped"]
