"""`build` where a state actor already exists: its jobs go to the Serve that runs now."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest
import ray
from ray import serve
from ray.actor import ActorHandle

from configs.server_args import ServerArgs
from deployments.app import build
from deployments.clients import StateClient, connect_engine
from deployments.interfaces import VideoStatus
from deployments.names import APPLICATION
from deployments.state.actor import forget_state_actor, state_actor
from pipelines.job import Event, Job, Media, Output, Progress, Result
from tests.deployments.state.videos import INPUTS, a_job, finished, until_the_state_actor_is_gone

pytestmark = pytest.mark.usefixtures("ray_cluster")


class ReadyEngine:
    """In place of the Engine: every video is finished at once."""

    async def generate(self, job: Job, media: Media, progress: bool, asker: str) -> AsyncGenerator[Event, None]:
        yield Progress(0, job.num_inference_steps)
        yield Result((Output(b"clip", b"thumbnail", b"sheet"),), seconds={})


def serve_anew(args: ServerArgs) -> None:
    """What `serve run` does on an existing cluster."""
    serve.start(proxy_location="Disabled")
    build(args)
    serve.run(serve.deployment(ReadyEngine, name="Engine").bind(), name=APPLICATION, route_prefix=None)


@pytest.fixture
def args(tmp_path: Path) -> Iterator[ServerArgs]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers need not import the tests
    yield ServerArgs(output_path=str(tmp_path / "outputs"), state_path=str(tmp_path / "jobs.sqlite3"))
    serve.shutdown()
    forget_state_actor()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


async def compute(actor: ActorHandle, video_id: str) -> None:
    state = StateClient(lambda: actor)
    await state.create_video(a_job(video_id), INPUTS, "model")
    assert (await finished(state, video_id)).status is VideoStatus.COMPLETED


async def test_a_state_actor_stays_as_long_as_its_serve(args: ServerArgs) -> None:
    """After that Serve was shut down, the actor's handle of the engine would wait for replicas forever, and a server
    started elsewhere would find the actor's files in use."""
    serve_anew(args)
    state = state_actor(args, connect_engine)
    await compute(state, "video_1")
    build(args)  # redeployed
    assert state_actor(args, connect_engine) == state
    await compute(state, "video_2")
    serve.shutdown()
    serve_anew(args)
    await compute(state_actor(args, connect_engine), "video_3")
    serve.delete(APPLICATION)
    await until_the_state_actor_is_gone()
