"""How the HTTP side and the state actor handle an engine that is not there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, OwnerDiedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from deployments.clients import EngineClient
from deployments.errors import APIError
from deployments.interfaces import LoadedAdapter
from pipelines.job import Job, Progress, Task


class Stream:
    """What a streaming handle yields: events, then an error if there is one."""

    def __init__(self, *outcome: Progress | Exception):
        self._outcome = outcome

    async def __aiter__(self) -> AsyncIterator[Progress]:
        for each in self._outcome:
            if isinstance(each, Exception):
                raise each
            yield each

    def cancel(self) -> None:
        """There is nothing to free."""


def client(*streams: Stream) -> EngineClient:
    """A client of an engine whose calls of `generate` return these streams, one after the other."""
    calls = iter(streams)
    handle: Any = SimpleNamespace(generate=SimpleNamespace(remote=lambda *_: next(calls)))
    handle.options = lambda stream: handle
    return EngineClient(handle)


def job(task: Task) -> Job:
    return Job(id="job_1", task=task, prompt="", width=64, height=64, num_inference_steps=1, seeds=(1,))


async def events(engine: EngineClient, task: Task) -> list[Progress]:
    return [event async for event in engine.generate(job(task), {}, progress=True)]


LOST = [ActorDiedError(), OutOfMemoryError("killed by Ray")]


@pytest.mark.parametrize("error", LOST)
async def test_a_picture_whose_replica_is_lost_is_computed_once_more(error: Exception) -> None:
    engine = client(Stream(Progress(0, 1), error), Stream(Progress(0, 1), Progress(1, 1)))
    assert await events(engine, Task.TEXT_TO_IMAGE) == [Progress(0, 1), Progress(0, 1), Progress(1, 1)]


@pytest.mark.parametrize("task", [Task.TEXT_TO_IMAGE, Task.TEXT_TO_VIDEO])
@pytest.mark.parametrize("error", [*LOST, DeploymentUnavailableError(DeploymentID("Engine", "ditserve"))])
async def test_an_engine_that_is_gone_is_told_as_a_server_that_restarts(error: Exception, task: Task) -> None:
    with pytest.raises(APIError) as restarting:
        await events(client(Stream(error), Stream(error)), task)
    assert (restarting.value.status, restarting.value.code) == (503, "restarting")
    assert restarting.value.headers == {"Retry-After": "2"}


async def test_an_adapter_whose_rank_died_before_it_was_fetched_is_to_be_read_again() -> None:
    lost: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    lost.set_exception(OwnerDiedError("00", b"", "00"))
    loaded: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    loaded.set_result(LoadedAdapter("a@1", lost, 4, 100))
    handle: Any = SimpleNamespace(load_lora=SimpleNamespace(remote=lambda path: loaded), options=lambda stream: None)
    with pytest.raises(APIError) as restarting:
        await EngineClient(handle).load_lora("a")
    assert restarting.value.status == 503
