"""A server without Ray: the application over a real state, real files and an engine that computes nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from threading import Thread

import httpx2
import uvicorn
from fastapi import FastAPI

from configs.server_args import ServerArgs
from deployments.api.app import create_app
from deployments.api.jobs import FAMILY_PARAMETERS
from deployments.api.keys import Keyring
from deployments.command.cluster import free_ports
from deployments.errors import APIError
from deployments.state.state import State
from pipelines.job import Task
from tests.deployments.api.stand_in import StandInEngine
from tests.deployments.step_engine import StepEngine


class AbleEngine(StandInEngine, StepEngine):
    """Accepts every job, whatever its parameters, and yields what `StepEngine` yields. It knows no adapters."""

    def __init__(self, folder: Path):
        StandInEngine.__init__(self, *Task, parameters=FAMILY_PARAMETERS)
        StepEngine.__init__(self, folder)

    async def ready(self) -> None:
        """Immediately."""

    async def identify_lora(self, path: str) -> str:
        raise APIError(404, "There is no such adapter", param="lora_path", code="lora_not_found")


@asynccontextmanager
async def running_app(folder: Path, **args: object) -> AsyncIterator[tuple[FastAPI, State]]:
    """The application with these arguments, and its state, kept in `folder`."""
    server_args = ServerArgs(output_path=str(folder / "outputs"), state_path=str(folder / "jobs.sqlite3"), **args)
    engine = AbleEngine(folder)
    state = State(server_args, lambda: engine)
    yield create_app(server_args, engine, state, Keyring.read(server_args)), state
    await state.close()


@contextmanager
def served_app(folder: Path, **args: object) -> Iterator[str]:
    """Serve the same with uvicorn on a free port, in its own event loop, and yield the base URL."""
    (port,) = free_ports(1)

    async def serve() -> None:
        async with running_app(folder, **args) as (app, _):
            nonlocal server
            server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
            await server.serve()

    server: uvicorn.Server | None = None
    thread = Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    while server is None or not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def client(app: FastAPI) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test")
