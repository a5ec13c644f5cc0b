"""Stand-ins for engine and state, for requests that end before the engine or in an engine that fails."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

import httpx2
from fastapi import FastAPI

from configs.model_family import Match, ModelCard, ModelFamily, SamplingDefaults
from configs.server_args import ServerArgs
from deployments.api.app import create_app
from deployments.interfaces import LoRARequest
from pipelines.job import LoRASpec, Task


class StandInEngine:
    """An engine that serves a model and computes nothing."""

    def __init__(self, *tasks: Task, parameters: Iterable[str] = (), dtype: str = "fp32", vae_dtype: str = "fp32"):
        family = ModelFamily(
            name="stand-in",
            match=Match(pipelines=()),
            tasks={task.value: "AnyPipeline" for task in tasks},
            parameters=frozenset(parameters),
            defaults=SamplingDefaults(width=64, height=64, num_inference_steps=4),
        )
        self._card = ModelCard(
            id="stand/in",
            pipeline_class="AnyPipeline",
            family=family,
            dtype=dtype,
            vae_dtype=vae_dtype,
            device="cpu",
            num_gpus=1,
            created=0,
        )

    async def card(self) -> ModelCard:
        return self._card


class StandInState:
    """The state of a server without adapters and without videos."""

    async def lora_for_job(self, requests: Sequence[LoRARequest] | None) -> tuple[LoRASpec, ...]:
        return ()


def app_over(engine: StandInEngine) -> FastAPI:
    return create_app(ServerArgs(), engine, StandInState())


@asynccontextmanager
async def client_of(engine: StandInEngine) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app_over(engine)), base_url="http://test") as http:
        yield http
