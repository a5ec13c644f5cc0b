"""The protocols of `deployments.interfaces`, spoken over Ray: a Serve handle and the state actor's handle."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import ray
from ray import serve
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from configs.model_family import ModelCard
from deployments.errors import APIError
from deployments.interfaces import LoadedAdapter
from deployments.losses import PROCESS_LOST, cause
from deployments.names import APPLICATION
from pipelines.job import Event, Job, Media

PATIENCE_SECONDS = 5.0
"""How long a call to the engine may wait before the engine counts as not ready. OpenAI's client gives up connecting
after 5 s, so a response must be sent by then."""


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise what the other process raised, or 503 when that process, an object it owned or the deployment is gone."""
    try:
        yield
    except RayTaskError as error:
        raise cause(error) from None
    except (RayServeException, ObjectLostError, *PROCESS_LOST) as error:
        if isinstance(error, RayServeException):  # the application is gone; this client would not find a new one
            _engine_client.cache_clear()
        raise APIError(
            503, "A part of the server is restarting; try again.", code="restarting", headers={"Retry-After": "2"}
        ) from None


class EngineClient:
    """`interfaces.Engine` over the Engine deployment's handle."""

    def __init__(self, handle: DeploymentHandle, asker: str = ""):
        """`asker` distinguishes this process from an earlier one that requested the same videos."""
        self._asker = asker
        self._handle = handle
        self._streaming = handle.options(stream=True)
        self._card: ModelCard | None = None

    async def card(self) -> ModelCard:
        if self._card is None:
            self._card = await self._soon(self._handle.card.remote())
        return self._card

    async def ready(self) -> None:
        await self._soon(self._handle.ready.remote())

    async def generate(self, job: Job, media: Media, *, progress: bool) -> AsyncGenerator[Event, None]:
        """If the engine replica dies, the next one computes an image once more and reports its steps again. For a video
        this is up to the state actor, which counts its attempts."""
        retried = False
        with _plain_errors():
            while True:
                events = self._streaming.generate.remote(job, dict(media), progress, self._asker)
                try:
                    async for event in events:
                        yield event
                    return
                except PROCESS_LOST:
                    if retried or job.task.is_video:
                        raise
                    retried = True
                finally:
                    events.cancel()

    async def identify_lora(self, path: str) -> str:
        with _plain_errors():
            return await self._handle.identify_lora.remote(path)

    async def load_lora(self, path: str) -> LoadedAdapter:
        """This process becomes the factors' owner in the object store, so that they outlive the rank that read them."""
        with _plain_errors():
            loaded = await self._handle.load_lora.remote(path)
            factors = await loaded.factors
        return replace(loaded, factors=await asyncio.to_thread(ray.put, factors))

    async def _soon(self, response: Any) -> Any:
        try:
            with _plain_errors():
                return await asyncio.wait_for(response, PATIENCE_SECONDS)
        except TimeoutError:
            raise APIError(503, "The engine is not ready: it is still loading.", code="not_ready") from None


def connect_engine() -> EngineClient:
    """The engine of the running application, for callers outside its Serve graph.

    Raises:
        APIError: 503; there is no engine yet.
    """
    try:
        return _engine_client()
    except RayServeException:
        raise APIError(503, "The engine is not deployed yet.", code="not_ready") from None


@cache
def _engine_client() -> EngineClient:
    handle = serve.get_deployment_handle("Engine", APPLICATION)
    return EngineClient(handle, asker=ray.get_runtime_context().get_worker_id())


class StateClient:
    """`interfaces.State` over the state actor's handle: every method is the actor's method of that name."""

    def __init__(self, find: Callable[[], ActorHandle]):
        """`find` returns the actor, and creates one if there is none."""
        self._find = find
        self._actor: ActorHandle | None = find()

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any, **kwargs: Any) -> Any:
            if self._actor is None:
                self._actor = self._find()
            with _plain_errors():
                try:
                    return await getattr(self._actor, name).remote(*args, **kwargs)
                except PROCESS_LOST:
                    self._actor = None  # it may be gone for good; the next call finds another one
                    raise

        return call
